#define RAREFY_READ_STREAMS read_streams_reference
#include "common/read_streams.inc"
