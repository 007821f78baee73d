// What the instructions of the AVX-512 kernels cost on this core, in cycles from one to the next: matmul_ports_bench.
// All operands are in registers or in the L1 cache, and no instruction waits for another, so that these are the floors
// which docs/limits.md compares the kernels with.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

#include "common/cpu.h"

#if RAREFY_X86

namespace {

using Body = void (*)(const uint8_t* memory);

alignas(4096) uint8_t memory[4096];

double seconds_of(Body body, const uint8_t* from) {
    constexpr int kRepeats = 50000;
    double best = 1e9;
    for (int round = 0; round < 15; ++round) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kRepeats; ++i) body(from);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best / kRepeats;
}

// A shift and an exclusive or that wait for each other take two cycles.
double measure_clock() {
    constexpr int kSteps = 200000;
    double best = 1e9;
    for (int round = 0; round < 15; ++round) {
        uint64_t x = 1;
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kSteps; ++i) {
            x ^= x << 1;
            __asm__ volatile("" : "+r"(x));
        }
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return 2 * kSteps / best;
}

#define EACH_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define TWICE(X) EACH_12(X) EACH_12(X)
#define BODY(text)                                                                                                \
    [](const uint8_t* from) {                                                                                     \
        __asm__ volatile(text::"r"(from)                                                                          \
                         : "rax", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                           "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory");                       \
    }

#define DOT(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
#define DOT_BF16(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define MULTIPLY(i) "vmulps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define CONVERT(i) "vcvtdq2ps %%zmm14, %%zmm" #i "\n"
#define AND(i) "vpandd %%zmm14, %%zmm15, %%zmm" #i "\n"
#define PERMUTE(i) "vpermb %%zmm14, %%zmm15, %%zmm" #i "\n"
#define MULTISHIFT(i) "vpmultishiftqb %%zmm14, %%zmm15, %%zmm" #i "\n"
#define LOAD(i) "vmovdqu64 " #i "*64(%0), %%zmm" #i "\n"
#define STORE(i) "vmovdqu64 %%zmm14, " #i "*64(%0)\n"
#define BROADCAST(i) "vpbroadcastd " #i "*64(%0), %%zmm" #i "\n"
#define MASK(i) "kmovq " #i "*64(%0), %%k1\n"
#define EXPAND(i) "vmovdqa64 %%zmm14, %%zmm" #i "\nvpexpandb " #i "*64(%0), %%zmm" #i "%{%%k1%}\n"
#define MASKED(i) MASK(i) EXPAND(i)
#define COUNTED(i) "popcnt " #i "*64(%0), %%rax\n" MASKED(i)
#define COUNTED_ONCE(i) MASK(i) "kmovq %%k1, %%rax\npopcnt %%rax, %%rax\n" EXPAND(i)
#define MASKED_DOT(i) MASKED(i) DOT(i)
#define MASK_DOT(i) MASK(i) DOT(i)
#define DOT_PERMUTE(i) DOT(i) "vpermb %%zmm14, %%zmm15, %%zmm13\n"
#define DOT_LOAD(i) DOT(i) "vmovdqu64 " #i "*64(%0), %%zmm13\n"

struct Row {
    const char* name;
    int offset;  // of what is loaded: 40 makes every 64 bytes cross a line
    Body body;
};

constexpr Row kRows[] = {
    {"vpdpbusd", 0, BODY(TWICE(DOT))},
    {"vdpbf16ps (where the CPU has it)", 0, nullptr},
    {"vfmadd231ps", 0, BODY(TWICE(FMA))},
    {"vmulps", 0, BODY(TWICE(MULTIPLY))},
    {"vcvtdq2ps", 0, BODY(TWICE(CONVERT))},
    {"vpandd", 0, BODY(TWICE(AND))},
    {"vpermb", 0, BODY(TWICE(PERMUTE))},
    {"vpmultishiftqb", 0, BODY(TWICE(MULTISHIFT))},
    {"load of 64 bytes", 0, BODY(TWICE(LOAD))},
    {"load of 64 bytes, across lines", 40, BODY(TWICE(LOAD))},
    {"store of 64 bytes", 0, BODY(TWICE(STORE))},
    {"vpbroadcastd from memory", 0, BODY(TWICE(BROADCAST))},
    {"vpdpbusd and a load", 0, BODY(TWICE(DOT_LOAD))},
    {"vpdpbusd and vpermb", 0, BODY(TWICE(DOT_PERMUTE))},
    {"kmovq from memory", 0, BODY(TWICE(MASK))},
    {"vpexpandb across lines", 40, BODY(TWICE(EXPAND))},
    {"the same and its kmovq", 40, BODY(TWICE(MASKED))},
    {"and popcnt, from memory", 40, BODY(TWICE(COUNTED))},
    {"and popcnt, of the mask register", 40, BODY(TWICE(COUNTED_ONCE))},
    {"vpexpandb, its kmovq and vpdpbusd", 40, BODY(TWICE(MASKED_DOT))},
    {"vpdpbusd and kmovq from memory", 0, BODY(TWICE(MASK_DOT))},
};

}  // namespace

int main() {
    const rarefy::common::CpuFlags cpu = rarefy::common::detect_cpu();
    if (!rarefy::common::can_run_avx512(cpu)) {
        std::puts("this CPU has no AVX-512");
        return 0;
    }
    const double clock = measure_clock();
    std::printf("clock %.2f GHz; cycles from one to the next:\n", clock / 1e9);
    for (const Row& row : kRows) {
        const bool bf16 = row.body == nullptr;
        if (bf16 && !cpu.avx512_bf16) continue;
        const Body body = bf16 ? BODY(TWICE(DOT_BF16)) : row.body;
        std::printf("  %-34s %.2f\n", row.name, seconds_of(body, memory + row.offset) * clock / 24);
    }
    return 0;
}

#else

int main() { std::puts("AVX-512 alone is measured"); }

#endif
