"""The pickle virtual machine without any way to run code: it executes opcodes and gives names no meaning.

Stack, marks and memo work as in CPython's `pickletools`. What a name, a call (REDUCE) or a change (BUILD) means is left to the
subclass in `unpickle.py`; every opcode that is not in the table below is refused by name.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

_FREE_BYTES = 256 << 20  # of Python objects that any file may make, and _BYTES_PER_FILE_BYTE more for each byte of it
_BYTES_PER_FILE_BYTE = 4
Decoder = Callable[[bytes], str]
LAZY = 1 << 16  # longer text is decoded only when asked for
_INT_BYTES = 32


class UnsafePickle(ValueError):
    """A pickle that is refused, or a file that is not a pickle: the message names the file, the byte, and what it asked for."""


class UndecodableTextError(ValueError):
    """A byte string of Python 2 that `decode` does not take for text; the message is that of its ValueError."""


def decode_utf_8(raw: bytes) -> str:
    """The text; what says nothing of its encoding is taken for nothing else."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error})") from None


class Undecoded:
    """Bytes or text of the file that are not decoded yet: `kind` says what they become when they end up as data."""

    __slots__ = ("buffer", "decode_text", "kind", "start", "stop", "value")

    def __init__(
        self,
        buffer: bytes | mmap.mmap | memoryview,
        start: int,
        stop: int,
        kind: str,
        decode_text: Decoder = decode_utf_8,
    ) -> None:
        self.buffer, self.start, self.stop, self.kind, self.decode_text = buffer, start, stop, kind, decode_text
        self.value: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    def decode(self) -> Any:
        if self.value is None:
            raw = bytes(self.buffer[self.start : self.stop])
            self.value = self._python_2_text(raw) if self.kind == "str2" else _DECODERS[self.kind](raw)
        return self.value

    def _python_2_text(self, raw: bytes) -> str:
        try:
            return self.decode_text(raw)
        except ValueError as error:
            raise UndecodableTextError(str(error)) from error


_NUMBERS = {np.dtype(code).type for code in "?bBhHiIlLqQefdgFDG"}
PLAIN = {str, int, float, bool, complex, type(None), bytes, bytearray, set, frozenset, np.str_, np.bytes_} | _NUMBERS
_KEYS = PLAIN - {bytearray, set, frozenset}


