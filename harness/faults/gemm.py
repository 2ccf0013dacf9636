"""GEMM1 and GEMM2 of the plain pipeline: a grouped GEMM in tiles, with the addresses of its stores written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.harness.faults.permute import Plan

Tensor = torch.Tensor


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's tile."""

    M: int
    N: int
    K: int


def reach(t: Tensor) -> Tensor:
    """1-D view from the first element of `t` to the end of its storage: what an unmasked address can touch."""
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.as_strided((room,), (1,))


class GemmSteps:
    tp = 1
    """Tensor-parallel ranks: each multiplies one slice of the depth, and the partial sums are added."""

    def tile(self, tokens: int, num_experts: int, width: int) -> Tile:
        """The heuristic: small batches take small tiles."""
        return Tile(4 if tokens <= 32 else 8, 16, 32)

    def grouped_gemm(
        self, name: str, a: Tensor, source: Tensor, w: Tensor, bias: Tensor | None, plan: Plan, target: Tensor, out: Tensor
    ) -> None:
        """out[target[row]] = a[source[row]] @ w[expert of row].T + bias, float32 accumulation, rounded once.

        a (Ra, A), w (e, B, A), out (Ro, B). Rows with target -1 are padding: they load zeros and store nothing.
        """
        tile = self.tile(plan.slots_total, w.shape[0], w.shape[1])
        row_owner = self.owners(name, plan).repeat_interleave(plan.block)
        a, w = self.k_operands(name, a, w, tile)
        # Any order of experts is legal; the last comes first, so that what runs over into a neighbour stays visible.
        for expert in reversed(range(-1, w.shape[0])):
            rows = (row_owner == expert).nonzero().flatten()
            if not rows.numel() or not a.shape[0] or not self.wanted(expert):
                continue
            there, here = self.tile_rows(rows, source, target)
            x = torch.where(here[:, None] >= 0, a[there.clamp(0, max(a.shape[0] - 1, 0))].float(), 0.0)
            bias_B = None if bias is None else bias[expert].float()
            acc = self.multiply(name, x, w[expert].float(), bias_B, tile, int((here >= 0).sum()))
            self.store(name, out, here, acc, tile, plan)

    def tile_rows(self, rows: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(source, target) of the rows of one expert's tiles: the rest of a last tile is padding."""
        return source[rows], target[rows]

    def owners(self, name: str, plan: Plan) -> Tensor:
        """Expert of each block, as this GEMM reads it."""
        return plan.blocks

    def wanted(self, expert: int) -> bool:
        """Blocks labelled -1 are skipped."""
        return expert >= 0

    def k_operands(self, name: str, a: Tensor, w: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """What the loop over the depth multiplies: the last tile is masked, so exactly the operands."""
        return a, w

    def multiply(self, name: str, x: Tensor, w: Tensor, bias: Tensor | None, tile: Tile, live: int) -> Tensor:
        """float32 (rows, B), of which `live` are no padding."""
        if self.split_k(live):
            acc = self.clear_partial(torch.empty(x.shape[0], w.shape[0]))
            for part in torch.arange(x.shape[1]).split(tile.K):
                acc += x[:, part] @ w[:, part].T
            return acc if bias is None else acc + bias
        acc = torch.zeros(x.shape[0], w.shape[0])
        for rank, part in enumerate(torch.arange(x.shape[1]).tensor_split(self.tp)):
            acc = acc + x[:, part] @ w[:, part].T
            if bias is not None and self.adds_bias(name, rank):
                acc = acc + bias
        return acc

    def split_k(self, rows: int) -> bool:
        """The heuristic splits the depth where one row leaves the device idle."""
        return rows == 1 and self.tp == 1

    def clear_partial(self, buffer: Tensor) -> Tensor:
        return torch.zeros_like(buffer)

    def adds_bias(self, name: str, rank: int) -> bool:
        return rank == 0

    def store(self, name: str, out: Tensor, rows: Tensor, acc: Tensor, tile: Tile, plan: Plan) -> None:
        """Row r, column c goes to address r * B + c; columns in ascending order, so that an overhang is written last."""
        width = out.shape[1]
        columns = self.columns(name, width, tile)
        value = torch.nn.functional.pad(acc, (0, tile.N)).to(out.dtype)[:, columns]
        covered = self.covered(name, -(-rows.numel() // tile.M), -(-columns.numel() // tile.N), plan)
        written = covered.repeat_interleave(tile.M, 0)[: rows.numel()].repeat_interleave(tile.N, 1)[:, : columns.numel()]
        address = self.addresses(name, rows, columns, width)
        memory = reach(out)
        written = (written & (rows >= 0)[:, None] & (address < memory.numel())).T
        memory[address.T[written]] = value.T[written]

    def columns(self, name: str, width: int, tile: Tile) -> Tensor:
        """Columns that the tiles store, masked to the width."""
        return torch.arange(width)

    def covered(self, name: str, row_tiles: int, column_tiles: int, plan: Plan) -> Tensor:
        """bool (row tiles, column tiles): which tiles some program works on: all."""
        tiles = self.programs(row_tiles, column_tiles)
        tiles = tiles[(tiles[:, 0] < row_tiles) & (tiles[:, 1] < column_tiles)]
        done = torch.zeros(row_tiles, column_tiles, dtype=torch.bool)
        done[tiles[:, 0], tiles[:, 1]] = True
        return done

    def programs(self, row_tiles: int, column_tiles: int) -> Tensor:
        """int64 (programs, 2): row and column tile of each program id."""
        pid = torch.arange(row_tiles * column_tiles)
        return torch.stack([pid // column_tiles, pid % column_tiles], 1)

    def addresses(self, name: str, rows: Tensor, columns: Tensor, width: int) -> Tensor:
        return rows[:, None] * width + columns[None]
