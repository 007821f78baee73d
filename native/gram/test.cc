// The Gram matrix against loops in double precision, made to run under sanitizers.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/pool.h"
#include "gram/gram.h"

namespace {

float widen(uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Exactly as many elements as the contract says, so that a sanitizer sees any read or write beyond.
bool matches(int64_t num_tokens, int64_t num_features) {
    std::vector<uint16_t> x(static_cast<size_t>(num_tokens * num_features));
    uint32_t state = 12345;
    for (uint16_t& bits : x) {
        state = state * 1664525u + 1013904223u;
        bits = static_cast<uint16_t>(((state >> 31) << 15) | (0x3f00 + ((state >> 8) & 0xff)));
    }
    std::vector<float> total(static_cast<size_t>(num_features * num_features), 1.0f);
    rarefy::gram::add(x.data(), num_tokens, num_features, total.data());
    for (int64_t i = 0; i < num_features; ++i) {
        for (int64_t j = i; j < num_features; ++j) {
            double sum = 1.0, size = 1.0;
            for (int64_t t = 0; t < num_tokens; ++t) {
                const double product = double{widen(x[t * num_features + i])} * widen(x[t * num_features + j]);
                sum += product;
                size += std::fabs(product);
            }
            if (!(std::fabs(total[i * num_features + j] - sum) <= 1e-5 * size)) return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    if (!rarefy::gram::can_run()) {
        std::printf("0 passed, 0 failed, 1 skipped\n");
        return 0;
    }
    rarefy::common::set_num_threads(3);
    int passed = 0, failed = 0;
    for (const int64_t num_tokens : {0, 1, 2, 3, 255, 256, 257, 600})
        for (const int64_t num_features : {1, 7, 8, 9, 16, 47, 48, 49, 97, 144})
            (matches(num_tokens, num_features) ? passed : failed) += 1;
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
