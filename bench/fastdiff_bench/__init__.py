"""Benchmarks and checks of fastdiff that ship with it."""
