// The strided copy against nested loops, made to run under sanitizers.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/pool.h"
#include "strided/strided.h"

namespace {

using rarefy::strided::View;

// The memory has exactly the numbers that the view reaches, so that a sanitizer sees any read beyond them.
bool matches(std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    int64_t count = 1, reach = 1;
    View view{nullptr, static_cast<int>(sizes.size()), {}, {}};
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
        view.sizes[axis] = sizes[axis];
        view.strides[axis] = strides[axis];
        count *= sizes[axis];
        if (sizes[axis] > 0) reach += (sizes[axis] - 1) * strides[axis];
    }
    std::vector<float> memory(static_cast<size_t>(reach)), out(static_cast<size_t>(count), -1.0f);
    for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i);
    view.data = memory.data();
    rarefy::strided::copy(view, out.data());
    for (int64_t i = 0; i < count; ++i) {
        int64_t place = 0;
        for (int64_t rest = i, axis = view.num_axes - 1; axis >= 0; --axis) {
            place += rest % sizes[axis] * strides[axis];
            rest /= sizes[axis];
        }
        if (out[i] != static_cast<float>(place)) return false;
    }
    return true;
}

}  // namespace

int main() {
    int num_passed = 0, num_failed = 0;
    for (const int threads : {1, 2, 5}) {
        rarefy::common::set_num_threads(threads);
        const bool results[] = {
            matches({}, {}),
            matches({0, 3}, {3, 1}),
            matches({1, 1, 1}, {7, 5, 3}),
            matches({5, 7}, {7, 1}),
            matches({5, 7}, {1, 5}),
            matches({3, 0, 2}, {1, 1, 1}),
            matches({4, 4}, {0, 1}),
            matches({2, 32, 32, 3, 3, 17}, {34 * 34 * 17, 34 * 17, 17, 34 * 17, 17, 1}),
            matches({1, 5, 4, 2, 3, 6}, {1000, 2 * 90, 3 * 6, 90, 2 * 6, 1}),
            matches({100003, 3}, {1, 2}),
            matches({40000}, {2}),
            matches({2, 35, 1100}, {35 * 1100, 1, 35}),  // the channels of two images, which lie last, in front
            matches({256, 3136}, {1, 256}),
            matches({4, 17, 4, 33}, {1, 4 * 33, 17 * 4 * 33, 4}),
            matches({3, 5, 2, 7}, {1, 3, 100, 15}),
            matches({16, 16}, {1, 0}),
            matches({19, 6, 21}, {1, 1, 19}),
        };
        for (const bool passed : results) ++(passed ? num_passed : num_failed);
    }
    std::printf("%d passed, %d failed\n", num_passed, num_failed);
    return num_failed == 0 ? 0 : 1;
}
