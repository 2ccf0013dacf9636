"""What the tests of the one-sided pairs run on ranks, on CPUs and on GPUs alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.judging.pairs import forward
from moeproof.harness.ranks import RankContext
from moeproof.harness.ranks.call import settle
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import ContractError, FusedMoEModularKernel, Inputs, RankPair
from moeproof.reference.eager.ranks_link import GroupLink

Shown = dict[str, torch.Tensor]
GUILTY = 1


def pair_of(context: RankContext, name: str) -> RankPair:
    """With the plain loops for experts on CPUs, where interpreted ones would cost most of the time."""
    settle(context, None)
    import symm_ranks

    return symm_ranks.PAIRS[name] if context.device.type == "cpu" else symm_ranks.INSTALLED[name]


def made(context: RankContext, line: str) -> Inputs:
    return make_rank_inputs(parse_case(line), context.rank, context.device)


def link_of(context: RankContext) -> GroupLink:
    return GroupLink(context.group, context.device)


def calls(context: RankContext, name: str, lines: Sequence[str]) -> list[Shown]:
    """The forward calls of `lines` in turn on one instance: what each showed."""
    world = parse_case(lines[0]).world
    shown = run_rank(pair_of(context, name), [made(context, line) for line in lines], world, link_of(context))
    return [{key: t.cpu() for key, t in s.items()} for s in shown]


def kernel_of(context: RankContext, name: str, line: str, patience: float = 20.0) -> FusedMoEModularKernel:
    """One layer on this rank, as an engine holds it."""
    pair, inputs, world = pair_of(context, name), made(context, line), parse_case(line).world
    front = pair.prepare_finalize(inputs, world, link_of(context))
    for half in getattr(front, "_halves", [front]):
        half.exchange.patience = patience
    return pair.kernel(front, pair.experts(inputs))


def attempt(kernel: FusedMoEModularKernel, inputs: Inputs) -> tuple[str, torch.Tensor | None]:
    """(what was refused, output): one of the two."""
    try:
        out = forward(kernel, inputs, None)
        kernel.prepare_finalize.settle()
    except (ContractError, RuntimeError) as error:
        return str(error), None
    return "", out.cpu()


def _more(inputs: Inputs) -> Inputs:
    names = ("hidden_states", "topk_ids", "topk_weights")
    return inputs.map({name: torch.cat([t, t, t]) for name, t in inputs.tensors() if name in names})


def refused_then_well(context: RankContext, name: str, line: str, fault: str) -> tuple[list[str], list[torch.Tensor | None]]:
    """A call that all make, one in which the guilty rank is wrong, and the first again: on one instance."""
    kernel, good = kernel_of(context, name, line), made(context, line)
    bad = good
    if context.rank == GUILTY and fault == "tokens":
        bad = _more(good)
    if context.rank == GUILTY and fault == "map":
        assert good.expert_map is not None
        bad = good.map({"expert_map": good.expert_map.roll(1)})
    answers = [attempt(kernel, good)]
    apply = kernel.fused_experts.apply
    if context.rank == GUILTY and fault == "experts":

        def fail(*_: object, **__: object) -> torch.Tensor:
            raise RuntimeError("out of registers")

        kernel.fused_experts.apply = fail  # type: ignore[method-assign]
    answers.append(attempt(kernel, bad))
    kernel.fused_experts.apply = apply  # type: ignore[method-assign]
    answers.append(attempt(kernel, good))
    return [text for text, _ in answers], [out for _, out in answers]


def once(context: RankContext, name: str, line: str) -> str:
    """What one call is refused for."""
    return attempt(kernel_of(context, name, line), made(context, line))[0]


def replayed(context: RankContext, name: str, lines: Sequence[str]) -> list[bool]:
    """A captured layer call, replayed with the inputs of each line in turn: has it the bits of an ordinary call?"""
    plain, captured = (kernel_of(context, name, lines[0]) for _ in range(2))
    inputs = [made(context, line) for line in lines]
    weights = {key: t for key, t in inputs[0].tensors() if key not in ("hidden_states", "topk_ids", "topk_weights")}
    inputs = [i.map(weights) for i in inputs]
    static = inputs[0].map({key: t.clone() for key, t in inputs[0].tensors() if key.startswith(("hidden", "topk"))})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward(captured, static, None)
    torch.cuda.current_stream().wait_stream(stream)
    captured.prepare_finalize.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(captured, static, None)
    same = []
    for number in [*range(len(lines)), 0, *range(len(lines))]:
        want = forward(plain, inputs[number], None)
        for key in ("hidden_states", "topk_ids", "topk_weights"):
            getattr(static, key).copy_(getattr(inputs[number], key))
        graph.replay()
        captured.prepare_finalize.settle()
        plain.prepare_finalize.settle()
        same.append(torch.equal(out, want))
    return same


def silent(context: RankContext, name: str, line: str, patience: float) -> tuple[list[str], list[torch.Tensor | None]]:
    """The guilty rank makes one call fewer: what the others say, of that call and of one more."""
    kernel, inputs = kernel_of(context, name, line, patience), made(context, line)
    answers = [attempt(kernel, inputs)]
    if context.rank != GUILTY:
        answers += [attempt(kernel, inputs), attempt(kernel, inputs)]
    return [text for text, _ in answers], [out for _, out in answers]


def anywhere(context: RankContext, name: str, line: str) -> list[bool]:
    """Hidden states that begin at an odd element, lie far apart, or have another order of columns: the bits of plain ones."""
    kernel, plain = kernel_of(context, name, line), made(context, line)
    x = plain.hidden_states
    flat, wide = x.new_empty(x.numel() + 1), x.new_empty(x.size(0), 2 * x.size(1) + 1)
    views = [flat[1:].view(x.shape), wide[:, 1 : 1 + x.size(1)], wide[:, 1::2], x.new_empty(x.size(1), x.size(0)).t()]
    want = attempt(kernel, plain)[1]
    same = []
    for view in views:
        view.copy_(x)
        got = attempt(kernel, plain.map({"hidden_states": view}))[1]
        same.append(want is not None and got is not None and torch.equal(got, want))
    return same


def gaps_are_clear(context: RankContext, name: str, lines: Sequence[str]) -> bool:
    """Whether what lies between the fields of this rank's arena is as it was."""
    kernel = kernel_of(context, name, lines[0])
    for line in lines:
        assert attempt(kernel, made(context, line))[0] == ""
    exchange = kernel.prepare_finalize.exchange  # type: ignore[attr-defined]
    return bool((exchange.layout.gaps(exchange.own) == 0).all())
