// Codes of 4, 3 and 2 bits under N:M, all as 4 bits: lists of entries, or a mask where that is smaller (nm.h).
#include "matmul/encodings/nm.h"

#if RAREFY_PASS_REFERENCE

namespace rarefy::matmul {

void packers::nm_int4(Packing& packing) { pack_nm<4>(packing, packers::mask_int4, stored_bits(packing.format())); }

void reference::nm_int4(const PanelWeights& w, const Rows& rows, const Part& part) { mask_int4(w, rows, part); }

}  // namespace rarefy::matmul

#elif RAREFY_PASS_AVX2

void rarefy::matmul::avx2::nm_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    mask_int4(w, rows, part);
}

#elif RAREFY_PASS_AVX512

namespace rarefy::matmul {

void avx512::nm_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    if (w.parameter <= 0)
        mask_int4(w, rows, part);
    else
        multiply_lists<4>(w, rows, part);
}

}  // namespace rarefy::matmul

#elif RAREFY_PASS_NEON

void rarefy::matmul::neon::nm_int4(const PanelWeights& w, const Rows& rows, const Part& part) {
    mask_int4(w, rows, part);
}

#elif RAREFY_PASS_SAMPLES

namespace rarefy::matmul {

Sample samples::nm_int4(const SampleSpec& spec) { return make_code_sample(spec, stored_bits(spec.format), true); }

}  // namespace rarefy::matmul

#endif
