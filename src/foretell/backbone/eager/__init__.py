"""The backbone in PyTorch's own operations: the slow twin of the kernels, and what runs where there are none."""
