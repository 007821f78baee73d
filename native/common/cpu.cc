#include "common/cpu.h"

#if RAREFY_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif RAREFY_ARM && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace rarefy::common {

#if RAREFY_X86

// Whether this process may use the registers of AMX, after asking for them.
static bool ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#endif

CpuFlags detect_cpu() {
    CpuFlags flags{};
#if RAREFY_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return flags;
    const bool osxsave = c >> 27 & 1;
    const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return flags;
    unsigned xcr0 = 0, xcr0_high = 0;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    const bool ymm = (xcr0 & 0x6) == 0x6;
    const bool zmm = ymm && (xcr0 & 0xe0) == 0xe0;
    const bool tiles = (xcr0 & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return flags;
    flags.fma = ymm && fma;
    flags.f16c = ymm && f16c;
    flags.avx2 = ymm && (b >> 5 & 1);
    flags.bmi2 = b >> 8 & 1;
    flags.avx512f = zmm && (b >> 16 & 1);
    flags.avx512dq = zmm && (b >> 17 & 1);
    flags.avx512bw = zmm && (b >> 30 & 1);
    flags.avx512vl = zmm && (b >> 31 & 1);
    flags.avx512vbmi = zmm && (c >> 1 & 1);
    flags.avx512_vbmi2 = zmm && (c >> 6 & 1);
    flags.avx512_vnni = zmm && (c >> 11 & 1);
    if (tiles && (d >> 24 & 1) && ask_for_tiles()) {
        flags.amx_tile = true;
        flags.amx_bf16 = d >> 22 & 1;
        flags.amx_int8 = d >> 25 & 1;
    }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        flags.avx_vnni = ymm && (a >> 4 & 1);
        flags.avx512_bf16 = zmm && (a >> 5 & 1);
    }
#elif RAREFY_ARM && defined(__linux__)
    constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    flags.asimddp = (getauxval(AT_HWCAP) & kDotProduct) != 0;
#endif
    return flags;
}

// Zen 3 and Zen 4.
static bool is_amd_family_19h() {
#if RAREFY_X86
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return false;
    const bool is_amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!is_amd || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    const unsigned base_family = a >> 8 & 0xf, extended_family = a >> 20 & 0xff;
    return base_family == 0xf && base_family + extended_family == 0x19;
#else
    return false;
#endif
}

bool fetches_best_alone() { return is_amd_family_19h(); }

bool has_half_width_units() { return is_amd_family_19h(); }

}  // namespace rarefy::common
