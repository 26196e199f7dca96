"""The restricted unpickler: honest pickles read as Python reads them, everything else refused with nothing run."""

from __future__ import annotations

import ast
import collections
import copyreg
import json
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data.hostile import BOMBS, LOOPS, RECONSTRUCT, array_of, zoo
from trainer.data.pickles import pickle_vm
from trainer.data.pickles.pickle_vm import decode_utf_8
from trainer.data.pickles.unpickle import ALLOWED, UnsafePickle, load_pickle, loads
from trainer.encodings import decode_text

GRID = np.arange(6, dtype=np.float32).reshape(2, 3)
HONEST = {
    "features": GRID,
    "fortran": np.asfortranarray(GRID),
    "strided": GRID[:, ::2],
    "permuted": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    "big-endian": np.array([1.5, -2.0], dtype=">f4"),
    "zero-size": np.zeros((0, 74), dtype=np.float32),
    "zero-dim": np.array(3.0),
    "bool": np.array([True, False]),
    "text-array": np.array(["ab", "中文", "😀"]),
    "empty-text-array": np.array([""]),
    "bytes-array": np.array([b"ab", b"c"]),
    "objects": np.array([["a", None], [[1, 2], GRID]], dtype=object),
    "objects-fortran": np.asfortranarray(np.array([["a", None], [[1], 2]], dtype=object)),
    "float32": np.float32(0.1),
    "int64": np.int64(-3),
    "bool_": np.bool_(True),
    "str_": np.str_("é"),
    "bytes_": np.bytes_(b"x"),
    "numbers": [0, 1, 255, 256, -1, 65536, 2**40, -(2**70), 1.5, float("inf"), True, False, None, 1 + 2j],
    "text": ["", "a", "é", "你好", "😀", "x" * 300, "long é" * 20_000, "line\nbreak\\", 'it\'s "quoted"'],
    "bytes": [b"", b"a", b"\x00\xff\n", bytes(range(256)) * 300, bytearray(b"ab"), bytearray()],
    "containers": [
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        [],
        {},
        {"a": {"b": [{}]}},
        set(),
        {1, "a"},
        frozenset([1]),
    ],
    "keys": {"a": 1, 2: 2, 3.5: 3, None: 4, True: 5, (1, "b"): 6, b"c": 7},
    "ordered": collections.OrderedDict(b=1, a=[2]),
    "many": [{"id": i, "text": f"row {i}", "x": np.full(3, i)} for i in range(1500)],
}


def same(got: object, expected: object) -> bool:
    """Equal in type, shape and value, all the way down; nan equals nan."""
    if type(got) is not type(expected):
        return False
    if isinstance(expected, np.ndarray):
        if got.dtype != expected.dtype or got.shape != expected.shape:  # type: ignore[attr-defined]
            return False
        if expected.dtype.hasobject:
            return all(same(a, b) for a, b in zip(got.ravel(), expected.ravel(), strict=True))  # type: ignore[attr-defined]
        return np.array_equal(got, expected)  # type: ignore[arg-type]
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(same(got[k], v) for k, v in expected.items())  # type: ignore
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same, got, expected))  # type: ignore[arg-type]
    return bool(got == expected)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HONEST)
def test_reads_what_python_wrote(name: str, protocol: int) -> None:
    assert same(loads(pickle.dumps(HONEST[name], protocol)), HONEST[name])


def as_numpy_1(data: bytes) -> bytes:
    """The pickle with the module names that numpy 1.x wrote, lengths and frame mended."""
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(b"\x8c" + bytes([len(new)]) + new, b"\x8c" + bytes([len(old)]) + old)
        data = data.replace(b"c" + new + b"\n", b"c" + old + b"\n")
    if data[2:3] == b"\x95":
        data = data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]
    return data


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["features", "fortran", "strided", "text-array", "objects", "float32"])
def test_reads_numpy_1_names(name: str, protocol: int) -> None:
    data = as_numpy_1(pickle.dumps(HONEST[name], protocol))
    assert b"numpy.core." in data
    assert b"numpy._core" not in data
    assert same(loads(data), HONEST[name])


