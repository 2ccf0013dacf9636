"""What Triton's interpreter works out anew for each value of a kernel, remembered: types and shapes, by what they say.

An interpreted kernel spends half of its time making type objects, one for each result of each operation. They are never
changed once made, so values of one type share what describes it. Nothing here touches a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as stock_interpreter

_OWN = {"handle", "type"}
"""What each tensor has for itself."""


def install() -> None:
    """Replace the constructors of block types and tensors, and what types tuples and arrays, by remembering ones."""
    core = tl.core
    core.block_type.__init__ = _remembering_block_type(core.block_type.__init__)
    core.tensor.__init__ = _remembering_tensor(core.tensor.__init__)
    core._type_for_tuple_values = _remembering_tuple_type(core._type_for_tuple_values)
    stock_interpreter._get_np_dtype = _remembering_numpy_type(stock_interpreter._get_np_dtype)


def _remembering_block_type(stock: Callable[..., None]) -> Callable[..., None]:
    known: dict[object, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in known:
            stock(self, element_ty, shape)
            known[key] = self.__dict__.copy()
        else:
            self.__dict__.update(known[key])

    return init


def _remembering_tensor(stock: Callable[..., None]) -> Callable[..., None]:
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            stock(self, handle, type)
            known[type.name] = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        else:
            self.__dict__.update(known[type.name])
            self.handle, self.type = handle, type

    return init


def _remembering_tuple_type(stock: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[object, Any] = {}

    def type_for(values: Any, fields: Any = None) -> Any:
        if fields is not None or not all(type(v) is int or (type(v) is tl.constexpr and type(v.value) is int) for v in values):
            return stock(values, fields)
        key = tuple((type(v), getattr(v, "value", v)) for v in values)
        if key not in known:
            known[key] = stock(values)
        return known[key]

    return type_for


def _remembering_numpy_type(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = stock(dtype)
        return known[dtype.name]

    return numpy_type
