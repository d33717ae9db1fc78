#define FT_NS amx
#define FT_NAME "amx"
#define FT_ENTRY kernels_amx
#include "kernels.inc"
