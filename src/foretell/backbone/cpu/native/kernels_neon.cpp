#define FT_NS neon
#define FT_NAME "neon"
#define FT_ENTRY kernels_neon
#define FT_NEON
#include "kernels.inc"
