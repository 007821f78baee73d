// Cuts the upper triangle into tiles and shares them out to the threads.
#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "common/pool.h"
#include "gram/gram.h"

namespace rarefy::gram {

#if RAREFY_X86

bool can_run() {
    const common::CpuFlags cpu = common::detect_cpu();
    return common::can_run_avx512(cpu) && cpu.avx512_bf16;
}

void add(const uint16_t* x, int64_t num_tokens, int64_t num_features, float* total) {
    const int64_t num_panels = (num_features + kPanel - 1) / kPanel;
    constexpr int64_t kStride = kTokens / 2 * kPanel;
    std::vector<uint32_t> packed(static_cast<size_t>(num_panels * kStride));
    for (int64_t start = 0; start < num_tokens; start += kTokens) {
        const int64_t count = std::min(kTokens, num_tokens - start);
        common::parallel_for(static_cast<int>(num_panels), [&](int panel) {
            avx512::pack_panel(x + start * num_features, count, num_features, panel * kPanel,
                               packed.data() + panel * kStride);
        });
        // The first panels have the most tiles to their right: claimed first, so that the threads end together.
        common::parallel_for(static_cast<int>(num_panels), [&](int left) {
            for (int64_t right = left; right < num_panels; ++right) {
                for (int offset = 0; offset < kPanel && left * kPanel + offset < num_features; offset += kTileRows) {
                    const int64_t row = int64_t{left} * kPanel + offset, column = right * kPanel;
                    avx512::add_tile(packed.data() + left * kStride + offset, packed.data() + right * kStride,
                                     (count + 1) / 2, total + row * num_features + column, num_features,
                                     static_cast<int>(std::min<int64_t>(kTileRows, num_features - row)),
                                     static_cast<int>(std::min<int64_t>(kPanel, num_features - column)));
                }
            }
        });
    }
}

#else

bool can_run() { return false; }

void add(const uint16_t*, int64_t, int64_t, float*) {}

#endif

}  // namespace rarefy::gram
