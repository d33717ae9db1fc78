#define FT_NS avx512vnni
#define FT_NAME "avx512vnni"
#define FT_ENTRY kernels_avx512vnni
#include "kernels.inc"
