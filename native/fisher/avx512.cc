// Blocks with AVX-512.
#define RAREFY_FISHER_TABLE wide
#include "fisher/core.h"
