"""The stack machine that pickles are programs for, with no way to run anything: opcodes, no meanings of names.

Stack, marks and memo work as in CPython's `pickletools`. What a name, a call (REDUCE) or a change (BUILD) means is the subclass's
business (`unpickle.py`); every opcode that is not in the table below is refused by name.
"""

from __future__ import annotations

import codecs
import mmap
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

_SLACK = 256 << 20  # bytes of Python objects any file may make, beside _PER_BYTE for each of its own
_PER_BYTE = 4
LAZY = 1 << 16  # longer text is decoded only when asked for
_INT_BYTES = 32


class UnsafePickle(ValueError):
    """A pickle that is refused, or is none: the message names the file, the place, and what it asked for."""


class Raw:
    """Bytes or text of the file, not yet read: `kind` says what they are when they end up as data."""

    __slots__ = ("buffer", "kind", "start", "stop", "value")

    def __init__(self, buffer: bytes | mmap.mmap | memoryview, start: int, stop: int, kind: str) -> None:
        self.buffer, self.start, self.stop, self.kind = buffer, start, stop, kind
        self.value: Any = None

    def __len__(self) -> int:
        return self.stop - self.start

    def settle(self) -> Any:
        if self.value is None:
            self.value = _DECODERS[self.kind](bytes(self.buffer[self.start : self.stop]))
        return self.value


_NUMBERS = {np.dtype(code).type for code in "?bBhHiIlLqQefdgFDG"}
PLAIN = {str, int, float, bool, complex, type(None), bytes, bytearray, set, frozenset, np.str_, np.bytes_} | _NUMBERS
_KEYS = PLAIN - {bytearray, set, frozenset}


