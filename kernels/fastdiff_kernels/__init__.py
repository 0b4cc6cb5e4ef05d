"""Triton kernels of fastdiff, one file an operation; importing this package does not import triton."""
