"""moeproof: proves Mixture-of-Experts kernels right."""

from moeproof._version import __version__

__all__ = ["__version__"]
