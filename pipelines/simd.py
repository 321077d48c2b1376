"""What the compiled code of the pipelines is made with: `compiled` functions, and vector kernels.

numba leaves it to LLVM to find the vectors in a loop, and LLVM often does not: integers grow to 64 bits, arrays may overlap. A function
marked `@kernel(lanes)` is executed once, at compile time, with a `Lanes` and the addresses it was called with, and what it does to vectors
becomes straight-line code for whatever instruction set the machine has. Kernels take and return nothing but addresses and integers:
an array handed from one jitted function to another costs two atomic operations, which were more than half of a JPEG block's time.
The caller keeps the arrays alive, and sees to it that `lanes` elements exist at every address.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


@cache
def _sources() -> str:
    """A hash of every file here that holds compiled code."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        text = file.read_bytes()
        if b"@compiled" in text or b"@njit" in text or b"@kernel" in text:
            digest.update(text)
    return digest.hexdigest()


def compiled(function: F) -> F:
    """The function compiled by numba, run without the GIL, and kept on disk for the next process.

    Trap that this avoids: numba keeps a function's machine code, with all that it called inlined, until the file of that one function
    changes. A new version of a function in another file would go unnoticed; here any change to any of them compiles anew.
    """
    dispatcher: Any = njit(nogil=True, cache=True)(function)
    index = dispatcher._cache._cache_file
    if not hasattr(index, "_source_stamp"):
        raise RuntimeError("this numba keeps its cache in another way: install the version of constraints.txt")
    index._source_stamp = _sources()
    return dispatcher


@intrinsic
def _address(typing_context, array):  # type: ignore[no-untyped-def]
    """Where an array's first element lies, as int64."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, arguments[0]).data, ir.IntType(64))

    return types.int64(array), build


address: Any = _address  # numba binds the first argument


def _scalar(bits, returns, swapped=False):  # type: ignore[no-untyped-def]
    """An intrinsic that reads a number of so many bits at an address, or writes one where it returns nothing; `swapped`: big-endian."""

    def place(builder, at):  # type: ignore[no-untyped-def]
        return builder.inttoptr(at, ir.IntType(bits).as_pointer())

    @intrinsic
    def read(typing_context, at):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            word = builder.load(place(builder, arguments[0]), align=1)
            return builder.bswap(word) if swapped else word

        return returns(types.int64), build

    @intrinsic
    def write(typing_context, at, number):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            word = builder.trunc(arguments[1], ir.IntType(bits)) if bits < 64 else arguments[1]
            builder.store(builder.bswap(word) if swapped else word, place(builder, arguments[0]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64 if bits < 64 else types.uint64), build

    return write if returns is types.void else read


read_word, write_word = _scalar(64, types.uint64), _scalar(64, types.void)
read_word_big_endian, write_word_big_endian = _scalar(64, types.uint64, swapped=True), _scalar(64, types.void, swapped=True)
read_8, write_8 = _scalar(8, types.uint8), _scalar(8, types.void)
read_32, write_16 = _scalar(32, types.int32), _scalar(16, types.void)


class Vector:
    """Integers of one width, an operator at a time; the other operand is a Vector of that width or a plain number."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.builder, self.value = builder, value

    def _other(self, other: Vector | int) -> ir.Value:
        if isinstance(other, Vector):
            return other.value
        kind = self.value.type
        return ir.Constant(kind, [ir.Constant(kind.element, other)] * kind.count)

    def _apply(self, name: str, other: Vector | int) -> Vector:
        return Vector(self.builder, getattr(self.builder, name)(self.value, self._other(other)))

    def __add__(self, other: Vector | int) -> Vector:
        return self._apply("add", other)

    def __sub__(self, other: Vector | int) -> Vector:
        return self._apply("sub", other)

    def __mul__(self, other: Vector | int) -> Vector:
        return self._apply("mul", other)

    def __or__(self, other: Vector | int) -> Vector:
        return self._apply("or_", other)

    def __lshift__(self, other: int) -> Vector:
        return self._apply("shl", other)

    def __rshift__(self, other: int) -> Vector:
        return self._apply("ashr", other)

    def clamp(self, low: int, high: int) -> Vector:
        """Each lane at least low and at most high."""
        for limit, comparison in ((low, ">"), (high, "<")):
            kept = self.builder.icmp_signed(comparison, self.value, self._other(limit))
            self = Vector(self.builder, self.builder.select(kept, self.value, self._other(limit)))
        return self

    def widen(self, bits: int) -> Vector:
        """The same numbers, unsigned, in wider lanes."""
        return Vector(self.builder, self.builder.zext(self.value, ir.VectorType(ir.IntType(bits), self.value.type.count)))


