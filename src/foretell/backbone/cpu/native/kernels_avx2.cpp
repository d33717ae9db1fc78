#define FT_NS avx2
#define FT_NAME "avx2"
#define FT_ENTRY kernels_avx2
#include "kernels.inc"
