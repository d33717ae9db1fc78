#define FT_NS avx512
#define FT_NAME "avx512"
#define FT_ENTRY kernels_avx512
#include "kernels.inc"
