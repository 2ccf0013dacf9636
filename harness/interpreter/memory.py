"""Memory rules of one interpreted launch: every access inside its own tensor, no two programs at odds over an element.

Each tensor argument gets an address window of its own, far from all others, so that an overrun of one argument can
never pass for an access to its neighbour. The interpreter's builder asks `Launch.access` before it touches memory;
what comes back are real addresses, or a `KernelFault` is raised and the access never happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Program = tuple[int, ...]

WINDOW_BITS = 44  # 16 TiB a window; user-space addresses lie below window 16
FIRST_WINDOW = 16
DOING = {"load": "loads", "store": "stores", "atomic": "updates"}
DONE = {"load": "loaded", "store": "stored", "atomic": "updated"}
# What another program must not have done to an element before, in the same launch.
CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}


@dataclass(eq=False)
class KernelFault(Exception):
    """A kernel broke a memory rule or its own assertion. Offsets are relative to the start of the named tensor."""

    kernel: str
    operation: str  # 'load', 'store', 'atomic', 'race' or 'assert'
    tensor: str | None  # name of the argument; None for 'assert'
    byte_offset: int | None
    element: int | None  # byte_offset in elements of the tensor, rounded down
    program: Program
    message: str
    other_program: Program | None = None  # the other party of a race; equal to `program` if two of its lanes clash

    def __post_init__(self) -> None:
        # Exception arguments in the order of the fields make the fault picklable, for runs in a child process.
        self.args = (self.kernel, self.operation, self.tensor, self.byte_offset, self.element, self.program,
                     self.message, self.other_program)  # fmt: skip

    def __str__(self) -> str:
        return self.message

    def as_finding(self) -> dict[str, str]:
        """Tensor and message of the finding that a judge makes of it: a bad access is a wrong kernel, not a broken run."""
        return {"tensor": self.tensor or self.kernel, "message": self.message}


@dataclass(frozen=True)
class LaunchReport:
    """What one launch did: how many lanes were checked, and the fault that stopped it, if any."""

    kernel: str
    grid: Program
    loads: int
    stores: int
    atomics: int
    fault: KernelFault | None


@dataclass
class Session:
    """What one `sanitized()` block asked for, and the log of its launches."""

    shuffle_seed: int = 0
    allow_double_writes: bool = False
    tf32: bool = False
    registered: dict[str, Any] = field(default_factory=dict)
    launches: list[LaunchReport] = field(default_factory=list)


sessions: list[Session] = [Session()]  # the last one rules; the first one is for launches outside `sanitized()`


class Shadow:
    """Who touched each cell of one allocation: for each kind of access an epoch number, 0 for nobody.

    Programs run one after the other, so of readers and updaters the first is enough: if it is not the current
    program then another one was there.
    """

    def __init__(self, start: int, nbytes: int, itemsize: int) -> None:
        self.start, self.nbytes = start, nbytes
        self.shift = itemsize.bit_length() - 1  # a cell is 2^shift bytes
        self.owners: dict[str, Array] = {}

    def cells(self, addresses: Array, size: int) -> Array:
        """Cell numbers of accesses of `size` bytes, a row for each access."""
        while size < 1 << self.shift:  # a pointer cast to a smaller type: finer cells from here on
            self.shift -= 1
            self.owners = {kind: np.repeat(owners, 2) for kind, owners in self.owners.items()}
        return ((addresses - self.start) >> self.shift)[:, None] + np.arange(size >> self.shift)

    def rivals(self, operation: str, cells: Array, epoch: int) -> Iterator[tuple[str, Array]]:
        """For each kind of access at odds with this one: the other epochs found in the cells, 0 where there is none."""
        for kind in CONFLICTS[operation]:
            owners = self.owners.get(kind)
            if owners is not None:
                found = owners[cells]
                found[found == epoch] = 0
                if found.any():
                    yield kind, found

    def mark(self, operation: str, cells: Array, epoch: int) -> None:
        """Note this access: the last writer, the first reader, the first updater."""
        owners = self.owners.get(operation)
        if owners is None:
            owners = self.owners[operation] = np.zeros((self.nbytes >> self.shift) + 1, dtype=np.int32)
        if operation != "store":
            cells = cells[owners[cells] == 0]
        owners[cells] = epoch

    def current(self, addresses: Array, size: int) -> Array:
        """The bits now in memory."""
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.start))
        whole = memory[: self.nbytes // size * size].view(f"u{size}")
        return whole[(addresses - self.start) // size]


@dataclass(frozen=True)
class Region:
    """The bytes of one tensor: where they are, and where the kernel is told they are."""

    name: str
    start: int
    nbytes: int  # from the first to the end of the last element
    itemsize: int
    base: int  # the pointer that the kernel gets
    elements: Array | None  # for a view with holes: which positions between first and last are its own
    shadow: Shadow

    def strays(self, offsets: Array, size: int) -> Array:
        """Mask of the accesses that leave the tensor or hit a hole of the view."""
        stray = (offsets < 0) | (offsets > self.nbytes - size)
        if self.elements is not None:
            first = np.where(stray, 0, offsets)
            last = first + (size - 1)
            stray |= ~(self.elements[first // self.itemsize] & self.elements[last // self.itemsize])
        return stray


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All tensors inside an argument, with readable names: tensors, wrappers, descriptors, nested tuples."""
    if hasattr(value, "data_ptr"):
        yield name, value
    elif hasattr(value, "block_shape") and hasattr(value, "base"):
        yield from _tensors(name, value.base)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)