class Machine:
    """Runs one pickle; `where` names it in messages."""

    def __init__(self, data: bytes | mmap.mmap, where: str) -> None:
        self.data, self.where, self.end = data, where, len(data)
        self.pos = self.op_at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = _SLACK + _PER_BYTE * self.end

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
                self.fail("is no valid pickle: it does not end with one object")
            if self.pos != self.end:
                self.fail(f"holds more than one pickle: {self.end - self.pos:,} bytes follow the first")
            return self.finish(self.stack.pop())
        except UnsafePickle:
            raise
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            name = names.get(op, f"0x{op:02x}")
            self.fail(
                f"is no valid pickle: {name} at byte {self.op_at:,} does not fit ({type(error).__name__}: {error})"
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
                f"claims too much: its objects would take over {_SLACK >> 20} MiB and {_PER_BYTE} times its own size"
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
        self.stack.append(Raw(self.data, start, self.pos, kind))

    def unicode(self, size: struct.Struct) -> None:
        n = self.number(size)
        start = self.take(n)
        if n > LAZY:
            self.stack.append(Raw(self.data, start, self.pos, "text"))
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
        if type(value) is Raw and value.kind != "bytearray":
            self.charge(len(value))
            return value.settle()
        if type(value) is tuple and not any(type(part) is tuple for part in value):
            self.charge(16 * len(value))
            return tuple(self.key(part) for part in value)
        if type(value) not in _KEYS:
            raise TypeError(f"{kind(value)} as a dictionary key or set member")
        return value

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(pairs) % 2:
            raise TypeError(f"items set on {kind(target)}")
        self.charge(48 * len(pairs))
        for at in range(0, len(pairs), 2):
            target[self.key(pairs[at])] = pairs[at + 1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"items appended to {kind(target)}")
        target.extend(items)

    def members(self, items: Any) -> set[Any]:
        if type(items) not in (list, tuple):
            raise TypeError(f"a set of {kind(items)}")
        self.charge(100 * len(items))
        return {self.key(item) for item in items}

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    # What names mean

    def name(self, module: Any, name: Any) -> None:
        """Push what the name stands for, or refuse it."""
        raise NotImplementedError

    def reduce(self) -> None:
        """REDUCE: a call of the name below the top with the tuple on top."""
        raise NotImplementedError

    def build(self) -> None:
        """BUILD: the state on top given to what lies below it."""
        raise NotImplementedError

    def finish(self, root: Any) -> Any:
        """The object that was built, fit to leave the machine."""
        raise NotImplementedError


def kind(value: Any) -> str:
    """What `value` is, for messages."""
    return "bytes" if type(value) is Raw else value.what() if hasattr(value, "what") else f"a {type(value).__name__}"


def shown(value: Any) -> str:
    text = (
        value if isinstance(value, str) and value.isprintable() else ascii(value) if type(value) is not Raw else "bytes"
    )
    return text if len(text) <= 100 else f"{text[:100]}…"


def _text(raw: bytes) -> str:
    """UTF-8 text; halves of surrogate pairs, which pickle may write, are joined, or replaced where one is alone."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        halves = raw.decode("utf-8", "surrogatepass")
        return halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def old_text(raw: bytes) -> str:
    """Text that nobody named the encoding of: UTF-8, else Windows-1252, else Latin-1."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def _line_string(machine: Machine) -> None:
    """STRING: Python 2's `repr` of a byte string."""
    line = machine.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
        raise ValueError("a string without quotes")
    machine.charge(2 * len(line))
    held = codecs.escape_decode(line[1:-1])[0]
    machine.stack.append(Raw(held, 0, len(held), "str2"))


def _line_unicode(machine: Machine) -> None:
    line = machine.line()
    machine.charge(4 * len(line))
    halves = line.decode("raw-unicode-escape")
    machine.stack.append(halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def _int(machine: Machine) -> None:
    value = machine.decimal()
    line = machine.data[machine.op_at + 1 : machine.pos - 1]
    machine.stack.append(value if line not in (b"00", b"01") else value == 1)


def _long(machine: Machine, size: struct.Struct) -> None:
    n = machine.number(size)
    if n > _INT_BYTES:
        machine.fail(f"claims too much: an integer of {n:,} bytes at byte {machine.op_at:,}")
    start = machine.take(n)
    machine.stack.append(int.from_bytes(machine.data[start : start + n], "little", signed=True))


def _float_line(machine: Machine) -> None:
    line = machine.line()
    if len(line) > 80:
        raise ValueError("a number of over 80 characters")
    machine.stack.append(float(line))


def _protocol(machine: Machine) -> None:
    if (version := machine.number(_U1)) > 5:
        machine.fail(f"is written in pickle protocol {version}; 0 to 5 are known")


def _frame(machine: Machine) -> None:
    n = machine.number(_U8)
    if n > machine.end - machine.pos:
        machine.fail(
            f"is truncated: a frame of {n:,} bytes at byte {machine.op_at:,}, {machine.end - machine.pos:,} are left"
        )


def _global(machine: Machine) -> None:
    module, name = (machine.line().decode("utf-8", "backslashreplace") for _ in range(2))
    machine.name(module, name)


def _inst(machine: Machine) -> None:
    module, name = (machine.line().decode("utf-8", "backslashreplace") for _ in range(2))
    machine.refuse(f"{shown(module)}.{shown(name)} (INST)")


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


def _dict(machine: Machine) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    machine.set_items(items)


def _set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _add_items(machine: Machine) -> None:
    items = machine.to_mark()
    if type(machine.stack[-1]) is not set:
        raise TypeError(f"members added to {kind(machine.stack[-1])}")
    machine.stack[-1].update(machine.members(items))


def _pop(machine: Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _refused(name: str) -> Callable[[Machine], NoReturn]:
    return lambda machine: machine.refuse(f"opcode {name}")


_DECODERS: dict[str, Callable[[bytes], Any]] = {"str2": old_text, "text": _text, "bytes": bytes, "bytearray": bytearray}
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
_TABLE: tuple[tuple[str, bytes, Callable[[Machine], Any], int], ...] = (
    ("PROTO", b"\x80", _protocol, 0),
    ("FRAME", b"\x95", _frame, 0),
    ("STOP", b".", lambda m: None, 0),
    ("MARK", b"(", lambda m: m.marks.append(len(m.stack)), 40),
    ("POP", b"0", _pop, 0),
    ("POP_MARK", b"1", lambda m: m.to_mark(), 0),
    ("DUP", b"2", lambda m: m.stack.append(m.stack[-1]), 8),
    ("NONE", b"N", lambda m: m.stack.append(None), 8),
    ("NEWTRUE", b"\x88", lambda m: m.stack.append(True), 8),
    ("NEWFALSE", b"\x89", lambda m: m.stack.append(False), 8),
    ("INT", b"I", _int, 48),
    ("BININT", b"J", lambda m: m.stack.append(m.number(_I4)), 40),
    ("BININT1", b"K", lambda m: m.stack.append(m.number(_U1)), 8),
    ("BININT2", b"M", lambda m: m.stack.append(m.number(_U2)), 40),
    ("LONG", b"L", lambda m: m.stack.append(m.decimal()), 64),
    ("LONG1", b"\x8a", lambda m: _long(m, _U1), 64),
    ("LONG4", b"\x8b", lambda m: _long(m, _I4), 64),
    ("FLOAT", b"F", _float_line, 32),
    ("BINFLOAT", b"G", lambda m: m.stack.append(m.number(_F8)), 32),
    ("STRING", b"S", _line_string, 200),
    ("BINSTRING", b"T", lambda m: m.raw(_I4, "str2"), 200),
    ("SHORT_BINSTRING", b"U", lambda m: m.raw(_U1, "str2"), 200),
    ("BINBYTES", b"B", lambda m: m.raw(_U4, "bytes"), 200),
    ("SHORT_BINBYTES", b"C", lambda m: m.raw(_U1, "bytes"), 200),
    ("BINBYTES8", b"\x8e", lambda m: m.raw(_U8, "bytes"), 200),
    ("BYTEARRAY8", b"\x96", lambda m: m.raw(_U8, "bytearray"), 200),
    ("UNICODE", b"V", _line_unicode, 64),
    ("BINUNICODE", b"X", lambda m: m.unicode(_U4), 16),
    ("SHORT_BINUNICODE", b"\x8c", lambda m: m.unicode(_U1), 16),
    ("BINUNICODE8", b"\x8d", lambda m: m.unicode(_U8), 16),
    ("EMPTY_LIST", b"]", lambda m: m.stack.append([]), 300),
    ("LIST", b"l", lambda m: m.stack.append(m.to_mark()), 300),
    ("APPEND", b"a", lambda m: m.extend([m.stack.pop()]), 8),
    ("APPENDS", b"e", lambda m: m.extend(m.to_mark()), 0),
    ("EMPTY_TUPLE", b")", lambda m: m.stack.append(()), 8),
    ("TUPLE", b"t", lambda m: m.stack.append(tuple(m.to_mark())), 300),
    ("TUPLE1", b"\x85", lambda m: m.tuple_of(1), 300),
    ("TUPLE2", b"\x86", lambda m: m.tuple_of(2), 300),
    ("TUPLE3", b"\x87", lambda m: m.tuple_of(3), 300),
    ("EMPTY_DICT", b"}", lambda m: m.stack.append({}), 300),
    ("DICT", b"d", _dict, 300),
    ("SETITEM", b"s", _set_item, 0),
    ("SETITEMS", b"u", lambda m: m.set_items(m.to_mark()), 0),
    ("EMPTY_SET", b"\x8f", lambda m: m.stack.append(set()), 240),
    ("ADDITEMS", b"\x90", _add_items, 0),
    ("FROZENSET", b"\x91", lambda m: m.stack.append(frozenset(m.members(m.to_mark()))), 240),
    ("GET", b"g", lambda m: m.get(m.decimal()), 8),
    ("BINGET", b"h", lambda m: m.get(m.number(_U1)), 8),
    ("LONG_BINGET", b"j", lambda m: m.get(m.number(_U4)), 8),
    ("PUT", b"p", lambda m: m.put(m.decimal()), 100),
    ("BINPUT", b"q", lambda m: m.put(m.number(_U1)), 100),
    ("LONG_BINPUT", b"r", lambda m: m.put(m.number(_U4)), 100),
    ("MEMOIZE", b"\x94", lambda m: m.put(len(m.memo)), 100),
    ("GLOBAL", b"c", _global, 64),
    ("STACK_GLOBAL", b"\x93", _stack_global, 64),
    ("INST", b"i", _inst, 0),
    ("REDUCE", b"R", lambda m: m.reduce(), 300),
    ("BUILD", b"b", lambda m: m.build(), 100),
    *((name, code, _refused(name), 0) for name, code in _REFUSED.items()),
)
_STEPS: list[Callable[[Machine], Any]] = [_refused(f"0x{code:02x}") for code in range(256)]
_COSTS = [0] * 256
_OPCODES = {code[0]: name for name, code, _, _ in _TABLE}
for _, _code, _step, _cost in _TABLE:
    _STEPS[_code[0]], _COSTS[_code[0]] = _step, _cost
