// What test programs count and print, and the numbers that they draw.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace rarefy::checks {

inline int num_checks = 0;
inline int num_failures = 0;

inline void check(bool passed, const std::string& what) {
    ++num_checks;
    if (passed) return;
    ++num_failures;
    std::printf("FAILED: %s\n", what.c_str());
}

// Written so that NaN fails.
inline void check_close(double found, double expected, double error, const std::string& what) {
    if (std::fabs(found - expected) <= error) return check(true, what);
    check(false, what + ": " + std::to_string(found) + ", expected " + std::to_string(expected));
}

// Standard normal, the same for a seed however many: drawn once, which an emulator is slow at.
inline std::vector<float> random_floats(int64_t count, unsigned seed) {
    struct Drawn {
        explicit Drawn(unsigned seed) : random(seed) {}
        std::mt19937 random;
        std::normal_distribution<float> normal;
        std::vector<float> values;
    };
    static std::map<unsigned, Drawn> drawn;
    Drawn& stream = drawn.try_emplace(seed, seed).first->second;
    while (static_cast<int64_t>(stream.values.size()) < count) stream.values.push_back(stream.normal(stream.random));
    return {stream.values.begin(), stream.values.begin() + count};
}

// For main to return.
inline int summary(const std::string& where = "") {
    std::printf("%d checks, %d failures%s\n", num_checks, num_failures, where.c_str());
    return num_failures == 0 ? 0 : 1;
}

}  // namespace rarefy::checks
