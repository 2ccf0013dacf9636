"""Whether a finding names a place that the fault really changed: healthy and faulty tensors side by side."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeproof.harness.verdict import Finding
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.experts import live_slots

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]


def right_place(finding: Finding, healthy: Shown, faulty: Shown, inputs: Inputs) -> bool | None:
    """None where the finding can have no place, or where every live row is changed, so that any would be right."""
    if finding.tensor not in healthy or finding.tensor not in faulty:
        return None
    if finding.tensor in ("rows", "row_scales", "expert_num_tokens"):
        return _right_expert(finding, healthy, faulty, inputs)
    if finding.token is None:
        return None
    changed = changed_slots(finding.tensor, healthy, faulty, inputs)
    relevant = live_slots(inputs) if changed.shape == inputs.topk_ids.shape else torch.ones_like(changed)
    if finding.tensor.startswith("topk"):
        relevant = torch.ones_like(changed)
    if bool(changed[relevant].all()) or not bool(changed.any()):
        return None  # every place is right, or this memory happens to hide the fault
    slot = finding.slot or 0
    if changed.shape[1] == 1:
        slot = 0
    named = bool(changed[finding.token, slot]) or (finding.tensor == "topk_ids" and bool(changed[finding.token].any()))
    if finding.expert is not None and finding.slot is not None and not finding.tensor.startswith("topk"):
        return named and finding.expert == int(inputs.topk_ids[finding.token, finding.slot])
    return named


def changed_slots(name: str, healthy: Shown, faulty: Shown, inputs: Inputs) -> Tensor:
    """bool (T, K), or (T, 1) for tensors that have no slots: rows whose bits differ."""
    if name in ("sorted_slots", "block_expert", "num_padded"):
        count = inputs.topk_ids.numel()
        return (owners(healthy, count) != owners(faulty, count)).any(0).view(inputs.topk_ids.shape)
    differs = unlike(healthy[name], faulty[name])
    if name in ("topk_ids", "topk_weights"):
        return differs
    differs = differs.any(-1)
    return differs if differs.dim() == 2 else differs[:, None]


def unlike(a: Tensor, b: Tensor) -> Tensor:
    """bool: which elements differ; one NaN is as good as another. Codes of 8 bits by their bytes."""
    if a.element_size() == 1:
        return a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)
    return (a != b) & ~(a.isnan() & b.isnan())


def visible(healthy: Shown, faulty: Shown, inputs: Inputs) -> bool:
    """Whether a row that exists differs in anything shown."""
    for name, a in healthy.items():
        b = faulty[name]
        if a.shape != b.shape:
            return True
        if name in ("rows", "row_scales", "expert_num_tokens") and bool(unlike(a, b).any()):
            return True  # rows behind the counts are unwritten in both
        if name in ("rows", "row_scales", "expert_num_tokens") or not a.numel():
            continue
        changed = changed_slots(name, healthy, faulty, inputs)
        whole = changed.shape != inputs.topk_ids.shape or name.startswith("topk")
        if bool((changed if whole else changed & live_slots(inputs)).any()):
            return True
    return False


def owners(shown: Shown, count: int) -> Tensor:
    """int64 (2, slots): how often each slot is in the map, and the sum of the experts it is listed under."""
    slots, blocks = shown["sorted_slots"].long(), shown["block_expert"].long()
    used = int(shown["num_padded"])
    owner = blocks.repeat_interleave(slots.numel() // max(blocks.numel(), 1))[:used]
    slots = slots[:used]
    real = (slots >= 0) & (slots < count)
    times = torch.bincount(slots[real], minlength=count)
    return torch.stack([times, torch.zeros_like(times).index_add_(0, slots[real], owner[real] + 1)])


def _right_expert(finding: Finding, healthy: Shown, faulty: Shown, inputs: Inputs) -> bool | None:
    if finding.expert is None:
        return None
    a, b = healthy[finding.tensor], faulty[finding.tensor]
    if a.shape != b.shape:
        return None
    differs = unlike(a, b)
    differs = differs.flatten(1).any(1) if differs.dim() > 1 else differs
    if bool(differs.all()) or not bool(differs.any()):
        return None
    local = inputs.problem.local
    return finding.expert in local and bool(differs[local.index(finding.expert)])