class Lanes:
    """Vectors of `count` lanes from and to memory."""

    def __init__(self, builder: ir.IRBuilder, count: int):
        self.builder, self.count = builder, count

    def _place(self, at: ir.Value, bits: int) -> ir.Value:
        return self.builder.inttoptr(at, ir.VectorType(ir.IntType(bits), self.count).as_pointer())

    def offset(self, at: ir.Value, step: int | ir.Value, times: ir.Value | None = None) -> ir.Value:
        """The address `step` bytes on, or `times` times as many."""
        distance = ir.IntType(64)(step) if isinstance(step, int) else step
        return self.builder.add(at, distance if times is None else self.builder.mul(distance, times))

    def load(self, at: ir.Value, bits: int, into: int = 32, signed: bool = False) -> Vector:
        """`count` neighbours of so many bits, widened to `into` bits."""
        value = self.builder.load(self._place(at, bits), align=1)
        if into > bits:
            value = (self.builder.sext if signed else self.builder.zext)(value, ir.VectorType(ir.IntType(into), self.count))
        return Vector(self.builder, value)

    def number(self, at: ir.Value, bits: int) -> ir.Value:
        """One number from memory."""
        return self.builder.load(self.builder.inttoptr(at, ir.IntType(bits).as_pointer()), align=1)

    def constant(self, number: int, bits: int = 32) -> Vector:
        """A plain number in every lane."""
        return Vector(self.builder, ir.Constant(ir.VectorType(ir.IntType(bits), self.count), [ir.IntType(bits)(number)] * self.count))

    def splat(self, number: ir.Value, bits: int = 32) -> Vector:
        """One number in every lane."""
        if number.type.width > bits:
            number = self.builder.trunc(number, ir.IntType(bits))
        kind = ir.VectorType(number.type, self.count)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.count), None)
        return Vector(self.builder, self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros))

    def store(self, vector: Vector, at: ir.Value, bits: int) -> None:
        """The lower `bits` of each lane, side by side."""
        value, count = vector.value, vector.value.type.count
        if value.type.element.width > bits:
            value = self.builder.trunc(value, ir.VectorType(ir.IntType(bits), count))
        self.builder.store(value, self.builder.inttoptr(at, value.type.as_pointer()), align=1)

    def interleave(self, even: Vector, odd: Vector) -> Vector:
        """Twice as many lanes: even[0], odd[0], even[1], ..."""
        order = [ir.IntType(32)(lane + half * self.count) for lane in range(self.count) for half in (0, 1)]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * self.count), order)
        return Vector(self.builder, self.builder.shuffle_vector(even.value, odd.value, mask))

    def accumulate(self, times: ir.Value, start: Vector, term: Callable[[ir.Value], Vector]) -> Vector:
        """start + term(0) + ... + term(times - 1)."""
        total = cgutils.alloca_once_value(self.builder, start.value)
        with cgutils.for_range(self.builder, times) as loop:
            self.builder.store((Vector(self.builder, self.builder.load(total)) + term(loop.index)).value, total)
        return Vector(self.builder, self.builder.load(total))


def kernel(lanes: int) -> Callable[[Callable[..., None]], Any]:
    """Makes a function of (Lanes, int64, int64, ...) callable from jitted code with those integers."""

    def decorate(function: Callable[..., None]) -> Any:
        def typed(typing_context, *arguments):  # type: ignore[no-untyped-def]
            def build(context, builder, signature, values):  # type: ignore[no-untyped-def]
                function(Lanes(builder, lanes), *values)
                return context.get_dummy_value()

            return types.void(*[types.int64] * len(arguments)), build

        names = ["typing_context", *list(inspect.signature(function).parameters)[1:]]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        typed.__name__, typed.__signature__ = function.__name__, inspect.Signature(parameters)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate
