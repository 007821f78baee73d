#define RAREFY_READ_STREAMS read_streams_avx2
#include "common/read_streams.inc"