FLOATS = struct.pack("<6f", *range(6))
PYTHON_2 = {  # as cPickle of Python 2.7 with numpy 1.16 writes {"text": str, "audio": float32 [2, 3], "n": 3L}
    2: b"\x80\x02}q\x01(U\x04textq\x02U\x05caf\xc3\xa9q\x03U\x05audioq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x08U\x02f4K\x00K\x01\x87Rq\x09"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x18" + FLOATS + b"tbU\x01n\x8a\x01\x03u.",
    0: b"(dp1\nS'text'\np2\nS'caf\\xc3\\xa9'\np3\nsS'audio'\np4\ncnumpy.core.multiarray\n_reconstruct\np5\n(cnumpy\nndarray\np6\n"
    b"(I0\ntS'b'\ntRp7\n(I1\n(I2\nI3\ntcnumpy\ndtype\np8\n(S'f4'\nI0\nI1\ntRp9\n(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'"
    + "".join(f"\\x{byte:02x}" for byte in FLOATS).encode()
    + b"'\ntbsS'n'\nL3L\ns.",
}


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_reads_python_2(protocol: int) -> None:
    content = loads(PYTHON_2[protocol])
    reference = pickle.loads(PYTHON_2[protocol], encoding="latin1")
    assert same(content["audio"], GRID)
    assert same(content["audio"], reference["audio"])
    assert content["text"] == "café" == reference["text"].encode("latin1").decode("utf-8")
    assert content["n"] == 3


@pytest.mark.parametrize(("raw", "text"), [(b"it\x92s", "it’s"), (b"\xe4\xbd\xa0", "你"), (b"", "")])
def test_python_2_text_is_decoded_as_asked(raw: bytes, text: str) -> None:
    assert loads(b"\x80\x02]U" + bytes([len(raw)]) + raw + b"a.", decode_text=decode_text) == [text]


@pytest.mark.parametrize("raw", [b"\x81", b"\xbd\xf1\xcc\xec"])
def test_python_2_text_that_cannot_be_told_is_refused(raw: bytes) -> None:
    program = b"\x80\x02]U" + bytes([len(raw)]) + raw + b"a."
    for decode, reason in (
        (decode_text, "is not UTF-8 or punctuation of Windows-1252"),
        (decode_utf_8, "is not UTF-8"),
    ):
        with pytest.raises(UnsafePickle, match=f"holds text .* that {reason}"):
            loads(program, decode_text=decode)
    if len(raw) == 4:
        assert loads(program, decode_text=lambda text: decode_text(text, "zh")) == ["今天"]


def test_lone_surrogates_become_valid_text() -> None:
    assert loads(pickle.dumps(["a\ud83d", "\ud83d\ude00"], 4)) == ["a\ufffd", "😀"]
    assert loads(pickle.dumps(["a\ud83d"], 0)) == ["a\ufffd"]


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.pkl"
    big = np.arange(4_000_000, dtype=np.float32).reshape(1000, 4000)
    path.write_bytes(pickle.dumps({"audio": big, "again": big}, 4))
    tracemalloc.start()
    content = load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not content["audio"].flags.writeable
    assert np.array_equal(content["audio"][[0, -1]], big[[0, -1]])
    assert content["again"] is content["audio"]


def test_the_list_of_names_is_exact() -> None:
    pairs = {("_codecs", "encode"), ("collections", "OrderedDict"), ("numpy", "dtype"), ("numpy", "ndarray")}
    for core in ("numpy.core", "numpy._core"):
        pairs |= {(f"{core}.multiarray", "_reconstruct"), (f"{core}.multiarray", "scalar")}
        pairs |= {(f"{core}.numeric", "_frombuffer")}
    for module in ("builtins", "__builtin__"):
        pairs |= {(module, name) for name in ("set", "frozenset", "bytes", "bytearray", "complex")}
    assert pairs == ALLOWED
    assert isinstance(ALLOWED, frozenset)


def test_the_opcodes_are_python_s() -> None:
    actual = {name: code for name, code, _, _ in pickle_vm._TABLE}
    assert actual == {op.name: op.code.encode("latin1") for op in pickletools.opcodes}


# ── files that ask for more ──────────────────────────────────────────────────────────────────────────────────────────


ZOO = list(zoo("", ""))


