#define FT_NS generic
#define FT_NAME "generic"
#define FT_ENTRY kernels_generic
#include "kernels.inc"
