// numpy's arrays without nanobind's: that asks for each through DLPack and makes results in two calls of Python, which
// takes as long as a small product. For bindings alone.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstring>

#include "common/recycled.h"

namespace rarefy::common {

// Memory that an object lends as float32 in C order, aligned, for as long as this lives.
class Lent {
public:
    Lent() = default;
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;
    ~Lent() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }

    // False, and no error, where the object has no such memory.
    bool borrow(nanobind::handle object, bool writable) {
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (!PyObject_CheckBuffer(object.ptr())) return false;
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            view_.obj = nullptr;
            return false;
        }
        return view_.format != nullptr && std::strcmp(view_.format, "f") == 0 && view_.itemsize == 4;
    }
    float* data() const { return static_cast<float*>(view_.buf); }
    int ndim() const { return view_.ndim; }
    Py_ssize_t shape(int axis) const { return view_.shape[axis]; }
    // All axes but the last.
    Py_ssize_t num_rows() const {
        Py_ssize_t count = 1;
        for (int axis = 0; axis + 1 < view_.ndim; ++axis) count *= view_.shape[axis];
        return count;
    }

private:
    Py_buffer view_{};
};

// What `make` gives at the first call.
template <class Make>
PyObject* found(std::atomic<PyObject*>& kept, Make make) {
    PyObject* object = kept.load(std::memory_order_acquire);
    if (object == nullptr) {
        object = make().release().ptr();
        kept.store(object, std::memory_order_release);
    }
    return object;
}

// The memory of one large array, which numpy keeps as its base.
struct ArrayMemory {
    RecycledBytes bytes;
    Py_ssize_t num_bytes;
};

// An array of float32 that holds anything, with the shape of `like` but another last axis. Small ones are numpy's own.
inline nanobind::object new_floats(const Lent& like, Py_ssize_t width) {
    namespace nb = nanobind;
    constexpr Py_ssize_t kSmall = 64 << 10;  // bytes
    // Leaked: they live as long as the process. No static of C++, which would be made under a lock: another thread may
    // come to it with Python's own, which making it needs.
    static std::atomic<PyObject*> made_empty, made_ndarray, made_float32;
    PyObject* const empty = found(made_empty, [] { return nb::object(nb::module_::import_("numpy").attr("empty")); });
    PyObject* const ndarray =
        found(made_ndarray, [] { return nb::object(nb::module_::import_("numpy").attr("ndarray")); });
    PyObject* const float32 =
        found(made_float32, [] { return nb::object(nb::module_::import_("numpy").attr("dtype")("float32")); });
    const nb::object shape = nb::steal(PyTuple_New(like.ndim()));
    if (!shape.is_valid()) throw nb::python_error();
    for (int axis = 0; axis < like.ndim(); ++axis) {
        PyObject* size = PyLong_FromSsize_t(axis + 1 < like.ndim() ? like.shape(axis) : width);
        if (size == nullptr) throw nb::python_error();
        PyTuple_SET_ITEM(shape.ptr(), axis, size);
    }
    nb::object memory;
    const Py_ssize_t row_bytes = width * static_cast<Py_ssize_t>(sizeof(float));
    if (row_bytes > 0 && like.num_rows() > kSmall / row_bytes && like.num_rows() <= PY_SSIZE_T_MAX / 2 / row_bytes) {
        const Py_ssize_t num_bytes = like.num_rows() * row_bytes;
        memory = nb::cast(ArrayMemory{allocate_recycled(num_bytes), num_bytes});
    }
    PyObject* arguments[] = {shape.ptr(), float32, memory.ptr()};
    nb::object made = memory.is_valid() ? nb::steal(PyObject_Vectorcall(ndarray, arguments, 3, nullptr))
                                        : nb::steal(PyObject_Vectorcall(empty, arguments, 2, nullptr));
    if (!made.is_valid()) throw nb::python_error();
    return made;
}

}  // namespace rarefy::common
