"""Fast stages: Triton kernels for every stage of the pipeline, and a second layer on torch's grouped product.

Dims: T tokens, K slots per token, S = T * K flat slots (slot s belongs to token s // K), E global experts, e local
experts, H hidden, N = 2I or I, I intermediate, P padded rows, B blocks, C rows per expert of the batched layout.
"""
