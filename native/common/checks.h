// What test programs count and print.
#pragma once

#include <cstdio>
#include <string>

namespace rarefy::checks {

inline int num_checks = 0;
inline int num_failures = 0;

inline void check(bool passed, const std::string& what) {
    ++num_checks;
    if (passed) return;
    ++num_failures;
    std::printf("FAILED: %s\n", what.c_str());
}

// For main to return.
inline int summary(const std::string& where = "") {
    std::printf("%d checks, %d failures%s\n", num_checks, num_failures, where.c_str());
    return num_failures == 0 ? 0 : 1;
}

}  // namespace rarefy::checks
