#define FT_NS avx512bf16
#define FT_NAME "avx512bf16"
#define FT_ENTRY kernels_avx512bf16
#include "kernels.inc"
