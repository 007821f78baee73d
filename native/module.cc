// The extension module rarefy._native. Every op binds itself in its own folder.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace rarefy {
void bind_common(nb::module_& module);
void bind_direct(nb::module_& module);
void bind_fisher(nb::module_& module);
void bind_gram(nb::module_& module);
void bind_matmul(nb::module_& module);
void bind_ops(nb::module_& module);
void bind_program(nb::module_& module);
void bind_recurrent(nb::module_& module);
void bind_strided(nb::module_& module);
}  // namespace rarefy

NB_MODULE(_native, module) {
    // A thread that the interpreter leaves behind holds what it works on: nothing that a user should be told.
    nb::set_leak_warnings(false);
    module.doc() = "Kernels of rarefy; use them through rarefy.kernels.";
    rarefy::bind_common(module);
    rarefy::bind_fisher(module);
    rarefy::bind_gram(module);
    rarefy::bind_matmul(module);
    rarefy::bind_direct(module);  // after the weights, as is the program
    rarefy::bind_ops(module);
    rarefy::bind_program(module);  // after the weights that it multiplies with
    rarefy::bind_recurrent(module);
    rarefy::bind_strided(module);
}
