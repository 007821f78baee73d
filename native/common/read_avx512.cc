#define RAREFY_READ_STREAMS read_streams_avx512
#include "common/read_streams.inc"