class PickleVM:
    """Runs one pickle; `where` names it in messages, `decode_text` reads Python 2's byte strings."""

    def __init__(self, data: bytes | mmap.mmap, where: str, decode_text: Decoder = decode_utf_8) -> None:
        self.data, self.where, self.decode_text, self.end = data, where, decode_text, len(data)
        self.pos = self.op_at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = _FREE_BYTES + _BYTES_PER_FILE_BYTE * self.end

    def run(self) -> Any:
        if not self.end:
            self.fail("is empty")
        data, steps, costs, names = self.data, _STEPS, _COSTS, _OPCODES
        op = 0
        try:
            while op != _STOP:
                self.op_at = self.pos
                if self.pos >= self.end:
                    self.fail("is truncated: it ends without a STOP")
                op = data[self.pos]
                self.pos += 1
                self.budget -= costs[op]
                if self.budget < 0:
                    self.charge(0)
                steps[op](self)
            if len(self.stack) != 1 or self.marks:
                self.fail("is not a valid pickle: it does not end with one object")
            if self.pos != self.end:
                self.fail(f"holds more than one pickle: {self.end - self.pos:,} bytes follow the first")
            return self.finish(self.stack.pop())
        except UnsafePickle:
            raise
        except UndecodableTextError as error:
            self.fail(f"holds text (before byte {self.pos:,}) that {error}")
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            name = names.get(op, f"0x{op:02x}")
            self.fail(
                f"is not a valid pickle: {name} at byte {self.op_at:,} does not fit ({type(error).__name__}: {error})"
            )

    def fail(self, fault: str) -> NoReturn:
        raise UnsafePickle(f"{self.where}: {fault}")

    def refuse(self, what: str) -> NoReturn:
        self.fail(
            f"refused: asks for {what} (byte {self.op_at:,}). Only numpy arrays and built-in containers, numbers and "
            "text are read from pickles; nothing of this file was run"
        )

    def charge(self, amount: int) -> None:
        self.budget -= amount
        if self.budget < 0:
            self.fail(
                f"claims too much: its objects would take over {_FREE_BYTES >> 20} MiB and {_BYTES_PER_FILE_BYTE} times its own size"
            )

    # Reading

    def take(self, n: int) -> int:
        """Step over `n` bytes that the file must hold; returns where they start."""
        start = self.pos
        if n < 0 or start + n > self.end:
            self.fail(f"is truncated: byte {self.op_at:,} claims {n:,} bytes, {self.end - start:,} are left")
        self.pos = start + n
        return start

    def number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self.data, self.take(form.size))[0]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.pos)
        if stop < 0:
            self.fail(f"is truncated: the line at byte {self.op_at:,} has no end")
        start, self.pos = self.pos, stop + 1
        return self.data[start:stop]

    def decimal(self) -> int:
        text = self.line().rstrip(b"L")
        if len(text) > 80:
            self.fail(f"claims too much: a number of {len(text):,} digits at byte {self.op_at:,}")
        return int(text)

    def raw(self, size: struct.Struct, kind: str) -> None:
        n = self.number(size)
        start = self.take(n)
        self.stack.append(Undecoded(self.data, start, self.pos, kind, self.decode_text))

    def unicode(self, size: struct.Struct) -> None:
        n = self.number(size)
        start = self.take(n)
        if n > LAZY:
            self.stack.append(Undecoded(self.data, start, self.pos, "text"))
            return
        text = _text(self.data[start : self.pos])
        self.charge(text.__sizeof__())
        self.stack.append(text)

    # Stack

    def to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise IndexError("pop from an empty stack")
        items = tuple(self.stack[len(self.stack) - n :])
        del self.stack[len(self.stack) - n :]
        self.stack.append(items)

    def key(self, value: Any) -> Any:
        """`value` as a dictionary key or set member: text, a number, or a tuple of these."""
        if type(value) is Undecoded and value.kind != "bytearray":
            self.charge(len(value))
            return value.decode()
        if type(value) is tuple and not any(type(part) is tuple for part in value):
            self.charge(16 * len(value))
            return tuple(self.key(part) for part in value)
        if type(value) not in _KEYS:
            raise TypeError(f"{type_name(value)} as a dictionary key or set member")
        return value

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(pairs) % 2:
            raise TypeError(f"items set on {type_name(target)}")
        self.charge(48 * len(pairs))
        for at in range(0, len(pairs), 2):
            target[self.key(pairs[at])] = pairs[at + 1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"items appended to {type_name(target)}")
        target.extend(items)

    def members(self, items: Any) -> set[Any]:
        if type(items) not in (list, tuple):
            raise TypeError(f"a set of {type_name(items)}")
        self.charge(100 * len(items))
        return {self.key(item) for item in items}

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    # What names mean

    def name(self, module: Any, name: Any) -> None:
        """GLOBAL, STACK_GLOBAL: push what the name stands for, or refuse it."""
        raise NotImplementedError

    def reduce(self) -> None:
        """REDUCE: a call of the name below the top with the tuple on top."""
        raise NotImplementedError

    def build(self) -> None:
        """BUILD: the state on top given to what lies below it."""
        raise NotImplementedError

    def finish(self, root: Any) -> Any:
        """The object that was built, fit to leave the vm."""
        raise NotImplementedError


def type_name(value: Any) -> str:
    """What `value` is, for messages."""
    return (
        "bytes"
        if type(value) is Undecoded
        else value.description()
        if hasattr(value, "description")
        else f"a {type(value).__name__}"
    )


def quoted(value: Any) -> str:
    text = (
        value
        if isinstance(value, str) and value.isprintable()
        else ascii(value)
        if type(value) is not Undecoded
        else "bytes"
    )
    return text if len(text) <= 100 else f"{text[:100]}…"


def _text(raw: bytes) -> str:
    """UTF-8 text; halves of surrogate pairs, which pickle may write, are joined, or replaced where one is alone."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        halves = raw.decode("utf-8", "surrogatepass")
        return halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _line_string(vm: PickleVM) -> None:
    """STRING: Python 2's `repr` of a byte string."""
    line = vm.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    vm.charge(2 * len(line))
    unescaped = codecs.escape_decode(line[1:-1])[0]
    vm.stack.append(Undecoded(unescaped, 0, len(unescaped), "str2", vm.decode_text))


