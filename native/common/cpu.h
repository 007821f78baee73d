// What the CPU and the operating system can execute.
#pragma once

namespace rarefy::common {

struct CpuFlags {
    bool avx2, fma, f16c, bmi2, avx_vnni;
    bool avx512f, avx512bw, avx512vl, avx512dq, avx512_vnni, avx512vbmi, avx512_vbmi2, avx512_bf16;
    bool amx_tile, amx_int8, amx_bf16;
    bool asimddp;  // ARM: NEON with the dot product of bytes
};

// A flag is set only when the operating system saves the registers that go with it. Those of AMX are large, and Linux
// wants to be asked for them: this does.
CpuFlags detect_cpu();

// Whether the hardware fetches what a walk through memory reads next better than a program that asks for it: on AMD's
// family 19h, of which Zen 4 was measured (docs/limits.md); on Zen 5 asking gains. Only kernels of AVX-512 look here.
bool fetches_best_alone();

// Whether AVX-512 goes through units of half its width, so that arithmetic takes twice the cycles: the same family.
bool has_half_width_units();

// The flags that the files and passes named so are compiled for.
inline bool can_run_avx2(const CpuFlags& cpu) { return cpu.avx2 && cpu.fma && cpu.f16c && cpu.bmi2; }
inline bool can_run_avx_vnni(const CpuFlags& cpu) { return can_run_avx2(cpu) && cpu.avx_vnni; }
inline bool can_run_avx512(const CpuFlags& cpu) {
    return can_run_avx2(cpu) && cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq && cpu.avx512_vnni &&
           cpu.avx512vbmi && cpu.avx512_vbmi2;
}
inline bool can_run_avx512_bf16(const CpuFlags& cpu) { return can_run_avx512(cpu) && cpu.avx512_bf16; }
#if RAREFY_EMULATE_AMX
inline bool can_run_amx(const CpuFlags& cpu) { return can_run_avx512_bf16(cpu); }
#else
inline bool can_run_amx(const CpuFlags& cpu) {
    return can_run_avx512_bf16(cpu) && cpu.amx_tile && cpu.amx_int8 && cpu.amx_bf16;
}
#endif
inline bool can_run_neon(const CpuFlags& cpu) { return cpu.asimddp; }

}  // namespace rarefy::common
