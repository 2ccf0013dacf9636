"""Compiles every launch of unmodified host code for sm_90, without a GPU, and prints each kernel's resources as JSON lines.

Run as a child: compiling and interpreting cannot share a process. Tensors hold garbage, and nothing is launched: the
driver below answers what Triton asks on the way to a launch, and its launcher does nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moeproof.optimized import dispatch, experts, fused, layer, plans, prepare_finalize, tiles
from moeproof.optimized.activation import activate
from moeproof.optimized.align import Alignment
from moeproof.optimized.grouped_gemm import grouped_gemm
from moeproof.reference.contract import Activation, Inputs, Problem

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Utils:
    """Loads no binary, but reports what it needs."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            used = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        # A kernel without recursion and local arrays has a stack only to spill registers into.
        registers, stack = (int(re.search(rf"{key}:(\d+)", used.stdout)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
        print(
            json.dumps({"case": Driver.case, "kernel": name, "registers": registers, "stack": stack, "shared": shared}),
            flush=True,
        )
        return None, None, registers, stack, 1024


class Driver:
    """The active driver of a process without a GPU."""

    case = ""
    utils = Utils()
    launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)
    get_current_device = staticmethod(lambda: 0)
    set_current_device = staticmethod(lambda device: None)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def inputs(problem: Problem) -> Inputs:
    """Tensors of a problem, uninitialised: no kernel runs."""
    p, dtype = problem, problem.fmt.dtype

    def stored(*shape: int) -> torch.Tensor:
        w = torch.empty(*shape, dtype=dtype)
        return w if p.storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)

    e, r = p.weight_experts, p.router
    return Inputs(
        problem=p,
        hidden_states=torch.empty(p.T, p.H, dtype=dtype),
        topk_ids=torch.empty(p.T, p.slots, dtype=torch.int32),
        topk_weights=torch.empty(p.T, p.slots),
        w1=stored(e, p.N, p.H),
        w2=stored(e, p.H, p.I),
        b1=torch.empty(e, p.N, dtype=dtype) if p.expert_bias else None,
        b2=torch.empty(e, p.H, dtype=dtype) if p.expert_bias else None,
        expert_map=torch.empty(e, dtype=torch.int32) if p.ep > 1 else None,
        logits=torch.empty(p.T, p.routed_ids),
        correction_bias=torch.empty(p.routed_ids) if r.bias else None,
        expert_scale=torch.empty(p.E) if r.expert_scale else None,
        table_ids=torch.empty(p.T, p.K, dtype=torch.int32) if r.table else None,
        shared_w1=torch.empty(p.act.width_in(p.shared), p.H, dtype=dtype) if p.shared else None,
        shared_w2=torch.empty(p.H, p.shared, dtype=dtype) if p.shared else None,
        shared_gate=torch.empty(p.H, dtype=dtype) if p.shared_gate else None,
    )


def problem(line: str) -> Problem:
    return Problem.from_options(dict(part.split("=", 1) for part in line.split(",")))


MODELS = {
    "every size 1": "T=1,H=1,I=1,E=1,K=1,dtype=fp16,shared=1,shared_gate=1,expert_bias=1,weight_on_input=1",
    "qwen3 decode": "T=16,H=2048,I=768,E=128,K=8,router=softmax:renorm=sum",
    "qwen3 small batch": "T=512,H=2048,I=768,E=128,K=8,router=softmax:renorm=sum",
    "qwen3 medium batch": "T=1024,H=2048,I=768,E=128,K=8,router=softmax:renorm=sum",
    "deepseek prefill": (
        "T=8192,H=1024,I=2048,E=256,K=8,shared=2048,router=sigmoid:bias:groups=8/4:top2:renorm=eps/1e-20:scale=2.5"
    ),
    "gpt-oss, stored transposed": ("T=64,H=2880,I=2880,E=32,K=4,act=swigluoai,expert_bias=1,storage=KN,router=softmax_topk"),
    "ragged": "T=33,H=100,I=50,E=60,K=6,dtype=fp16,act=gelu_tanh,shared=24,shared_gate=1,router=sqrtsoftplus:table",
    "fp32 decode": "T=16,H=512,I=256,E=16,K=2,dtype=fp32,act=gelu,router=sparsemixer",
    "fp32 prefill": "T=2048,H=512,I=256,E=8,K=2,dtype=fp32,act=situ:beta=4:linear_beta=25,router=softmax:renorm=lp/2",
    "identity experts": "T=64,H=512,I=256,E=512,K=12,router=softmax:bias:zero_experts=256:scale=6",
    "fused shared experts": "T=64,H=512,I=256,E=64,K=6,router=sigmoid:renorm=sum:fused_shared=2:softcap=30:expert_scale",
}