def _own_elements(shape: tuple[int, ...], strides: tuple[int, ...], span: int) -> Array | None:
    """Which of the positions between the first and the last element belong to the view; None if all do."""
    own = np.zeros(span, dtype=bool)
    np.lib.stride_tricks.as_strided(own, shape, strides)[...] = True
    return None if own.all() else own


class Launch:
    """One launch: its tensors, its programs in their order, and who touched what."""

    def __init__(self, kernel: str, arguments: dict[str, Any], session: Session) -> None:
        self.kernel, self.session = kernel, session
        self.grid: Program = (0,)
        self.program: Program = ()
        self.lanes = {"load": 0, "store": 0, "atomic": 0}
        self._shadows: dict[int, Shadow] = {}
        self._regions: dict[int, Region] = {}  # by window
        self._by_argument: dict[int, Region] = {}  # by identity of the tensor object
        for source in (arguments, session.registered):
            for name, value in source.items():
                for path, tensor in _tensors(name, value):
                    self._add(path, tensor)
        # An epoch is a stretch of one program between two flag operations; see `_meet`.
        self._epochs: list[Program] = [()]
        self._ordered: set[int] = set()
        self._own: set[int] = set()
        self._released: dict[int, set[int]] = {}

    def _add(self, name: str, argument: Any) -> None:
        tensor = getattr(argument, "base", argument) if not hasattr(argument, "untyped_storage") else argument
        storage, itemsize = tensor.untyped_storage(), tensor.element_size()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if tensor.numel() else 0
        shadow = self._shadows.setdefault(storage.data_ptr(), Shadow(storage.data_ptr(), storage.nbytes(), itemsize))
        window = FIRST_WINDOW + len(self._regions)
        start = tensor.data_ptr()
        # In the middle of the window, for offsets below zero; the low bits stay, for kernels that look at alignment.
        base = (window << WINDOW_BITS) + (1 << (WINDOW_BITS - 1)) + (start & 0xFFF)
        elements = None if tensor.is_contiguous() else _own_elements(shape, strides, span)
        region = Region(name, start, span * itemsize, itemsize, base, elements, shadow)
        self._regions[window] = self._by_argument[id(argument)] = region

    def pointer(self, argument: Any) -> int | None:
        """The address that the kernel is to see for a tensor argument."""
        region = self._by_argument.get(id(argument))
        return None if region is None else region.base

    def begin_grid(self, grid: Program) -> None:
        """Fix the order of the programs: natural, or shuffled by the session's seed."""
        self.grid = grid
        self._order = np.arange(int(np.prod(grid)))
        if self.session.shuffle_seed:
            np.random.default_rng(self.session.shuffle_seed).shuffle(self._order)

    def begin_program(self, position: Program) -> Program:
        """The program to run at this position of the natural order."""
        number = self._order[np.ravel_multi_index(position, self.grid)]
        self.program = tuple(int(i) for i in np.unravel_index(number, self.grid))
        self._ordered, self._own = set(), set()
        self._new_epoch()
        return self.program

    def _new_epoch(self) -> None:
        self._epochs.append(self.program)
        self._own.add(len(self._epochs) - 1)

    def _meet(self, address: int) -> None:
        """Order programs by a flag: whoever updates it comes after all that others did before they updated it.

        This is what a lock or an arrival counter is for; without it every "last one sums up" would be called a race.
        """
        self._ordered |= self._released.get(address, set())
        self._released[address] = self._ordered | self._own
        self._new_epoch()

    def access(self, pointers: Array, mask: Array, size: int, operation: str, values: Array | None = None,
               flag: bool = False) -> Array:  # fmt: skip
        """Check all unmasked lanes and return the real addresses; `flag`: an ordered atomic on a single element."""
        mask = np.broadcast_to(mask, pointers.shape)
        lanes = pointers[mask]
        if not lanes.size:
            return pointers
        self.lanes[operation] += lanes.size
        values = None if values is None else np.broadcast_to(values, pointers.shape)[mask]
        for region, base, part in self._homes(lanes, size, operation):
            offsets = (lanes[part] - np.uint64(base)).view(np.int64)
            self._touch(region, offsets, size, operation, None if values is None else values[part], flag)
            lanes[part] = (offsets + region.start).view(np.uint64)
        addresses = pointers.copy()
        addresses[mask] = lanes
        return addresses

    def _homes(self, lanes: Array, size: int, operation: str) -> Iterator[tuple[Region, int, Any]]:
        """The lanes by region: by window if the pointer came as an argument, by real address if it came from memory."""
        windows = lanes >> np.uint64(WINDOW_BITS)
        if (windows == windows[0]).all() and int(windows[0]) in self._regions:  # as good as always
            region = self._regions[int(windows[0])]
            yield region, region.base, slice(None)
            return
        rest = np.ones(lanes.shape, dtype=bool)
        for window, region in self._regions.items():
            end = np.uint64(max(region.start + region.nbytes - size, 0))
            for base, part in (
                (region.base, rest & (windows == window)),
                (region.start, rest & (lanes >= np.uint64(region.start)) & (lanes <= end)),
            ):
                if part.any():
                    rest &= ~part
                    yield region, base, part
        if rest.any():
            self._homeless(int(lanes[rest][0]), operation)

    def _homeless(self, address: int, operation: str) -> NoReturn:
        """An address in no window and no tensor: name the tensor whose start is nearest."""
        nearest = min(self._regions.values(), key=lambda region: abs(address - region.start), default=None)
        what = (f"{DOING[operation]} address {address:#x}, which is in no tensor of this launch (name the targets of "
                f"pointers loaded from memory with interpreter.register)")  # fmt: skip
        self._fault(operation, nearest, address - nearest.start if nearest else 0, what)

    def _touch(self, region: Region, offsets: Array, size: int, operation: str, values: Array | None,
               flag: bool) -> None:  # fmt: skip
        """Refuse strays, misaligned accesses and races; note the rest."""
        addresses = offsets + region.start
        for bad, where in (
            (region.strays(offsets, size), "outside the tensor"),
            ((addresses & (size - 1)) != 0, "at a misaligned address"),
        ):
            if bad.any():
                what = f"{DOING[operation]} {size} bytes {where} ({int(bad.sum())} of {bad.size} lanes)"
                self._fault(operation, region, int(offsets[bad][0]), what)
        if flag and addresses.size == 1:
            self._meet(int(addresses[0]))
        if values is not None:
            self._lanes_agree(region, offsets, values)
        cells, epoch = region.shadow.cells(addresses, size), len(self._epochs) - 1
        for kind, found in region.shadow.rivals(operation, cells, epoch):
            racing = ~np.isin(found, [0, *self._own, *self._ordered])
            if kind == operation == "store" and self.session.allow_double_writes and values is not None:
                racing &= (region.shadow.current(addresses, size) != values.view(f"u{size}"))[:, None]
            if racing.any():
                other = self._epochs[int(found[racing][0])]
                what = f"{DOING[operation]} what program {other} {DONE[kind]} in the same launch"
                self._fault("race", region, int(offsets[racing.any(axis=1)][0]), what, other)
        region.shadow.mark(operation, cells, epoch)

    def _lanes_agree(self, region: Region, offsets: Array, values: Array) -> None:
        """Two lanes of one store may hit one element only with the same bits: which one lands is not defined."""
        slots = (offsets - offsets.min()) // values.itemsize
        last = np.empty(int(slots.max()) + 1, dtype=np.int64)
        last[slots] = np.arange(slots.size)
        bits = values.view(f"u{values.itemsize}")
        clash = bits != bits[last[slots]]
        if clash.any():
            what = "stores different values from two lanes at once"
            self._fault("race", region, int(offsets[clash][0]), what, self.program)

    def _fault(self, operation: str, region: Region | None, offset: int, what: str, other: Program | None = None) -> NoReturn:
        head = f"{self.kernel}: program {self.program} {what}"
        if region is None:
            raise KernelFault(self.kernel, operation, None, None, None, self.program, head, other)
        element = offset // region.itemsize
        message = f"{head}: element {element} of {region.name!r} (byte {offset}; the tensor has {region.nbytes})"
        raise KernelFault(self.kernel, operation, region.name, offset, element, self.program, message, other)

    def failed_assertion(self, message: str) -> NoReturn:
        """A `tl.device_assert` or `tl.assume` that did not hold."""
        self._fault("assert", None, 0, f"fails its assertion: {message}")

    def report(self, fault: KernelFault | None) -> LaunchReport:
        """The line for the session's log."""
        lanes = self.lanes
        return LaunchReport(self.kernel, self.grid, lanes["load"], lanes["store"], lanes["atomic"], fault)
