// Blocks with AVX-512.
#define RAREFY_BLOCKS_TABLE wide
#include "blocks/core.h"
