"""CUDA C++ stages beside the Triton ones, with the same signatures: a second backend that shares no code generator.

Sources are the .cu and .cuh files here, compiled by nvcc when a stage is first used (toolkit.py), and called through a plain
C interface (library.py). A launch goes to the current stream, never waits, and can be captured in a CUDA graph once the
stage has run before. Letters are those of `moeproof.optimized`.
"""
