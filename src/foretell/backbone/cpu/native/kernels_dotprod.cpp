#define FT_NS dotprod
#define FT_NAME "dotprod"
#define FT_ENTRY kernels_dotprod
#define FT_NEON
#include "kernels.inc"
