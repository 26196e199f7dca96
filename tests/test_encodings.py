"""Encodings: what each gives, and that no text is ever taken for another one's."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.encodings import EncodingError, decode_file, decode_text

CHINESE = "今天我真的很高兴，谢谢你！\n你怎么能这样说我？\n我不知道该怎么办……\n别走，等等我\n"
TRADITIONAL = "今天我真的很高興，謝謝你！\n你怎麼能這樣說我？\n"
ENGLISH = "It’s “late” — isn’t it…\nno, it is not\nfiancé, café and naïve\n" + "plain\n" * 20
JAPANESE, RUSSIAN, GREEK = (
    "今日はとても嬉しいです\nありがとう\n",
    "сегодня я очень рад\nспасибо\n",
    "σήμερα είμαι χαρούμενος\n",
)


@pytest.mark.parametrize("text", [CHINESE, TRADITIONAL, ENGLISH, JAPANESE, RUSSIAN, "", "a", "😀\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_unicode_is_read_in_every_form(text: str, encoding: str, language: str) -> None:
    assert decode_file(text.encode(encoding), language)[0] == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [CHINESE, ENGLISH])
def test_utf_16_without_a_mark(text: str, encoding: str) -> None:
    assert decode_file(text.encode(encoding), "zh") == (text, encoding)


@pytest.mark.parametrize("encoding", ["gbk", "gb2312", "gb18030"])
def test_chinese_encodings_for_chinese_tasks_alone(encoding: str) -> None:
    raw = CHINESE.encode(encoding)
    assert decode_file(raw, "zh") == (CHINESE, "gb18030")
    with pytest.raises(EncodingError, match=r"line 1 is not UTF-8, UTF-16 or .*Chinese in GB18030 .*language: zh"):
        decode_file(raw, "en")
    with pytest.raises(EncodingError):
        decode_text("高兴".encode(encoding), "en")
    assert decode_text("高兴".encode(encoding), "zh") == "高兴"


def test_windows_1252_in_a_few_lines() -> None:
    assert decode_file(ENGLISH.encode("cp1252")) == (ENGLISH, "utf-8 with windows-1252")
    mixed = "naïve 😀\n".encode() + "It’s\n".encode("cp1252") + "café\n".encode()
    assert decode_file(mixed) == ("naïve 😀\nIt’s\ncafé\n", "utf-8 with windows-1252")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [(TRADITIONAL, "big5"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8_r"), (GREEK, "cp1253")],
)  # fmt: skip
def test_other_encodings_are_refused_with_the_line(text: str, encoding: str, language: str) -> None:
    with pytest.raises(EncodingError, match=r"line 3 is not UTF-8, .*\(bytes [0-9a-f ]+\).*: save the file as UTF-8"):
        decode_file(b"id,text\nplain\n" + text.encode(encoding), language)


def test_many_lines_in_windows_1252_are_refused() -> None:
    raw = "".join(f"caf\u00e9 {i}\n" for i in range(50)).encode("cp1252")
    with pytest.raises(EncodingError, match=r"line 1 is not UTF-8.*and so are 49 more lines"):
        decode_file(raw)


def test_a_damaged_file_with_a_mark_is_refused() -> None:
    with pytest.raises(EncodingError, match="byte order mark of UTF-8 and is none from byte 9 on"):
        decode_file(b"\xef\xbb\xbfabc\nde\xff")
    with pytest.raises(EncodingError, match="byte order mark of UTF-16 and is none from byte"):
        decode_file(b"\xff\xfea\0b")


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from(["en", "zh"]))
def test_utf_8_is_never_taken_for_anything_else(text: str, language: str) -> None:
    assert decode_text(text.encode(), language) == text
    for file in (text, f"id,text\na,{text}\n"):
        if file.count("\0") * 3 < len(file):
            assert decode_file(file.encode(), language)[0] == file.removeprefix("\ufeff")


def test_a_nul_does_not_make_utf_16() -> None:
    for raw in (b"a\xe9\xe9\0\nplain\n.", b"\xbd\xf1\xcc\xec\0\n\n\n"):
        assert len(raw) % 2 == 0
        with pytest.raises(EncodingError):
            decode_file(raw)


@given(st.binary(max_size=60), st.sampled_from(["en", "zh"]))
def test_any_bytes_are_read_or_refused(raw: bytes, language: str) -> None:
    with contextlib.suppress(EncodingError):
        text, encoding = decode_file(raw, language)
        assert isinstance(text, str)
        assert encoding
