"""Reading published pickles without running anything of them.

A pickle is a program for a small stack vm. Python's own unpicklers, restricted by `find_class`, still call what the
file names with what the file gives, and reserve what it claims. Here is a machine of our own instead (`pickle_machine.py`): names
stay symbols to which only an exact list of (module, name) pairs gives a meaning, the meanings are written below, and no function is
ever looked up, imported or called for the file. So the first thing outside the list ends the reading before anything ran, and what
came before it built only plain containers.

The file is memory-mapped, and arrays are read-only views of the map: nothing is copied, nothing is allocated that the file does not
hold, and a file of many GB opens in the time its opcodes take (about a million a second; an array is some thirty of them).
The memory of all other Python objects is estimated and bounded by the file's size.

Sources: the opcodes as in CPython's `pickletools`; a fixed list of allowed calls as in `torch._weights_only_unpickler`.
"""

from __future__ import annotations

import codecs
import math
import mmap
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.pickles.pickle_vm import (
    LAZY,
    PLAIN,
    Decoder,
    PickleVM,
    Undecoded,
    UnsafePickle,
    decode_utf_8,
    quoted,
    type_name,
)

__all__ = ["ALLOWED", "UnsafePickle", "load_pickle", "loads"]

_EXPANSION = 32  # a tree written out in full may be this many times the file
_DTYPE = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SU]\d{1,9}|O[48]?)")


def load_pickle(path: str | Path, decode_text: Decoder = decode_utf_8) -> Any:
    """The plain data in the pickle at `path`: arrays, containers, numbers and text.

    Arrays are read-only views of the file (perhaps unaligned, perhaps big-endian). `decode_text` makes text of Python 2's
    byte strings, or raises a ValueError that says why it is none.

    Raises:
        UnsafePickle: it asks for anything but numpy arrays, built-in containers and scalars; or it is truncated, claims
            more than it holds, contains itself, or has text in an unknown encoding.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            empty = path.stat().st_size == 0
            data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UnsafePickle(f"{path}: cannot be read: {error}") from error
    return loads(data, str(path), decode_text)


def loads(data: bytes | mmap.mmap, where: str = "pickle", decode_text: Decoder = decode_utf_8) -> Any:
    """:func:`load_pickle` of `data` in memory; `where` names it in messages."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # escapes in strings that Python does not know stay as they are
        return _Unpickler(data, where, decode_text).run()


class _Symbol:
    """One of the listed names, as the file wrote it."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def description(self) -> str:
        return f"{self.module}.{self.name}"


class _DType:
    """A dtype under construction: REDUCE names it, BUILD gives the byte order."""

    __slots__ = ("built", "dtype")

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype, self.built = dtype, False

    def description(self) -> str:
        return "a numpy dtype"


class _Array:
    """An array under construction: REDUCE makes it, BUILD fills it."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def description(self) -> str:
        return "a numpy array"


