"""The pytest plugin: parametrised candidates and cases, failures that end in a replay line.

    def test_my_kernel(moe_candidate, moe_case, moe_judge):
        moe_judge(moe_candidate, moe_case)

`moe_candidate` runs over the installed candidates and those that a conftest returns from the hook
`pytest_moeproof_candidates`; `moe_case` over the cases of --moe-tier, or over --moe-case. With --moe-ranks N both are
about several ranks: RankPairs, and cases on N ranks, which processes of a pool run under a deadline. Nothing of torch is
imported before a test asks for one of these names: the plugin is loaded in every pytest run of its user.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from moeproof.harness.cases.case import Case
    from moeproof.harness.ranks.session import RankSession
    from moeproof.harness.verdict import Verdict
    from moeproof.reference.contract.candidate import Candidate, RankPair

TIER_NAMES = ("quick", "default", "full", "soak")


class Hooks:
    """Hooks that a conftest or another plugin may implement."""

    @pytest.hookspec
    def pytest_moeproof_candidates(self) -> Any:
        """Return candidates to judge: callables, Candidates or seed-style Pairs."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moeproof", "Mixture-of-Experts kernels")
    group.addoption("--moe-case", action="append", default=[], metavar="LINE", help="judge this case line (may be repeated)")
    group.addoption(
        "--moe-backend", action="append", default=[], metavar="NAME", help="only candidates of this name or backend"
    )
    group.addoption("--moe-device", choices=("auto", "interpret", "device"), default=None, help="where Triton kernels run")
    group.addoption("--moe-tier", choices=TIER_NAMES, default="default", help="which cases: quick, default, full or soak")
    group.addoption("--moe-ranks", type=int, default=0, metavar="N", help="judge candidates for several ranks, on N of them")
    group.addoption(
        "--moe-transport", default="auto", metavar="NAME", help="between ranks: auto, simulated, gloo, symm or nccl"
    )
    group.addoption("--moe-deadline", type=float, default=60.0, metavar="S", help="seconds for one case on all ranks")


def pytest_configure(config: pytest.Config) -> None:
    """An explicit device must be settled before any conftest imports Triton."""
    if config.getoption("--moe-device") is not None:
        _settle(config)


_settled = False


def _settle(config: pytest.Config) -> None:
    global _settled
    if _settled:
        return
    _settled = True
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from moeproof.harness import modes
    from moeproof.reference.contract.errors import ContractError

    torch.set_num_threads(1)
    try:
        modes.choose(config.getoption("--moe-device") or "auto")
    except ContractError as error:
        raise pytest.UsageError(f"moeproof: {error}") from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Options are checked once, before collection, where an error is one line and not a traceback."""
    if session.config.getoption("--moe-ranks"):
        _session(session.config)
    if any(session.config.getoption(f"--moe-{name}") for name in ("case", "backend", "ranks")):
        _settle(session.config)
        _cases(session.config)
        _candidates(session.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = {"moe_candidate", "moe_case"} & set(metafunc.fixturenames)
    if not wanted:
        return
    _settle(metafunc.config)
    if "moe_candidate" in wanted:
        candidates = _candidates(metafunc.config)
        metafunc.parametrize("moe_candidate", candidates, ids=[c.name for c in candidates])
    if "moe_case" in wanted:
        cases = _cases(metafunc.config)
        metafunc.parametrize("moe_case", cases, ids=[str(c) for c in cases])


def _candidates(config: pytest.Config) -> list[Candidate] | list[RankPair]:
    from moeproof.harness.judging.pairs import as_candidate
    from moeproof.harness.registry import find_candidates, find_rank_pairs
    from moeproof.reference.contract.candidate import RankPair
    from moeproof.reference.contract.errors import ContractError

    found: dict[str, Any]
    try:
        own = [c for group in config.hook.pytest_moeproof_candidates() for c in group]
        if config.getoption("--moe-ranks"):
            found = {p.name: p for p in [*find_rank_pairs(), *(c for c in own if isinstance(c, RankPair))]}
        else:
            alone = [as_candidate(c) for c in own if not isinstance(c, RankPair)]
            found = {c.name: c for c in [*find_candidates(), *alone]}
    except ContractError as error:
        raise pytest.UsageError(f"moeproof: {error}") from None
    only = config.getoption("--moe-backend")
    chosen = [c for c in found.values() if not only or c.name in only or c.backend in only]
    if only and not chosen:
        names = ", ".join(found) or "none"
        raise pytest.UsageError(f"moeproof: --moe-backend {', '.join(only)} matches no candidate; there are: {names}")
    return chosen


def _cases(config: pytest.Config) -> list[Case]:
    from moeproof.harness.cases.case import parse_case
    from moeproof.harness.cases.tiers import cases_of
    from moeproof.reference.contract.errors import ContractError

    lines, ranks = config.getoption("--moe-case"), config.getoption("--moe-ranks")
    try:
        cases = [parse_case(line) for line in lines] if lines else cases_of(config.getoption("--moe-tier"))
        if not ranks:
            return cases
        from moeproof.harness.ranks import command

        placed, _ = command.place([("", case) for case in cases], ranks, strict=bool(lines))
        return [case for _, case in placed]
    except ContractError as error:
        raise pytest.UsageError(f"moeproof: --moe-case: {error}") from None


_SESSION = pytest.StashKey["RankSession"]()


def _session(config: pytest.Config) -> RankSession:
    """The one pool of this pytest process. Its ranks start with the first case."""
    from moeproof.harness.ranks import command
    from moeproof.harness.ranks.session import RankSession
    from moeproof.reference.contract.errors import ContractError

    if _SESSION not in config.stash:
        ranks, deadline = config.getoption("--moe-ranks"), config.getoption("--moe-deadline")
        try:
            transport = command.choose(config.getoption("--moe-transport"), ranks)
        except ContractError as error:
            raise pytest.UsageError(f"moeproof: --moe-transport: {error}") from None
        config.stash[_SESSION] = RankSession(ranks, transport, deadline)
    return config.stash[_SESSION]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SESSION in config.stash:
        config.stash[_SESSION].close()


@pytest.fixture
def moe_judge(request: pytest.FixtureRequest) -> Callable[[object, Case], Verdict]:
    """judge(candidate, case) -> Verdict. Fails the test with findings and replay line; skips what is not supported."""
    from moeproof.harness.judging.judge import judge
    from moeproof.harness.verdict import Outcome

    def run(candidate: object, case: Case) -> Verdict:
        if request.config.getoption("--moe-ranks"):
            verdict = _on_ranks(request.config, candidate, case)
        else:
            verdict = judge(candidate, case)
        if verdict.outcome is Outcome.UNSUPPORTED:
            pytest.skip(f"{verdict.candidate} does not support this case: {verdict.reason}")
        if verdict.outcome is not Outcome.PASS:
            pytest.fail(str(verdict), pytrace=False)
        return verdict

    return run


def _on_ranks(config: pytest.Config, candidate: object, case: Case) -> Verdict:
    from moeproof.harness.registry import find_rank_pairs
    from moeproof.reference.contract.candidate import RankPair
    from moeproof.reference.contract.errors import ContractError

    if not isinstance(candidate, RankPair):
        pytest.fail(f"--moe-ranks judges RankPairs, not {type(candidate).__name__}", pytrace=False)
    # Installed ones travel by name: what they are made of need not be sendable.
    installed = candidate.name in {p.name for p in find_rank_pairs()}
    try:
        return _session(config).judge(candidate.name if installed else candidate, candidate, case)
    except ContractError as error:
        pytest.fail(str(error), pytrace=False)
