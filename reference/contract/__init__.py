"""The contract every implementation is held to: nouns, stage table, the seed's interfaces and their argument checks."""

from moeproof.reference.contract.activations import ACTIVATIONS, Activation
from moeproof.reference.contract.candidate import Candidate, Claims, Pair, RankPair
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import (
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    moe_problem_size,
)
from moeproof.reference.contract.placement import expert_map, local_experts
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.schemes import SCHEMES, Quantiser, QuantScheme
from moeproof.reference.contract.stages import STAGES, Stage
from moeproof.reference.contract.world import World, rank_seed

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "SCHEMES",
    "STAGES",
    "Activation",
    "Candidate",
    "Claims",
    "ContractError",
    "Format",
    "FusedMoEModularKernel",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEPrepareAndFinalize",
    "Grid",
    "Inputs",
    "Link",
    "Pair",
    "Problem",
    "QuantScheme",
    "Quantiser",
    "RankPair",
    "Router",
    "Stage",
    "World",
    "expert_map",
    "local_experts",
    "moe_problem_size",
    "rank_seed",
]
