"""Functions taken apart: what stays the same from step to step, and the arrays that do not.

A loss is often a closure made anew for each batch, ``lambda params: loss(params, batch)``. As an
object it is new at every step, and a compiled program that takes it would be compiled anew. Its
code is the same, though, and so is all that it refers to, but for arrays.

In: a function. Out: a ``Closure``, which compares equal where code and constants are equal, and the
arrays. Both together give the function back.

Equal must mean that the same program comes of it. So everything that the code can reach is looked
at: cells, defaults, the globals that it names, and the functions among them, unless they belong to
another module. What may change without notice (an object with attributes, say) makes the function
one that cannot be taken apart. It is then compared as an object.
"""

import dataclasses
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from optalr.signals.composite import CompositeLoss

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, np.dtype)
# Functions that Python code of the user cannot change from step to step.
_COMPILED = (types.BuiltinFunctionType, np.ufunc, type(jax.jit(lambda: None)))


@dataclasses.dataclass(frozen=True)
class Closure:
    """A function but for the arrays that it holds.

    Attributes:
      part: the function's parts.
      places: where in them the arrays stand.
    """

    part: "_Part"
    places: tuple[str, ...]

    def function(self, arrays: Sequence[Any]) -> Any:
        """Return the function with these arrays in their places."""
        return self.part.build(iter(arrays))


def take_apart(function: Any) -> tuple[Closure, tuple[Any, ...]] | None:
    """Return a function as a ``Closure`` and its arrays; None where it cannot be taken apart."""
    taker = _Taker()
    try:
        part = taker.part(function, "")
    except _OpaqueError:
        return None
    return Closure(part, tuple(taker.places)), tuple(taker.arrays)


class _OpaqueError(Exception):
    """Something that may change without notice."""


@dataclasses.dataclass(frozen=True)
class _Same:
    """An object that equals itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A value in parts.

    Attributes:
      key: what is compared, beside the parts.
      parts: what the value holds.
      original: the value; it is given back as it is where it holds no arrays.
      assemble: makes a value of the original and its parts, built.
      num_arrays: how many arrays it holds.
    """

    key: Any
    parts: tuple["_Part", ...] = ()
    original: Any = dataclasses.field(default=None, compare=False)
    assemble: Callable[[Any, list[Any]], Any] | None = dataclasses.field(
        default=None, compare=False
    )
    num_arrays: int = 0

    def build(self, arrays: Iterator[Any]) -> Any:
        """Return the value, with the next arrays in their places."""
        if self.num_arrays == 0:
            return self.original
        if self.assemble is None:
            return next(arrays)
        return self.assemble(self.original, [part.build(arrays) for part in self.parts])