def run_layer(line: str) -> None:
    layer.run(inputs(problem(line)))


def pairs(line: str) -> None:
    """Both seed-style pairs, without the host's look at the counts."""
    p = problem(line)
    x = inputs(p)
    for layout in ("standard", "batched"):
        if layout == "standard":
            prepare: Any = prepare_finalize.TritonNoEPPrepareFinalize()
            compute: Any = experts.TritonExperts(act=p.act)
        else:
            prepare = prepare_finalize.TritonBatchedPrepareFinalize(p.T * p.K, p.E)
            compute = experts.TritonBatchedExperts(act=p.act)
        ids, weights = x.topk_ids.long(), x.topk_weights
        a, _, counts, _, _ = prepare.prepare(x.hidden_states, None, None, weights, ids, p.E, x.expert_map, False)
        M = a.size(0) if a.dim() == 2 else a.size(1)
        elements13, elements2, dtype = compute.workspace_shapes(x.hidden_states, a, M, p.N, p.H, p.K, p.E)
        spaces = (torch.empty(elements13, dtype=dtype), torch.empty(elements2, dtype=dtype))
        y = compute.apply(a, x.w1, x.w2, ids, p.act.name, p.E, x.expert_map, *[None] * 6, *spaces, counts)
        prepare.finalize(torch.empty_like(x.hidden_states), y, weights, ids, False)


def every_tile() -> None:
    """Each tile that the chooser can return for aligned sizes."""
    for dtype, block_m in itertools.product(("bf16", "fp32"), (16, 32, 64, 128)):
        Driver.case = f"tile {tiles.table(problem(f'T=1,H=1,I=1,E=1,K=1,dtype={dtype}').fmt.dtype)[block_m]} {dtype}"
        x = inputs(problem(f"T={block_m},H=512,I=512,E=1,K=1,dtype={dtype}"))
        rows, one = torch.empty(block_m, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        out = torch.empty(block_m, 1024, dtype=x.hidden_states.dtype)
        grouped_gemm(x.hidden_states, x.w1, out, Alignment(rows, one, one, one, block_m), 1)


def every_activation() -> None:
    for text in ("silu:limit=7", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "situ:beta=4:linear_beta=25", "relu2_no_mul"):
        Driver.case, act = f"activation {text}", Activation.parse(text)
        activate(torch.empty(8, act.width_in(768), dtype=torch.bfloat16), torch.empty(8, 768, dtype=torch.bfloat16), act)


def weigh() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        dispatch.weigh_input(torch.empty(8, 64, dtype=dtype), torch.empty(8, 1))


def every_rule() -> None:
    """The fused layer's plans for models that no table knows; ci/kernel_resources.py compiles all that may ever run."""
    for plan in (plans.STRIPS, *(plan for _, plan in plans.RULE)):
        Driver.case = f"plan {plan}"
        fused.run_plan(inputs(problem("T=64,H=512,I=256,E=8,K=2")), plan)


PARTS: dict[str, Callable[[], None]] = {
    "pairs": functools.partial(pairs, "T=64,H=512,I=256,E=8,K=2"),
    "every tile": every_tile,
    "every activation": every_activation,
    "every rule": every_rule,
    "weight on input": weigh,
} | {name: functools.partial(run_layer, line) for name, line in MODELS.items()}


def main(names: list[str]) -> None:
    """Compile these parts; all without names."""
    driver.set_active(Driver())
    for name in names or PARTS:
        Driver.case = name
        PARTS[name]()


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "compiling needs a process without TRITON_INTERPRET"
    main(sys.argv[1:])