def _line_unicode(vm: PickleVM) -> None:
    line = vm.line()
    vm.charge(4 * len(line))
    halves = line.decode("raw-unicode-escape")
    vm.stack.append(halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def _int(vm: PickleVM) -> None:
    value = vm.decimal()
    line = vm.data[vm.op_at + 1 : vm.pos - 1]
    vm.stack.append(value if line not in (b"00", b"01") else value == 1)


def _long(vm: PickleVM, size: struct.Struct) -> None:
    n = vm.number(size)
    if n > _INT_BYTES:
        vm.fail(f"claims too much: an integer of {n:,} bytes at byte {vm.op_at:,}")
    start = vm.take(n)
    vm.stack.append(int.from_bytes(vm.data[start : start + n], "little", signed=True))


def _float_line(vm: PickleVM) -> None:
    line = vm.line()
    if len(line) > 80:
        raise ValueError("a number of over 80 characters")
    vm.stack.append(float(line))


def _protocol(vm: PickleVM) -> None:
    if (version := vm.number(_U1)) > 5:
        vm.fail(f"is written in pickle protocol {version}; 0 to 5 are known")


def _frame(vm: PickleVM) -> None:
    n = vm.number(_U8)
    if n > vm.end - vm.pos:
        vm.fail(f"is truncated: a frame of {n:,} bytes at byte {vm.op_at:,}, {vm.end - vm.pos:,} are left")


def _global(vm: PickleVM) -> None:
    module, name = (vm.line().decode("utf-8", "backslashreplace") for _ in range(2))
    vm.name(module, name)


def _inst(vm: PickleVM) -> None:
    module, name = (vm.line().decode("utf-8", "backslashreplace") for _ in range(2))
    vm.refuse(f"{quoted(module)}.{quoted(name)} (INST)")


def _stack_global(vm: PickleVM) -> None:
    name, module = vm.stack.pop(), vm.stack.pop()
    vm.name(module, name)


def _dict(vm: PickleVM) -> None:
    items = vm.to_mark()
    vm.stack.append({})
    vm.set_items(items)


def _set_item(vm: PickleVM) -> None:
    value, key = vm.stack.pop(), vm.stack.pop()
    vm.set_items([key, value])


def _add_items(vm: PickleVM) -> None:
    items = vm.to_mark()
    if type(vm.stack[-1]) is not set:
        raise TypeError(f"members added to {type_name(vm.stack[-1])}")
    vm.stack[-1].update(vm.members(items))


def _pop(vm: PickleVM) -> None:
    if vm.marks and vm.marks[-1] == len(vm.stack):
        vm.marks.pop()
    else:
        vm.stack.pop()


def _refused(name: str) -> Callable[[PickleVM], NoReturn]:
    return lambda vm: vm.refuse(f"opcode {name}")


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "text": _text,
    "bytes": bytes,
    "bytearray": bytearray,
}
_U1, _U2, _U4, _U8, _I4, _F8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STOP = ord(".")
_REFUSED = {
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"\x98",
    "EXT1": b"\x82",
    "EXT2": b"\x83",
    "EXT4": b"\x84",
    "OBJ": b"o",
    "NEWOBJ": b"\x81",
    "NEWOBJ_EX": b"\x92",
    "PERSID": b"P",
    "BINPERSID": b"Q",
}
# name, code, what it does, estimated bytes of the Python objects it makes
_TABLE: tuple[tuple[str, bytes, Callable[[PickleVM], Any], int], ...] = (
    ("PROTO", b"\x80", _protocol, 0),
    ("FRAME", b"\x95", _frame, 0),
    ("STOP", b".", lambda vm: None, 0),
    ("MARK", b"(", lambda vm: vm.marks.append(len(vm.stack)), 40),
    ("POP", b"0", _pop, 0),
    ("POP_MARK", b"1", lambda vm: vm.to_mark(), 0),
    ("DUP", b"2", lambda vm: vm.stack.append(vm.stack[-1]), 8),
    ("NONE", b"N", lambda vm: vm.stack.append(None), 8),
    ("NEWTRUE", b"\x88", lambda vm: vm.stack.append(True), 8),
    ("NEWFALSE", b"\x89", lambda vm: vm.stack.append(False), 8),
    ("INT", b"I", _int, 48),
    ("BININT", b"J", lambda vm: vm.stack.append(vm.number(_I4)), 40),
    ("BININT1", b"K", lambda vm: vm.stack.append(vm.number(_U1)), 8),
    ("BININT2", b"M", lambda vm: vm.stack.append(vm.number(_U2)), 40),
    ("LONG", b"L", lambda vm: vm.stack.append(vm.decimal()), 64),
    ("LONG1", b"\x8a", lambda vm: _long(vm, _U1), 64),
    ("LONG4", b"\x8b", lambda vm: _long(vm, _I4), 64),
    ("FLOAT", b"F", _float_line, 32),
    ("BINFLOAT", b"G", lambda vm: vm.stack.append(vm.number(_F8)), 32),
    ("STRING", b"S", _line_string, 200),
    ("BINSTRING", b"T", lambda vm: vm.raw(_I4, "str2"), 200),
    ("SHORT_BINSTRING", b"U", lambda vm: vm.raw(_U1, "str2"), 200),
    ("BINBYTES", b"B", lambda vm: vm.raw(_U4, "bytes"), 200),
    ("SHORT_BINBYTES", b"C", lambda vm: vm.raw(_U1, "bytes"), 200),
    ("BINBYTES8", b"\x8e", lambda vm: vm.raw(_U8, "bytes"), 200),
    ("BYTEARRAY8", b"\x96", lambda vm: vm.raw(_U8, "bytearray"), 200),
    ("UNICODE", b"V", _line_unicode, 64),
    ("BINUNICODE", b"X", lambda vm: vm.unicode(_U4), 16),
    ("SHORT_BINUNICODE", b"\x8c", lambda vm: vm.unicode(_U1), 16),
    ("BINUNICODE8", b"\x8d", lambda vm: vm.unicode(_U8), 16),
    ("EMPTY_LIST", b"]", lambda vm: vm.stack.append([]), 300),
    ("LIST", b"l", lambda vm: vm.stack.append(vm.to_mark()), 300),
    ("APPEND", b"a", lambda vm: vm.extend([vm.stack.pop()]), 8),
    ("APPENDS", b"e", lambda vm: vm.extend(vm.to_mark()), 0),
    ("EMPTY_TUPLE", b")", lambda vm: vm.stack.append(()), 8),
    ("TUPLE", b"t", lambda vm: vm.stack.append(tuple(vm.to_mark())), 300),
    ("TUPLE1", b"\x85", lambda vm: vm.tuple_of(1), 300),
    ("TUPLE2", b"\x86", lambda vm: vm.tuple_of(2), 300),
    ("TUPLE3", b"\x87", lambda vm: vm.tuple_of(3), 300),
    ("EMPTY_DICT", b"}", lambda vm: vm.stack.append({}), 300),
    ("DICT", b"d", _dict, 300),
    ("SETITEM", b"s", _set_item, 0),
    ("SETITEMS", b"u", lambda vm: vm.set_items(vm.to_mark()), 0),
    ("EMPTY_SET", b"\x8f", lambda vm: vm.stack.append(set()), 240),
    ("ADDITEMS", b"\x90", _add_items, 0),
    ("FROZENSET", b"\x91", lambda vm: vm.stack.append(frozenset(vm.members(vm.to_mark()))), 240),
    ("GET", b"g", lambda vm: vm.get(vm.decimal()), 8),
    ("BINGET", b"h", lambda vm: vm.get(vm.number(_U1)), 8),
    ("LONG_BINGET", b"j", lambda vm: vm.get(vm.number(_U4)), 8),
    ("PUT", b"p", lambda vm: vm.put(vm.decimal()), 100),
    ("BINPUT", b"q", lambda vm: vm.put(vm.number(_U1)), 100),
    ("LONG_BINPUT", b"r", lambda vm: vm.put(vm.number(_U4)), 100),
    ("MEMOIZE", b"\x94", lambda vm: vm.put(len(vm.memo)), 100),
    ("GLOBAL", b"c", _global, 64),
    ("STACK_GLOBAL", b"\x93", _stack_global, 64),
    ("INST", b"i", _inst, 0),
    ("REDUCE", b"R", lambda vm: vm.reduce(), 300),
    ("BUILD", b"b", lambda vm: vm.build(), 100),
    *((name, code, _refused(name), 0) for name, code in _REFUSED.items()),
)
_STEPS: list[Callable[[PickleVM], Any]] = [_refused(f"0x{code:02x}") for code in range(256)]
_COSTS = [0] * 256
_OPCODES = {code[0]: name for name, code, _, _ in _TABLE}
for _, _code, _step, _cost in _TABLE:
    _STEPS[_code[0]], _COSTS[_code[0]] = _step, _cost
