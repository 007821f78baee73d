// Chooses the instruction set.
#include "common/cpu.h"
#include "fisher/fisher.h"

namespace rarefy::fisher {

const Functions& functions() {
#if RAREFY_X86
    static const bool can = common::can_run_avx512(common::detect_cpu());
    return can ? wide : reference;
#else
    return reference;
#endif
}

}  // namespace rarefy::fisher
