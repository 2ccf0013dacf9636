"""What is right, computed in float64 by loops over experts, with the allowed error beside every value."""

from moeproof.reference.oracle.activations import activate
from moeproof.reference.oracle.chain import chain
from moeproof.reference.oracle.combine import combine
from moeproof.reference.oracle.experts import gemm1, gemm2, input_rows
from moeproof.reference.oracle.router import Selection, route
from moeproof.reference.oracle.value import Trace, Value

__all__ = ["Selection", "Trace", "Value", "activate", "chain", "combine", "gemm1", "gemm2", "input_rows", "route"]
