"""Quantised stages: Triton quantisers, fused activation and requantisation, grouped GEMMs that decode what they multiply."""
