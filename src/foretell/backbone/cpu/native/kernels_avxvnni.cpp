#define FT_NS avxvnni
#define FT_NAME "avxvnni"
#define FT_ENTRY kernels_avxvnni
#include "kernels.inc"
