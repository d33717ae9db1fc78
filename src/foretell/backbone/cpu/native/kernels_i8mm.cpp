#define FT_NS i8mm
#define FT_NAME "i8mm"
#define FT_ENTRY kernels_i8mm
#define FT_NEON
#include "kernels.inc"
