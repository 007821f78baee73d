// Blocks on any CPU.
#define RAREFY_BLOCKS_TABLE reference
#include "blocks/core.h"
