"""Which encoding text is in: detected from its bytes, never guessed where they are ambiguous.

Read are UTF-8 and UTF-16, with and without a byte order mark; GB18030, with GBK and GB2312 in it, where Chinese is expected; and the
few bytes of Windows-1252 that old exports mix into UTF-8: its punctuation, and single accented letters. Everything else is refused,
since almost any bytes are "valid" in most 8-bit encodings, and what they give is wrong without a word.
"""

from __future__ import annotations

import codecs
import mmap
import re

MIXED = "utf-8 with windows-1252"
_MARKS = (  # longest first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_HIGH = re.compile(rb"[\x80-\xff]+")
_PUNCTUATION = frozenset(
    b"\x80\x82\x84\x85\x86\x87\x88\x89\x8b\x91\x92\x93\x94\x95\x96\x97\x98\x99\x9b\xa0"
)  # of Windows-1252
_LETTERS = frozenset(b"\x8a\x8c\x8e\x9a\x9c\x9e\x9f" + bytes(range(0xC0, 0x100))) - frozenset(b"\xd7\xf7")
_ASCII_LETTER = re.compile(rb"[A-Za-z]")
_CHUNK = 1 << 20
_FEW, _SHARE = 10, 0.25  # lines in Windows-1252: so many, or this share of all
_COMMON = 0.8  # share of hanzi that GB2312 has, at least: 99 % of modern Chinese, under half of what Big5's bytes give


for _name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "gb18030", "gb2312", "cp1252"):
    codecs.lookup(_name)  # imported here, and not while a stranger's bytes are read


class EncodingError(ValueError):
    """Text whose encoding cannot be detected; the message says where and what to do."""


def decode_file(raw: bytes, language: str = "en") -> tuple[str, str]:
    """The text of a whole file, without a byte order mark, and the name of its encoding.

    :data:`MIXED` names UTF-8 of which some lines are Windows-1252.

    Raises:
        EncodingError: none fits; the message names the first line that does not.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            try:
                return raw[len(mark) :].decode(encoding), encoding.removesuffix("-le").removesuffix("-be")
            except UnicodeDecodeError as error:
                raise EncodingError(
                    f"begins with the byte order mark of {encoding[:6].removesuffix('-').upper()} and is none from byte "
                    f"{len(mark) + error.start} on: it is damaged, or was joined from files of several encodings"
                ) from None
    try:
        text = raw.decode("utf-8")
        if "\0" not in text:
            return text, "utf-8"
    except UnicodeDecodeError:
        text = ""
    if (wide := _utf_16(raw, bool(text))) is not None:
        return wide
    if text:  # UTF-8 with NUL characters in it
        return text, "utf-8"
    if language == "zh" and (chinese := _gb18030(raw)) is not None:
        return chinese, "gb18030"
    lines = raw.splitlines(keepends=True)
    foreign = [number for number, line in enumerate(lines) if not _is_utf_8(line)]
    strange = [number for number in foreign if not _windows_1252(lines[number])]
    if not strange and len(foreign) <= max(_FEW, _SHARE * len(lines)):
        bad = set(foreign)
        decoded = (line.decode("cp1252" if number in bad else "utf-8") for number, line in enumerate(lines))
        return "".join(decoded), MIXED
    raise EncodingError(_refusal(lines, (strange or foreign)[0], len(foreign), language))


def decode_text(raw: bytes, language: str = "en") -> str:
    """One text, such as a byte string in a pickle: as files are decoded, but never UTF-16, and marks and NULs stay.

    Raises:
        EncodingError: none fits.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        pass
    if language == "zh" and (chinese := _gb18030(raw)) is not None:
        return chinese
    if _windows_1252(raw):
        return raw.decode("cp1252")
    raise EncodingError(_unlike("UTF-8", raw, language))


def first_line(raw: bytes) -> str:
    """The first line of a file's first bytes, of whose encoding only ASCII matters."""
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace").partition("\n")[0]
    wide = next((encoding for encoding in ("utf-16-le", "utf-16-be") if "\n".encode(encoding) in raw), "utf-8")
    return raw.decode(wide, "replace").partition("\n")[0]


def is_plain_utf_8(raw: bytes | mmap.mmap) -> bool:
    """Whether a file is UTF-8 without NUL characters; found without a copy of it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(raw), _CHUNK):
            decoder.decode(raw[start : start + _CHUNK], start + _CHUNK >= len(raw))
    except UnicodeDecodeError:
        return False
    return raw.find(b"\0") < 0


def _utf_16(raw: bytes, valid_utf_8: bool) -> tuple[str, str] | None:
    """UTF-16 without a byte order mark, recognised by its NULs: every ASCII character has one, always on the same side.

    Bytes that are UTF-8 too are ASCII characters but for NULs: then nearly all of that side must be NUL. Else the ends of
    lines must have theirs, or, without any, a third of the characters.
    """
    if len(raw) % 2 or 0 not in raw:
        return None
    even, odd = raw[0::2], raw[1::2]
    encoding, low, high = ("utf-16-le", even, odd) if odd.count(0) >= even.count(0) else ("utf-16-be", odd, even)
    ends = low.count(10)
    if valid_utf_8:
        plausible = high.count(0) >= 0.9 * len(high)
    elif ends:
        plausible = sum(a == 10 and b == 0 for a, b in zip(low, high, strict=True)) >= 0.9 * ends
    else:
        plausible = high.count(0) >= len(high) / 3
    try:
        text = raw.decode(encoding) if plausible else "\0"
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else (text, encoding)


def _gb18030(raw: bytes) -> str | None:
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return None
    hanzi = [c for c in text if "\u3400" <= c <= "\u9fff" or c >= "\U00020000" or "\ue000" <= c <= "\uf8ff"]
    letters = sum(c.isalpha() and c > "\x7f" for c in text)
    common = sum(_in_gb2312(c) for c in hanzi)
    return text if common and common >= _COMMON * max(letters, len(hanzi)) else None


def _in_gb2312(character: str) -> bool:
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _is_utf_8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _windows_1252(line: bytes) -> bool:
    """Whether all that is not ASCII in the line is punctuation of Windows-1252, or one accented letter beside a plain one."""
    for run in _HIGH.finditer(line):
        if set(run[0]) <= _PUNCTUATION:
            continue
        before, after = line[run.start() - 1 : run.start()] if run.start() else b"", line[run.end() : run.end() + 1]
        beside = _ASCII_LETTER.match(before) or _ASCII_LETTER.match(after)
        if len(run[0]) > 1 or run[0][0] not in _LETTERS or not beside:
            return False
    return True


def _refusal(lines: list[bytes], number: int, foreign: int, language: str) -> str:
    hint = f", and so are {foreign - 1} more lines" if foreign > 1 else ""
    if language != "zh" and _gb18030(b"".join(lines)) is not None:
        hint = ", which is Chinese in GB18030 (a task with `language: zh` reads it)"
    return f"line {number + 1} {_unlike('UTF-8, UTF-16', lines[number], language)}{hint}: save the file as UTF-8"


def _unlike(known: str, raw: bytes, language: str) -> str:
    try:
        raw.decode("utf-8")
        start = 0
    except UnicodeDecodeError as error:
        start = error.start
    some = " ".join(f"{byte:02x}" for byte in raw[start : start + 8])
    chinese = ", GB18030" if language == "zh" else ""
    return f"is not {known}{chinese} or punctuation of Windows-1252 (bytes {some})"