@pytest.mark.parametrize("name", ZOO)
def test_refuses_by_name_and_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentinel = tmp_path / "ran"
    data, wanted = zoo(f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')")[name]
    path = tmp_path / "evil.pkl"
    path.write_bytes(data)
    modules = set(sys.modules)
    with pytest.raises(UnsafePickle, match=wanted) as caught:
        load_pickle(path)
    assert str(path) in str(caught.value)
    assert "nothing of this file was run" in str(caught.value)
    assert str(caught.value).isprintable()
    assert not sentinel.exists()
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "STACK_GLOBAL", "memo confusion", "INST", "EXT1", "in an object array"]
)
def test_the_zoo_is_dangerous(name: str, tmp_path: Path) -> None:
    """Control: Python's own unpickler does run these."""
    sentinel = tmp_path / "ran"
    data, _ = zoo(f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()")[name]
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(data)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert sentinel.exists()


# ── files that claim more than they are ──────────────────────────────────────────────────────────────────────────────


def test_bombs_stay_small(tmp_path: Path) -> None:
    """All of them in a process that may take 600 MiB more than it has when it starts."""
    for name, (data, _) in BOMBS.items():
        (tmp_path / f"{name}.pkl").write_bytes(data)
    program = """
import gc, json, pathlib, resource, sys
from trainer.data.pickles.unpickle import UnsafePickle, load_pickle
vm = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (vm + (600 << 20),) * 2)
out = {}
for path in pathlib.Path(sys.argv[1]).glob("*.pkl"):
    try:
        load_pickle(path)
        out[path.stem] = None
    except UnsafePickle as error:
        out[path.stem] = str(error)
    gc.collect()
print(json.dumps(out))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    output = json.loads(done.stdout)
    for name, (_, wanted) in BOMBS.items():
        assert (output[name] is None) if wanted is None else wanted in output[name], (name, output[name])


@pytest.mark.parametrize("name", LOOPS)
def test_refuses_what_contains_itself(name: str) -> None:
    with pytest.raises(UnsafePickle, match="contains itself"):
        loads(LOOPS[name])


def test_shared_parts_are_no_loops() -> None:
    row = {"a": [1, 2]}
    assert loads(pickle.dumps([row, row, (row, [row])], 2)) == [row, row, (row, [row])]


def test_deep_nesting_is_read_and_let_go() -> None:
    deep: object = loads(b"]" * 100_000 + b"a" * 99_999 + b".")
    levels = 0
    while deep:
        deep = deep[0]  # type: ignore[index]
        levels += 1
    assert levels == 99_999


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_truncation_is_refused(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps([{"features": {"text": "hi", "audio": GRID, "n": 3}, "label": "joy"}], protocol)
    for stop in range(len(data)):
        with pytest.raises(UnsafePickle):
            loads(data[:stop])
    path = tmp_path / "cut.pkl"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnsafePickle, match=r"cut\.pkl: is (truncated|not a valid pickle)"):
        load_pickle(path)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "is empty"),
        (pickle.dumps([1]) + pickle.dumps([2]), "more than one pickle"),
        (b"\x80\x06N.", "protocol 6"),
        (b"NN.", "does not end with one object"),
        (b"(N.", "does not end with one object"),
        (b"h\x05.", "not a valid pickle: BINGET"),
        (b"0.", "not a valid pickle: POP"),
        (b"]]K\x01s.", "not a valid pickle: SETITEM"),
        (b"}]K\x01s.", "a list as a dictionary key"),
        (b"X\x02\x00\x00\x00\xff\xfe.", "not a valid pickle: BINUNICODE"),
        (RECONSTRUCT + b".", "a numpy array as data"),
        (array_of(b"(K\x01t") + b"(K\x01(K\x01tNNNtb.", "second filling|not a valid pickle"),
        (b"{'a': 1}\n", "not a valid pickle|refused"),
        (b"PK\x03\x04 a zip archive", "refused"),
        (b"\x1f\x8b gzip", "refused"),
    ],
)
def test_what_is_no_pickle_says_so(data: bytes, wanted: str) -> None:
    with pytest.raises(UnsafePickle, match=wanted):
        loads(data)


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UnsafePickle, match="cannot be read"):
            load_pickle(path)


def test_random_damage_never_gets_through() -> None:
    """300 damaged pickles: each is read or refused, with little memory, and nothing else happens."""
    draw = random.Random(20260107)
    rows = [{"features": {"text": f"row {i}", "audio": GRID, "len": 2}, "label": np.str_("joy")} for i in range(3)]
    objects = np.array(["a", [1], None], dtype=object)
    honest = [pickle.dumps([*rows, objects, {1, 2}], protocol) for protocol in range(6)] + list(PYTHON_2.values())
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        data = bytearray(draw.choice(honest))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 8)]
            elif kind == 2:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
            else:
                start = draw.randrange(len(data))
                data[at:at] = data[start : start + draw.randint(1, 40)]
        try:
            loads(bytes(data))
        except UnsafePickle:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 150
    assert peak < 8 << 20


def test_the_room_stands_alone() -> None:
    """It imports nothing of the project but its own files, and speaks of none of the project's notions."""
    room = Path(pickle_vm.__file__).parent
    notions = re.compile(
        r"\b(egmf|meld|mosei|cherma|sims|task|split|utterance|modality|expert|audio|video)", re.IGNORECASE
    )
    imported = set()
    for path in room.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not notions.findall(text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    own = {name for name in imported if name and name.split(".")[0] not in sys.stdlib_module_names}
    assert own == {"numpy", "trainer.data.pickles.pickle_vm"}
