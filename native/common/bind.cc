// Python bindings of the CPU flags and the thread pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "common/arrays.h"
#include "common/bandwidth.h"
#include "common/cpu.h"
#include "common/pool.h"
#include "common/unlocked.h"

namespace nb = nanobind;

namespace rarefy {
namespace {

int lend_memory(PyObject* self, Py_buffer* view, int flags) {
    const auto* memory = nb::inst_ptr<common::ArrayMemory>(self);
    return PyBuffer_FillInfo(view, self, memory->bytes.get(), memory->num_bytes, 0, flags);
}

PyType_Slot memory_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(lend_memory)}, {0, nullptr}};

}  // namespace

void bind_common(nb::module_& module) {
    module.def("cpu_flags", [] {
        const common::CpuFlags cpu = common::detect_cpu();
        return std::map<std::string, bool>{
            {"avx2", cpu.avx2},
            {"fma", cpu.fma},
            {"f16c", cpu.f16c},
            {"bmi2", cpu.bmi2},
            {"avx_vnni", cpu.avx_vnni},
            {"avx512f", cpu.avx512f},
            {"avx512bw", cpu.avx512bw},
            {"avx512vl", cpu.avx512vl},
            {"avx512dq", cpu.avx512dq},
            {"avx512_vnni", cpu.avx512_vnni},
            {"avx512vbmi", cpu.avx512vbmi},
            {"avx512_vbmi2", cpu.avx512_vbmi2},
            {"avx512_bf16", cpu.avx512_bf16},
            {"amx_tile", cpu.amx_tile},
            {"amx_int8", cpu.amx_int8},
            {"amx_bf16", cpu.amx_bf16},
            {"asimddp", cpu.asimddp},
        };
    });
    module.def("set_num_threads", &common::set_num_threads, nb::arg("num_threads"));
    module.def("num_threads", &common::num_threads);
    // Addresses of GOMP_parallel and omp_get_max_threads.
    module.def(
        "lend_team",
        [](uintptr_t run, uintptr_t max_threads) {
            if (run == 0 || max_threads == 0) throw std::invalid_argument("an address is missing");
            common::lend_team({reinterpret_cast<decltype(common::Team::run)>(run),
                               reinterpret_cast<decltype(common::Team::max_threads)>(max_threads)});
        },
        nb::arg("run"), nb::arg("max_threads"));
    module.def("measure_fork_join", &common::measure_fork_join, nb::call_guard<common::Unlocked>());
    nb::class_<common::ArrayMemory>(module, "ArrayMemory", nb::type_slots(memory_slots));
    module.def("waiting_bytes", &common::waiting_bytes);
    nb::class_<common::BandwidthProbe>(module, "BandwidthProbe")
        .def(nb::init<int64_t>(), nb::arg("num_bytes"))
        .def_prop_ro("num_bytes", &common::BandwidthProbe::num_bytes)
        .def(
            "read",
            [](common::BandwidthProbe& probe, int64_t num_bytes, int num_streams, int64_t prefetch_bytes) {
                return probe.read(num_bytes, num_streams, prefetch_bytes).bytes_per_s;
            },
            nb::arg("num_bytes"), nb::arg("num_streams"), nb::arg("prefetch_bytes"), nb::call_guard<common::Unlocked>())
        .def(
            "read_best",
            [](common::BandwidthProbe& probe, int64_t num_bytes) {
                common::ReadRate rate;
                {
                    const common::Unlocked unlocked;
                    rate = probe.read_best(num_bytes);
                }
                return std::make_tuple(rate.bytes_per_s, rate.num_streams, rate.prefetch_bytes);
            },
            nb::arg("num_bytes"));
}

}  // namespace rarefy
