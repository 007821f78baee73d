// Blocks on any CPU.
#define RAREFY_FISHER_TABLE reference
#include "fisher/core.h"