class _Taker:
    """Takes values apart and gathers their arrays."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.places: list[str] = []
        # The functions on the way to the value, by which a function that meets itself is found.
        self.open: list[types.FunctionType] = []

    def part(self, value: Any, place: str) -> _Part:
        """Return a value's parts."""
        if isinstance(value, jax.Array | np.ndarray):
            return self._array(value, place)
        if isinstance(value, (np.generic, *_PLAIN)):
            return _Part((type(value), _plain_key(value)), original=value)
        if isinstance(value, (types.ModuleType, type, *_COMPILED)) or self._is_elsewhere(value):
            return _Part(_Same(value), original=value)
        if isinstance(value, types.FunctionType):
            return self._function(value, place)
        if isinstance(value, types.MethodType):
            held = {"function": value.__func__, "instance": value.__self__}
            return self._whole(_Kind(types.MethodType, value, _method), held, place)
        if isinstance(value, functools.partial):
            held = {"func": value.func, "args": value.args, "keywords": value.keywords}
            return self._whole(_Kind(type(value), value, _partial), held, place)
        if isinstance(value, CompositeLoss):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return self._whole(_Kind(CompositeLoss, value, _composite), fields, place)
        return self._tree(value, place)

    def _array(self, value: Any, place: str) -> _Part:
        # NumPy has arrays that jax has not: of strings, of objects, of records.
        if isinstance(value, np.ndarray) and (value.dtype.kind in "OSUMm" or value.dtype.names):
            raise _OpaqueError
        self.arrays.append(value)
        self.places.append(place)
        return _Part("array", num_arrays=1)

    def _whole(self, kind: "_Kind", held: dict[str, Any], place: str) -> _Part:
        """Return the parts of a value that holds others by name."""
        parts = tuple(self.part(value, f"{place}.{name}") for name, value in held.items())
        count = sum(part.num_arrays for part in parts)
        return _Part((kind.key, tuple(held)), parts, kind.original, kind.assemble, count)

    def _tree(self, value: Any, place: str) -> _Part:
        """Return the parts of a pytree, or of a leaf that says itself when it equals another."""
        leaves, treedef = jax.tree.flatten(value)
        if not jax.tree_util.treedef_is_leaf(treedef):
            kind = _Kind(treedef, value, lambda _, built: jax.tree.unflatten(treedef, built))
            return self._whole(kind, {str(i): leaf for i, leaf in enumerate(leaves)}, place)
        try:
            hash(value)
        except TypeError:
            raise _OpaqueError from None
        # Objects that are equal as objects only may have changed inside.
        if type(value).__eq__ is object.__eq__:
            raise _OpaqueError
        return _Part((type(value), value), original=value)

    def _function(self, value: types.FunctionType, place: str) -> _Part:
        if value in self.open or set(value.__dict__) - {"__wrapped__"}:
            raise _OpaqueError
        self.open.append(value)
        held = _held_by(value)
        kind = _Kind((value.__code__, _Same(value.__globals__)), value, _Remade(tuple(held)))
        part = self._whole(kind, held, place)
        self.open.pop()
        return part

    def _is_elsewhere(self, value: Any) -> bool:
        """Return whether a value is a name of another module, where it stands for good."""
        module = sys.modules.get(getattr(value, "__module__", None) or "")
        name = getattr(value, "__qualname__", None)
        # In a script and in a notebook globals are bound anew from step to step.
        if module is None or name is None or module.__name__ == "__main__":
            return False
        if any(vars(module) is function.__globals__ for function in self.open):
            return False
        found: Any = module
        for step in name.split("."):
            found = getattr(found, step, None)
        return found is value


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a value that holds others is compared and assembled; see ``_Part``."""

    key: Any
    original: Any
    assemble: Callable[[Any, list[Any]], Any]


def _held_by(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function's code can reach, each under a name that says how."""
    code, scope = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    try:
        held = {f"cell {name}": cell.cell_contents for name, cell in cells}
    except ValueError:  # a variable that has no value yet
        raise _OpaqueError from None
    held |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    held |= {f"keyword {name}": v for name, v in (function.__kwdefaults__ or {}).items()}
    names = sorted(_global_names(code, code.co_freevars) & scope.keys())
    return held | {f"global {name}": scope[name] for name in names}


def _global_names(code: types.CodeType, free: tuple[str, ...]) -> set[str]:
    """Return the globals that code names, also in the functions that it makes."""
    names: set[str] = set()
    for step in dis.get_instructions(code):
        writes = step.opname.startswith(("STORE", "DELETE"))
        # What is written would be written into a copy.
        if writes and ("GLOBAL" in step.opname or ("DEREF" in step.opname and step.argval in free)):
            raise _OpaqueError
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}:
            names.add(step.argval)
    inner = filter(inspect.iscode, code.co_consts)
    return names.union(*(_global_names(constant, free) for constant in inner))


@dataclasses.dataclass(frozen=True)
class _Remade:
    """Makes a function anew, with other values in the places that ``names`` name."""

    names: tuple[str, ...]

    def __call__(self, function: types.FunctionType, built: list[Any]) -> types.FunctionType:
        held = [(*name.split(" ", 1), value) for name, value in zip(self.names, built, strict=True)]
        of = {kind: {name: v for k, name, v in held if k == kind} for kind, _, _ in held}
        made = types.FunctionType(
            function.__code__,
            {**function.__globals__, **of.get("global", {})},
            function.__name__,
            tuple(of.get("default", {}).values()) or None,
            tuple(map(types.CellType, of.get("cell", {}).values())),
        )
        made.__kwdefaults__ = of.get("keyword") or None
        made.__dict__.update(function.__dict__)
        made.__module__, made.__qualname__ = function.__module__, function.__qualname__
        return made


def _method(_: Any, built: list[Any]) -> Any:
    return types.MethodType(*built)


def _partial(original: Any, built: list[Any]) -> Any:
    function, args, keywords = built
    return type(original)(function, *args, **keywords)


def _composite(_: Any, built: list[Any]) -> Any:
    return CompositeLoss(*built)


def _plain_key(value: Any) -> Any:
    # In Python 0.0 equals -0.0 and NaN is not itself.
    if isinstance(value, np.generic):
        return value.tobytes()
    return value.hex() if isinstance(value, float) else repr(value) if value != value else value