class _Unpickler(PickleVM):
    def name(self, module: Any, name: Any) -> None:
        if (module, name) not in ALLOWED:
            self.refuse(f"{quoted(module)}.{quoted(name)}")
        self.stack.append(_Symbol(module, name))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Symbol or type(args) is not tuple:
            self.refuse(f"a call of {type_name(function)}")
        self.stack.append(_MEANINGS[function.module, function.name](self, *args))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is _DType:
            self.build_dtype(target, state)
        elif type(target) is _Array:
            if target.value is not None:
                self.refuse("a second filling of an array")
            shape, dtype, fortran, content = state[-4:]
            if type(dtype) is not _DType or len(state) not in (4, 5):
                raise TypeError("an array's state")
            target.value = self.array(content, dtype.dtype, shape, "F" if fortran else "C")
        else:
            self.refuse(f"a change of {type_name(target)} (BUILD)")

    def build_dtype(self, target: _DType, state: Any) -> None:
        if target.built or len(state) not in (6, 7, 8, 9):
            self.refuse("a dtype's state other than numpy writes it")
        order, sub, names, fields = (self.string(part) if type(part) is Undecoded else part for part in state[1:5])
        if (sub, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            self.refuse("a structured dtype")
        target.dtype, target.built = np.dtype(order + target.dtype.str[1:]), True

    def string(self, value: Any) -> str:
        if type(value) is Undecoded and len(value) < LAZY:
            value = value.decode()
        if type(value) is not str:
            raise TypeError(f"{type_name(value)} in place of a string")
        return value

    def new_array(self, subtype: Any, *_: Any) -> _Array:
        if type(subtype) is not _Symbol or (subtype.module, subtype.name) != ("numpy", "ndarray"):
            self.refuse(f"an array of class {type_name(subtype)}")
        return _Array()

    def new_dtype(self, code: Any, *_: Any) -> _DType:
        code = self.string(code)
        if not _DTYPE.fullmatch(code):
            self.refuse(f"dtype {quoted(code)}")
        return _DType(np.dtype("O" if "O" in code else code))

    def array(self, content: Any, dtype: np.dtype, shape: Any, order: str) -> np.ndarray:
        """The array of `shape` whose bytes (object dtype: whose list) the file holds, exactly as many as the shape needs."""
        shape = (shape,) if type(shape) is int else shape
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n <= self.end for n in shape):
            self.fail(f"claims too much: an array of shape {quoted(shape)} at byte {self.op_at:,}")
        count = math.prod(shape)
        needs = count if dtype.hasobject else count * dtype.itemsize
        fits = (
            isinstance(content, list) if dtype.hasobject else isinstance(content, Undecoded) and content.kind != "text"
        )
        if not fits:
            raise TypeError(f"{type_name(content)} as the content of an array of type {dtype}")
        if len(content) != needs:
            self.fail(
                f"claims too much: an array of shape {quoted(shape)} and type {dtype} at byte {self.op_at:,} needs "
                f"{needs:,} {'objects' if dtype.hasobject else 'bytes'}, the file gives {len(content):,}"
            )
        if dtype.hasobject or not needs:
            self.charge(8 * count)
            flat = np.fromiter(content, dtype, count) if needs else np.zeros(count, dtype)
            return flat.reshape(shape)  # numpy lists objects in C order, whatever the array's own
        flat = np.frombuffer(content.buffer, dtype, count, content.start)
        if dtype.kind == "U":
            points = np.frombuffer(content.buffer, np.dtype(f"{dtype.str[0]}u4"), needs // 4, content.start)
            if points.max() > 0x10FFFF:
                self.fail(f"is not a valid pickle: the text array at byte {self.op_at:,} does not hold text")
        return flat.reshape(shape, order="F" if order == "F" else "C")

    def scalar(self, dtype: Any, content: Any) -> Any:
        if type(dtype) is not _DType or dtype.dtype.hasobject:
            self.refuse("an object hidden in a numpy scalar")
        self.charge(len(content))
        return self.array(content, dtype.dtype, (1,), "C")[0]

    def frombuffer(self, content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
        if type(dtype) is not _DType or dtype.dtype.hasobject:
            self.refuse("an object hidden in a numpy buffer")
        order = self.string(order)
        array = self.array(content, dtype.dtype, shape, order)
        return _Array(array.transpose(axes) if order == "K" and axes is not None else array)

    def encode(self, text: Any, encoding: Any) -> Undecoded:
        """Bytes that protocols 0 to 2 had to write as text, one character a byte."""
        if self.string(encoding) not in ("latin1", "latin-1"):
            self.refuse(f"_codecs.encode to {quoted(self.string(encoding))}")
        if type(text) is Undecoded and text.kind == "text":
            raw = bytearray()
            decoder = codecs.getincrementaldecoder("utf-8")()
            for start in range(text.start, text.stop, 1 << 24):
                stop = min(start + (1 << 24), text.stop)
                self.charge(stop - start)
                raw += decoder.decode(text.buffer[start:stop], stop == text.stop).encode("latin-1")
            return Undecoded(memoryview(raw).toreadonly(), 0, len(raw), "bytes")
        encoded = self.string(text).encode("latin-1")
        self.charge(len(encoded))
        return Undecoded(encoded, 0, len(encoded), "bytes")

    def new_bytearray(self, content: Any = None, encoding: Any = None) -> Undecoded:
        if content is None:
            return Undecoded(b"", 0, 0, "bytearray")
        content = content if encoding is None else self.encode(content, encoding)
        if type(content) is not Undecoded or content.kind not in ("bytes", "str2"):
            self.refuse(f"a bytearray of {type_name(content)}")
        return Undecoded(content.buffer, content.start, content.stop, "bytearray")

    def new_ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        self.charge(200 * len(pairs))
        return OrderedDict((self.key(key), value) for key, value in pairs)

    def new_complex(self, real: Any, imaginary: Any) -> complex:
        if type(real) is not float or type(imaginary) is not float:
            raise TypeError("a complex number of other than two floats")
        return complex(real, imaginary)

    # The result

    def finish(self, root: Any) -> Any:
        """`root` with everything under construction replaced by what it became, after proof that it is a tree that ends."""
        done: dict[int, tuple[Any, int]] = {}
        opened: set[int] = set()
        holder = [root]
        todo: list[tuple[Any, bool]] = [(holder, False)]
        while todo:
            item, closing = todo.pop()
            if closing:
                done[id(item)] = self.resolve(item, done)
            elif id(item) not in done:
                if id(item) in opened:
                    self.fail("contains itself: an object is among its own parts")
                opened.add(id(item))
                todo.append((item, True))
                todo.extend((child, False) for child in _children(item) if type(child) not in PLAIN)
        return holder[0]

    def resolve(self, item: Any, done: dict[int, tuple[Any, int]]) -> tuple[Any, int]:
        """What `item` became, and its size written out in full, once its parts are resolved."""
        size = 8

        def part(child: Any) -> Any:
            nonlocal size
            if type(child) in PLAIN:
                size += 8 if type(child) not in (str, bytes) else 8 + len(child)
                return child
            value, amount = done[id(child)]
            size += amount
            return value

        if type(item) is Undecoded:
            self.charge(len(item))
            return item.decode(), len(item)
        if type(item) is list:
            item[:] = [part(child) for child in item]
        elif isinstance(item, dict):
            for key, child in item.items():
                item[key] = part(child)
        elif type(item) is tuple:
            item = tuple(part(child) for child in item)
        elif type(item) is _Array and item.value is not None:
            item = item.value
            size += item.nbytes
            if item.dtype.hasobject:
                flat = item.reshape(-1, order="A")  # a view, whichever the order
                for at, child in enumerate(flat):
                    flat[at] = part(child)
        else:
            self.refuse(f"{type_name(item)} as data")
        if size > _EXPANSION * self.end + (64 << 20):
            self.fail(f"claims too much: written out in full it would be over {_EXPANSION} times its own size")
        return item, size


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    if type(item) is _Array:
        return item.value.flat if item.value is not None and item.value.dtype.hasobject else ()
    return item if type(item) in (list, tuple) else ()


_MEANINGS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _Unpickler.encode,
    ("collections", "OrderedDict"): _Unpickler.new_ordered,
    ("numpy", "dtype"): _Unpickler.new_dtype,
    ("numpy", "ndarray"): lambda vm, *_: vm.refuse("a call of numpy.ndarray"),
}
for _core in ("numpy.core", "numpy._core"):
    _MEANINGS[f"{_core}.multiarray", "_reconstruct"] = _Unpickler.new_array
    _MEANINGS[f"{_core}.multiarray", "scalar"] = _Unpickler.scalar
    _MEANINGS[f"{_core}.numeric", "_frombuffer"] = _Unpickler.frombuffer
for _builtins in ("builtins", "__builtin__"):
    _MEANINGS[_builtins, "set"] = lambda vm, items=(): vm.members(items)
    _MEANINGS[_builtins, "frozenset"] = lambda vm, items=(): frozenset(vm.members(items))
    _MEANINGS[_builtins, "bytes"] = lambda vm: Undecoded(b"", 0, 0, "bytes")  # empty: other bytes are _codecs.encode's
    _MEANINGS[_builtins, "bytearray"] = _Unpickler.new_bytearray
    _MEANINGS[_builtins, "complex"] = _Unpickler.new_complex

ALLOWED: frozenset[tuple[str, str]] = frozenset(_MEANINGS)
