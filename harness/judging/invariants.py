"""PERMUTE and DISPATCH: exact facts about maps, counts and rows."""

from __future__ import annotations

import torch

from moeproof.harness.judging.compare import Comparison
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.experts import local_ids

Tensor = torch.Tensor


def _fail(tensor: str, message: str, **where: int | None) -> Finding:
    return Finding(TENSORS[tensor], tensor, message, **where)  # type: ignore[arg-type]


def check_permute(sorted_slots: Tensor, block_expert: Tensor, num_padded: Tensor, inputs: Inputs) -> Comparison:
    """Each live slot stands in exactly one block, in a block of its own expert; nothing else is there.

    `sorted_slots` holds t * K + k, or T * K (and above) for padding; block b covers an equal share of its rows and
    belongs to `block_expert[b]` (a local id). Only the first `num_padded` rows and their blocks count.
    """
    local = local_ids(inputs).flatten()
    K = inputs.topk_ids.shape[1]
    padded = int(num_padded.flatten()[0])
    rows, blocks = sorted_slots.numel(), block_expert.numel()
    checked = 1 + local.numel()
    if not blocks or padded < 0 or padded > rows or rows % blocks:
        message = f"{padded} padded rows of {rows}, in {blocks} blocks: rows must divide into blocks"
        return Comparison((_fail("num_padded", message),) if rows or padded else (), checked, 0.0)
    block = rows // blocks
    used = sorted_slots[:padded].long()
    owner = block_expert.long().repeat_interleave(block)[:padded]
    real = (used >= 0) & (used < local.numel())
    findings = []
    count = torch.bincount(used[real], minlength=local.numel())
    for wrong, words in (
        ((count == 0) & (local >= 0), "a routed slot is in no block"),
        ((count > 1) & (local >= 0), "a slot is in the map more than once"),
        ((count > 0) & (local < 0), "a slot that is not routed here is in the map"),
    ):
        if bool(wrong.any()):
            slot = int(wrong.nonzero()[0])
            where = {"token": slot // K, "slot": slot % K, "expert": int(inputs.topk_ids.flatten()[slot])}
            findings.append(_fail("sorted_slots", words, bad=int(wrong.sum()), total=local.numel(), **where))
    stray = real & (owner != local[used.clamp(0, max(local.numel() - 1, 0))]) if local.numel() else real
    if bool(stray.any()):
        row = int(stray.nonzero()[0])
        slot = int(used[row])
        words = f"block {row // block} belongs to local expert {int(owner[row])} but holds a slot of another"
        findings.append(
            _fail("block_expert", words, token=slot // K, slot=slot % K, expert=int(inputs.topk_ids.flatten()[slot]))
        )
    return Comparison(tuple(findings), checked + padded, 0.0)


def check_counts(expert_num_tokens: Tensor, inputs: Inputs) -> Comparison:
    """int32 (e,): (token, slot) pairs of each local expert."""
    local = local_ids(inputs)
    e = inputs.w1.shape[0]
    want = torch.bincount(local[local >= 0], minlength=e)
    if expert_num_tokens.shape != want.shape or expert_num_tokens.dtype != torch.int32:
        got = f"{tuple(expert_num_tokens.shape)} {expert_num_tokens.dtype}"
        return Comparison((_fail("expert_num_tokens", f"is {got}, must be ({e},) torch.int32"),), 1, 0.0)
    wrong = expert_num_tokens.long() != want
    if not bool(wrong.any()):
        return Comparison((), e, 0.0)
    index = int(wrong.nonzero()[0])
    words = f"local expert {index} counts {int(expert_num_tokens[index])} pairs, must be {int(want[index])}"
    found = _fail("expert_num_tokens", words, expert=inputs.problem.local[index], bad=int(wrong.sum()), total=e)
    return Comparison((found,), e, 0.0)


def find_rows(rows: Tensor, counts: Tensor, inputs: Inputs, x_TKH: Tensor) -> tuple[Tensor, list[Finding]]:
    """Where each live slot's row lies in the batched buffer: int64 (T, K) of flat row indices, -1 where not live.

    Rows are matched by their bytes, since the contract leaves their order inside an expert open. Equal rows of one expert
    are interchangeable. A live slot without a row, or a row without a slot, is a finding.
    """
    local = local_ids(inputs)
    index = torch.full_like(local, -1)
    findings: list[Finding] = []
    for expert in range(inputs.w1.shape[0]):
        n = min(int(counts[expert]), rows.shape[1])
        waiting: dict[bytes, list[int]] = {}
        for r, row in enumerate(_bytes(rows[expert, :n])):
            waiting.setdefault(row, []).append(expert * rows.shape[1] + r)
        tokens, slots = torch.nonzero(local == expert, as_tuple=True)
        for t, k, row in zip(tokens.tolist(), slots.tolist(), _bytes(x_TKH[tokens, slots]), strict=True):
            if waiting.get(row):
                index[t, k] = waiting[row].pop()
            elif not findings:
                global_id = inputs.problem.local[expert]
                findings.append(_fail("rows", "no dispatched row holds this slot's input", token=t, slot=k, expert=global_id))
        left = sum(len(v) for v in waiting.values())
        if left and not findings:
            words = f"{left} dispatched rows of local expert {expert} belong to no slot"
            findings.append(_fail("rows", words, expert=inputs.problem.local[expert]))
    return index, findings


def _bytes(rows: Tensor) -> list[bytes]:
    flat = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]
