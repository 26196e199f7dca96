"""Multipart requests: one sample as fields and files, such as a clip and what is said in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from trainer.serving.http.faults import RefusedError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILES = ("clip", "features", "audio", "video")
PARTS = 32  # of one request


@dataclass
class Form:
    """The fields and files of a request, by name."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


def is_multipart(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(body: bytes, content_type: str) -> Form:
    """The parts of a body that is in memory.

    Raises:
        RefusedError: it is no such form, has names twice or too many parts, or text that is not UTF-8.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise _bad("the Content-Type names no boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _bad(str(error)) from error
    if not parts.ended:
        raise _bad("it ends before its last boundary")
    return parts.form


class _Parts:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.form, self.ended, self._count = Form(), False, 0
        self._name, self._value = bytearray(), bytearray()  # of the header that is being read
        self._headers: dict[bytes, bytes] = {}
        self._content = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > PARTS:
            raise _bad(f"it has more than {PARTS} parts")
        self._headers, self._content = {}, bytearray()

    def _header(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        options = parse_options_header(self._headers.get(b"content-disposition"))[1]
        try:
            name = options.get(b"name", b"").decode()
            if not name:
                raise _bad("a part has no name in its Content-Disposition")
            if name in self.form.fields or name in self.form.files:
                raise _bad(f"the part {name[:40]!r} is there twice")
            if b"filename" in options or name in FILES:
                self.form.files[name] = bytes(self._content)
            else:
                self.form.fields[name] = self._content.decode()
        except UnicodeDecodeError as error:
            raise _bad(f"a part's name or text is not UTF-8 ({error.reason})") from error
        self._content = bytearray()

    def _finish(self) -> None:
        self.ended = True


def _bad(reason: str) -> RefusedError:
    return RefusedError(400, "bad_form", f"the body is no multipart form that can be read: {reason}")
