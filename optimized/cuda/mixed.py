"""Any mix of stages as a candidate, by the names of those that come from CUDA: the others are Triton's.

    moeproof verify moeproof.optimized.cuda.mixed:route_combine
    moeproof verify moeproof.optimized.cuda.mixed:quantise_gemm2 --case T=9,H=160,I=96,E=5,K=2,scheme=fp8_token

Names are those of stages.NAMES, or of quant_stages.NAMES, in any order; `quant_` in front makes the quantised layer where the
names alone do not say which is meant (`quant_align`).
"""

from __future__ import annotations

from moeproof.optimized.cuda import quant_stages, stages
from moeproof.optimized.cuda.candidates import candidate, quant_candidate
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import check


def mixed(text: str) -> Candidate:
    """The candidate of `text`, names joined by underscores. Raises ContractError where one is not known."""
    words = tuple(word for word in text.split("_") if word)
    quant = words[:1] == ("quant",) or any(word in ("quantise", "requantise") for word in words)
    words = words[1:] if words[:1] == ("quant",) else words
    known = quant_stages.NAMES if quant else stages.NAMES
    unknown = [word for word in words if word not in known]
    check(
        bool(words) and not unknown,
        f"'{text}' names no mix of stages: {', '.join(unknown) or 'nothing'} is not known; allowed: {', '.join(known)}",
    )
    return (quant_candidate if quant else candidate)(f"mixed:{text}", words)


def __getattr__(name: str) -> Candidate:
    if name.startswith("__"):
        raise AttributeError(name)
    return mixed(name)
