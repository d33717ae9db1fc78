"""The backbone for processors: compiled kernels, one build for each instruction set, reached with ctypes."""
