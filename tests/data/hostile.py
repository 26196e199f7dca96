"""Pickles that ask for more than plain data, claim more than they hold, or contain themselves."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *args: str) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(map(text, args)) + b"tR"


def stack_call(module: bytes, name: bytes, *args: str) -> bytes:
    return module + name + b"\x93(" + b"".join(map(text, args)) + b"tR"


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tB\x01\x00\x00\x00btR"
OBJECTS = (
    b"cnumpy\ndtype\n(X\x01\x00\x00\x00O\x89\x88tR(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
)


def zoo(command: str, code: str) -> dict[str, tuple[bytes, str]]:
    """Name -> pickle that would run `command` (a shell's) or `code` (Python's), and what the refusal must name."""
    honest = pickle.dumps([{"features": {"audio": np.ones((2, 3))}, "label": "joy"}], 2)[:-1]
    run = call("os", "system", command)
    return {
        "os.system": (run + b".", "os.system"),
        "posix.system": (call("posix", "system", command) + b".", "posix.system"),
        "subprocess": (call("subprocess", "getoutput", command) + b".", "subprocess.getoutput"),
        "builtins.eval": (call("builtins", "eval", code) + b".", "builtins.eval"),
        "python 2 eval": (call("__builtin__", "eval", code) + b".", "__builtin__.eval"),
        "builtins.exec": (call("builtins", "exec", code) + b".", "builtins.exec"),
        "getattr": (call("builtins", "getattr", "a", "upper") + b".", "builtins.getattr"),
        "import": (call("builtins", "__import__", "os") + b".", "builtins.__import__"),
        "numpy runstring": (
            f"cnumpy.testing._private.utils\nrunstring\n({text(code).decode()}}}tR.".encode(),
            "numpy.testing._private.utils.runstring",
        ),
        "numpy.load": (call("numpy", "load", "x.npy") + b".", "numpy.load"),
        "numpy.fromfile": (call("numpy._core.multiarray", "fromfile", "/etc/hosts") + b".", "fromfile"),
        "a dotted name": (stack_call(text("numpy"), text("f2py.crackfortran.os.system"), command) + b".", "f2py"),
        "a dotted listed name": (call("numpy", "ndarray.__class__", "a") + b".", "numpy.ndarray.__class__"),
        "a dotted module": (call("numpy.core", "multiarray._reconstruct", "a") + b".", "multiarray._reconstruct"),
        "dunder of a listed name": (call("collections", "OrderedDict.__init__.__globals__", "a") + b".", "__globals__"),
        "copyreg": (call("copyreg", "__newobj__", "a") + b".", "copyreg.__newobj__"),
        "reconstructor": (b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.", "_reconstructor"),
        "attrgetter": (call("operator", "attrgetter", "system") + b".", "operator.attrgetter"),
        "partial": (call("functools", "partial", "a") + b".", "functools.partial"),
        "pickle.loads": (call("pickle", "loads", "a") + b".", "pickle.loads"),
        "nested by _codecs": (call("_codecs", "encode", "a", "zlib") + b".", "_codecs.encode to zlib"),
        "STACK_GLOBAL": (b"\x80\x04" + stack_call(text("os"), text("system"), command) + b".", "os.system"),
        "memoised strings": (
            b"\x80\x04"
            + text("os")
            + b"\x94"
            + text("system")
            + b"\x940\x30"
            + stack_call(b"h\x00", b"h\x01", command)
            + b".",
            "os.system",
        ),
        "memo confusion": (
            text("os") + b"q\x000" + text("numpy") + b"\x940" + stack_call(b"h\x00", text("system"), command) + b".",
            "os.system",
        ),
        "STACK_GLOBAL of bytes": (b"\x80\x04" + stack_call(b"C\x02os", text("system"), command) + b".", "bytes.system"),
        "STACK_GLOBAL of a name": (b"\x80\x04" + stack_call(b"cnumpy\nndarray\n", text("x"), command) + b".", "x"),
        "a name with control signs": (b"cos\x1b[2J\nsystem\n.", r"os\\x1b\[2J"),
        "INST": (b"(" + text(command) + b"ios\nsystem\n.", r"os.system \(INST\)"),
        "INST of a listed name": (b"(icollections\nOrderedDict\n.", r"OrderedDict \(INST\)"),
        "OBJ": (b"(cos\nsystem\n" + text(command) + b"o.", "os.system"),
        "OBJ of a listed name": (b"(ccollections\nOrderedDict\no.", "opcode OBJ"),
        "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
        "PERSID": (b"Pos.system\n.", "opcode PERSID"),
        "BINPERSID": (text("os") + b"Q.", "opcode BINPERSID"),
        "EXT1": (b"\x82\xf0(" + text(command) + b"tR.", "opcode EXT1"),
        "EXT4": (b"\x84\xf0\x00\x00\x00(" + text(command) + b"tR.", "opcode EXT4"),
        "NEXT_BUFFER": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        "no opcode": (b"\xff.", "opcode 0xff"),
        "call of a string": (text("a") + b")R.", "a call of a str"),
        "call of a result": (b"ccollections\nOrderedDict\n)R)R.", "a call of a OrderedDict"),
        "call of numpy.ndarray": (b"cnumpy\nndarray\n(I99999999999\ntR.", "a call of numpy.ndarray"),
        "array of another class": (
            b"cnumpy._core.multiarray\n_reconstruct\n(ccollections\nOrderedDict\n(K\x00tNtR.",
            "class",
        ),
        "BUILD of a dict": (b"}}" + text("a") + b"K\x01sb.", r"a change of a dict \(BUILD\)"),
        "BUILD of a class": (
            b"cnumpy\nndarray\nN}" + text("__reduce__") + b"K\x01s\x86b.",
            "a change of numpy.ndarray",
        ),
        "BUILD of a mapping": (
            b"ccollections\nOrderedDict\n)R}" + text("update") + b"K\x01sb.",
            "a change of a OrderedDict",
        ),
        "pickle in a scalar": (
            b"cnumpy._core.multiarray\nscalar\n(" + OBJECTS + text(run + b".") + b"tR.",
            "an object hidden in a numpy scalar",
        ),
        "in an object array": (RECONSTRUCT + b"(K\x01(K\x01t" + OBJECTS + b"\x89(" + run + b"ltb.", "os.system"),
        "structured dtype": (b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8\x89\x88tR.", "dtype V8"),
        "a bare name": (b"]cnumpy\nndarray\na.", "numpy.ndarray as data"),
        "a bare dtype": (pickle.dumps(np.dtype("f4"), 2), "a numpy dtype as data"),
        "after honest data": (honest + run + b"a.", "os.system"),
        "a class of one's own": (
            pickle.dumps(pytest.Mark("a", (), {}, _ispytest=True), 2),
            "_pytest.mark.structures.Mark|copy_?reg",
        ),
        "a path": (pickle.dumps(Path("a"), 2), "pathlib"),
    }


def array_of(shape: bytes, dtype: bytes = b"X\x02\x00\x00\x00f4", content: bytes = b"C\x04abcd") -> bytes:
    return RECONSTRUCT + b"(K\x01" + shape + b"cnumpy\ndtype\n(" + dtype + b"\x89\x88tR\x89" + content + b"tb"


def laughs() -> bytes:
    """Ten of ten of ten …: a few bytes that written out would be 10**30 strings."""
    out = b"](" + text("ha" * 500) * 10 + b"eq\x00"
    for level in range(1, 30):
        out += b"0](" + (b"h" + bytes([level - 1])) * 10 + b"eq" + bytes([level])
    return out + b"."


THOUSAND = b"](" + b"N" * 1000 + b"eq\x00"
BOMBS = {
    "BINBYTES8": (b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc.", "truncated"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 1 << 40) + b"abc.", "truncated"),
    "BINUNICODE8": (b"\x8d" + struct.pack("<Q", (1 << 64) - 1) + b"abc.", "truncated"),
    "BINSTRING": (b"T" + struct.pack("<i", -1) + b"abc.", "truncated"),
    "FRAME": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.", "truncated"),
    "memo index": (b"Nr\xff\xff\xff\xff" * 3 + b"000]p99999999999999\n.", None),
    "LONG4": (b"\x8b\xff\xff\xff\x7f" + b"\xff" * 100 + b".", "claims too much"),
    "digits": (b"L" + b"9" * 1_000_000 + b"L\n.", "claims too much"),
    "shape": (array_of(b"(L1000000000000L\nt") + b".", "claims too much"),
    "shape product": (array_of(b"(M\xff\xffM\xff\xffM\xff\xfft") + b".", "claims too much"),
    "negative shape": (array_of(b"(J\xff\xff\xff\xfft") + b".", "claims too much"),
    "shape with 0": (array_of(b"(L1000000000000L\nK\x00t", content=b"C\x00") + b".", "claims too much"),
    "item size": (array_of(b"(K\x01t", b"X\x0a\x00\x00\x00S999999999") + b".", "claims too much"),
    "item size 0": (array_of(b"(" + b"K\x50" * 9 + b"t", b"X\x02\x00\x00\x00S0", b"C\x00") + b".", "claims too much"),
    "bytearray": (b"cbuiltins\nbytearray\n(L99999999999L\ntR.", "bytearray of a int"),
    "bytes": (b"cbuiltins\nbytes\n(L99999999999L\ntR.", "not a valid pickle"),
    "set of a range": (b"cbuiltins\nset\n(L99999999999L\ntR.", "not a valid pickle"),
    "laughs": (laughs(), "claims too much"),
    "sets": (b"](" + b"\x8f" * 3_000_000 + b"e.", "claims too much"),
    "nested lists": (b"]" * 2_000_000 + b"a" * 1_999_999 + b".", "claims too much"),
    "the same array": (
        b"](B"
        + struct.pack("<I", 4_000_000)
        + bytes(4_000_000)
        + b"q\x000"
        + array_of(b"(L1000000L\nt", content=b"h\x00")
        + b"q\x01"
        + b"h\x01" * 100_000
        + b"e.",
        "claims too much",
    ),
    "lists into object arrays": (
        THOUSAND + b"0](" + (RECONSTRUCT + b"(K\x01(M\xe8\x03t" + OBJECTS + b"\x89h\x00tb") * 40_000 + b"e.",
        "claims too much",
    ),
    "lists into sets": (
        b"]("
        + b"".join(b"M" + struct.pack("<H", n) for n in range(1000))
        + b"eq\x000]("
        + b"cbuiltins\nset\n(h\x00tR" * 200_000
        + b"e.",
        "claims too much",
    ),
    "text into bytes": (
        text("x" * 60_000)
        + b"q\x000"
        + text("latin1")
        + b"q\x010]("
        + b"c_codecs\nencode\n(h\x00h\x01tR" * 200_000
        + b"e.",
        "claims too much",
    ),
    "no end of names": (b"c" + b"a" * 5_000_000, "truncated"),
    "surrogates in a text array": (
        array_of(b"(K\x01t", b"X\x02\x00\x00\x00U1", b"C\x04\xff\xff\xff\xff") + b".",
        "not hold text",
    ),
}


LOOPS = {
    "a list": b"]q\x00h\x00a.",
    "a dict": b"}q\x00" + text("a") + b"h\x00s.",
    "a tuple in a list": b"]q\x00h\x00\x85a.",
    "two lists": b"]q\x00]q\x01h\x00a0h\x01a.",
    "an object array": RECONSTRUCT + b"q\x00(K\x01(K\x01t" + OBJECTS + b"\x89]h\x00atb.",
    "an object array through a list": b"]q\x00" + RECONSTRUCT + b"(K\x01(K\x01t" + OBJECTS + b"\x89]h\x00atba.",
}
