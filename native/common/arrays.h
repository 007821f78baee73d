// numpy's arrays without nanobind's: that asks for each through DLPack and makes results in two calls of Python, which
// takes as long as a small product. For bindings alone.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

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

// The numbers of an array of nanobind's. What is checked and then relied on is copied first: another thread may write
// into an array at any time, with Python's lock or in numpy without it.
template <class Array>
std::vector<int64_t> copied(const Array& array) {
    return std::vector<int64_t>(array.data(), array.data() + array.size());
}

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

// An array of float32 that holds anything. Small ones are numpy's own.
inline nanobind::object new_floats(const Py_ssize_t* sizes, int ndim) {
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
    const nb::object shape = nb::steal(PyTuple_New(ndim));
    if (!shape.is_valid()) throw nb::python_error();
    Py_ssize_t num_bytes = sizeof(float);
    bool fits = true;
    for (int axis = 0; axis < ndim; ++axis) {
        PyObject* size = PyLong_FromSsize_t(sizes[axis]);
        if (size == nullptr) throw nb::python_error();
        PyTuple_SET_ITEM(shape.ptr(), axis, size);
        fits &= sizes[axis] == 0 || num_bytes <= PY_SSIZE_T_MAX / 2 / sizes[axis];
        num_bytes = fits ? num_bytes * sizes[axis] : num_bytes;
    }
    nb::object memory;
    if (fits && num_bytes > kSmall) memory = nb::cast(ArrayMemory{allocate_recycled(num_bytes), num_bytes});
    PyObject* arguments[] = {shape.ptr(), float32, memory.ptr()};
    nb::object made = memory.is_valid() ? nb::steal(PyObject_Vectorcall(ndarray, arguments, 3, nullptr))
                                        : nb::steal(PyObject_Vectorcall(empty, arguments, 2, nullptr));
    if (!made.is_valid()) throw nb::python_error();
    return made;
}

// The same with the shape of `like` but another last axis.
inline nanobind::object new_floats(const Lent& like, Py_ssize_t width) {
    Py_ssize_t sizes[PyBUF_MAX_NDIM];
    for (int axis = 0; axis + 1 < like.ndim(); ++axis) sizes[axis] = like.shape(axis);
    sizes[like.ndim() - 1] = width;
    return new_floats(sizes, like.ndim());
}

}  // namespace rarefy::common
