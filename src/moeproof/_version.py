"""The version, read by packaging without importing torch."""

__version__ = "0.1.0"
