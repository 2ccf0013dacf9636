"""What a planted fault is, and how it is planted: one step of a pipeline replaced, with a witness beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from moeproof.reference.contract.schemes import SCHEMES
from moeproof.reference.contract.stages import Stage

Edit = Mapping[str, Callable[..., Any]]
"""Step name -> wrong(right, pipeline, *arguments): what the faulty step returns, given what the healthy one did."""

GROUNDS = {
    "layer": "one rank",
    "quant": "one rank, in each quantised scheme that the class can happen in",
    "world": "three simulated ranks with an all-to-all",
    "tensor": "two tensor-parallel ranks",
    "sequence": "one rank, several calls of one instance",
    "replay": "a captured graph, replayed with other inputs",
    "ranks": "ranks that meet in collectives, in a child process under a deadline",
}


@dataclass(frozen=True)
class Fault:
    """One class of the catalogue (docs/faults.md)."""

    id: str
    name: str
    stands_for: str
    trigger: str
    blame: tuple[Stage | None, ...]
    """Stages that a finding may name: where the first shown tensor goes wrong. None = damage around the call, or an error."""
    variants: Mapping[str, Edit] = field(default_factory=dict)
    """The class's edits; empty where it is not planted."""
    ground: str = "layer"
    schemes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Variant -> quantised schemes that it can happen in; empty on grounds that quantise nothing."""
    not_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> quantised schemes in which no variant can happen: together with `schemes` all that there are."""
    least: int = 1
    """Tokens that its trigger needs where that is more than a few, all else at its smallest; `note` says why."""
    on_gpu: tuple[str, ...] = ()
    """Variants that only a GPU can trigger, planted in on_gpu.py; `moeproof faults --gpu` hunts them."""
    random: bool = False
    """Fires by chance: scored by repeats to detection for each p of CHANCES."""
    why_not: str = ""
    """Why the class is not planted; empty where it is."""
    note: str = ""
    """Why the blame is not the class's own stage, or what is scaled down."""

    def __post_init__(self) -> None:
        if bool(self.variants) == bool(self.why_not):
            raise ValueError(f"{self.id} must have variants, or say why it has none")
        if self.ground not in GROUNDS:
            raise ValueError(f"{self.id}: ground '{self.ground}' is not known; allowed: {', '.join(GROUNDS)}")
        if self.ground == "quant" and not all(self.schemes.get(variant) for variant in self.variants):
            raise ValueError(f"{self.id}: every variant must name the schemes that it can happen in")
        if self.ground == "quant":
            self._check_schemes()

    def _check_schemes(self) -> None:
        """Each quantised scheme has a planting or one reason why not, and none has both."""
        planted = {scheme for schemes in self.schemes.values() for scheme in schemes}
        reasons = [scheme for schemes in self.not_in.values() for scheme in schemes]
        for name, scheme in SCHEMES.items():
            if scheme.quantised and (name in planted) + reasons.count(name) != 1:
                found = "both planted and not" if name in planted else f"given {reasons.count(name)} reasons"
                raise ValueError(f"{self.id}: scheme {name} must be planted, or have one reason why not; it is {found}")

    @property
    def section(self) -> str:
        """Stage of the catalogue, as the name says it."""
        return self.name.split(".")[0]

    @property
    def planted(self) -> bool:
        return bool(self.variants)

    @property
    def plantings(self) -> tuple[tuple[str, str], ...]:
        """(variant, scheme) of everything that is planted; the scheme is empty where nothing is quantised."""
        return tuple((v, scheme) for v in self.variants for scheme in self.schemes.get(v, ("",)))


CHANCES = (0.3, 0.03, 0.003)


@dataclass
class Witness:
    """How often the faulty step did something else than the healthy one."""

    fired: int = 0


@dataclass
class Dice:
    """Chance of the faults that fire at random."""

    p: float = CHANCES[0]
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self) -> bool:
        return self._random.random() < self.p

    def pick(self, n: int) -> int:
        return self._random.randrange(n)

    def shuffled(self, n: int) -> list[int]:
        return self._random.sample(range(n), n)


def plant(pipeline: Any, edit: Edit, armed: bool = True, dice: Dice | None = None) -> Witness:
    """Replace the edit's steps in this pipeline. Unarmed it is the neutral twin: both branches run, the healthy one counts.

    The witness counts calls in which the faulty branch gave another value, address or order, or threw.
    """
    witness = Witness()
    pipeline.dice = dice or Dice()
    for step, wrong in edit.items():
        if not hasattr(pipeline, step):
            raise AttributeError(f"{type(pipeline).__name__} has no step '{step}'")
        setattr(pipeline, step, _replaced(getattr(pipeline, step), wrong, pipeline, witness, armed))
    return witness


def _replaced(
    healthy: Callable[..., Any], wrong: Callable[..., Any], pipeline: Any, witness: Witness, armed: bool
) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        right = healthy(*args)
        try:
            result = wrong(right, pipeline, *args)
        except Exception:
            witness.fired += 1
            if armed:
                raise
            return right
        if not same(right, result):
            witness.fired += 1
        return result if armed else right

    return step


def same(a: Any, b: Any) -> bool:
    """Equal down to the bits of every tensor."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a is b:
            return True
        if a.dtype == torch.bool or not a.dtype.is_floating_point:
            return bool(torch.equal(a, b))
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        return bool(torch.equal(a.view(bits), b.view(bits)))
    if isinstance(a, (tuple, list)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
