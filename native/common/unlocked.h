// What nanobind::gil_scoped_release is, for threads that outlive the interpreter too. For bindings alone.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace rarefy::common {

// Other threads may run Python while this lives.
class Unlocked {
public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;
    // Before 3.14 Python ends a thread that comes back while the interpreter shuts down by unwinding its stack, which
    // no destructor and no frame of nanobind lets through: the process would abort. It waits for the end instead, as
    // with later versions.
    ~Unlocked() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) pause();
        }
    }

private:
    PyThreadState* state_;
};

}  // namespace rarefy::common
