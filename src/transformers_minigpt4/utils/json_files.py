"""Reads JSON and JSON Lines that others wrote: one bad record is a `ValueError` in one line, and the rest is read."""

import errno
import json
import os
import re
import reprlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from .files import PathLike


# Of a line, or of an entry of a list. LLaVA's longest conversation has 25 KiB.
MAX_RECORD_BYTES = 16 * 2**20

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # of a string: pairs have become one character there
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# What decides where a value ends. The quantifiers are possessive: no text can make the search slow.
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*+")
_DECODER = json.JSONDecoder()
_PIECE = 1 << 20  # bytes that are read at a time


def parse_json(content: str | bytes, read_object: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:
    """
    `json.loads` for text of unknown origin.

    Args:
        content (`str` or `bytes`): JSON in UTF-8, with or without a byte order mark.
        read_object (`Callable`, *optional*): See `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: whatever is wrong, in one line: no JSON, no UTF-8, too deeply nested, a number of thousands of
            digits, or half of a character (a lone surrogate), which no file, tokenizer or database takes.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=read_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(_words(error)) from error
    if _ESCAPED_SURROGATE.search(text) or not isinstance(content, bytes):
        refuse_surrogates(value)
    return value


def read_json(path: PathLike) -> Any:
    """
    A JSON file.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
        ValueError: if it is not JSON, see [`parse_json`]; the message begins with its path.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error}") from error


def json_lines(path: PathLike) -> Iterator[tuple[int, Any]]:
    """
    The lines of a JSON Lines file, except empty ones.

    Yields:
        Line number from 1, and the value, or the `ValueError` that says why there is none.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES):
            number, size, end = number + 1, len(line), line
            while not end.endswith(b"\n") and (end := file.readline(MAX_RECORD_BYTES)):
                size += len(end)
            if size > len(line):
                yield number, _too_large(size)
            elif line.strip():
                try:
                    yield number, parse_json(line)
                except ValueError as error:
                    yield number, error


class Item(NamedTuple):
    """An entry of a list in a JSON file: its line, from 1, and its value, or the `ValueError` that says why not."""

    line: int
    value: Any


class JsonText:
    """
    A JSON file whose lists are read entry by entry, so that a broken entry costs only itself.

    Args:
        path (`str` or `os.PathLike`): A regular file.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        with open_regular(path) as file:
            content = file.read()
        try:
            self._text, self._intact = content.decode("utf-8-sig"), True
        except UnicodeDecodeError:
            # Damaged bytes become lone surrogates, for which every entry is checked.
            self._text, self._intact = content.decode("utf-8-sig", errors="surrogateescape"), False

    def first(self) -> str:
        """The first character that is not a space: `[` of a list, `{` of an object, nothing of an empty file."""
        return self._at(self._skip(0))

    def items(self, key: str | None = None) -> Iterator[Item]:
        """
        The entries of a list.

        Args:
            key (`str`, *optional*): The list is the value of this key of the file's object; by default, the file is
                the list.

        Raises:
            ValueError: if there is no such list, or it is cut short; the message begins with the file's path.
        """
        place = self._skip(0) if key is None else self._value_of(key)
        if self._at(place) != "[":
            what = "does not contain a list" if key is None else f'has no list "{key}"'
            raise ValueError(f"{self.path} {what}")
        place, line, counted = self._skip(place + 1), 1, 0
        if self._at(place) == "]":
            return
        while True:
            line, counted = line + self._text.count("\n", counted, place), place
            value, place = self._entry(place)
            yield Item(line, value)
            if self._at(place) == "]":
                return
            place = self._skip(place + 1)

    def _entry(self, start: int) -> tuple[Any, int]:
        """An entry or its error, and where the comma or the bracket after it is."""
        try:
            value, end = _DECODER.raw_decode(self._text, start)
            end = self._skip(end)
            if self._at(end) not in (",", "]"):
                raise ValueError("not JSON: there is more than one value before the comma")
            if end - start > MAX_RECORD_BYTES:
                raise _too_large(end - start)
            if not self._intact or _ESCAPED_SURROGATE.search(self._text, start, end):
                refuse_surrogates(value)
            return value, end
        except (ValueError, RecursionError) as error:
            return ValueError(_words(error)), self._end(start)

    def _value_of(self, key: str) -> int:
        """Where the value of a key of the file's object begins; -1 if there is none."""
        place = self._skip(0)
        if self._at(place) != "{":
            return -1
        place = self._skip(place + 1)
        while self._at(place) == '"':
            try:
                name, end = _DECODER.raw_decode(self._text, place)
            except ValueError:
                return -1
            place = self._skip(end)
            if self._at(place) != ":":
                return -1
            place = self._skip(place + 1)
            if name == key:
                return place
            try:
                end = self._skip(_DECODER.raw_decode(self._text, place)[1])
            except (ValueError, RecursionError):
                end = self._end(place)
            if self._at(end) != ",":
                return -1
            place = self._skip(end + 1)
        return -1

    def _end(self, start: int) -> int:
        """Where the comma or the closing bracket after a broken value is, by brackets and quotes alone."""
        depth = 0
        for found in _STRUCTURE.finditer(self._text, start):
            character = found[0]
            if depth == 0 and character in ",]}":
                return found.start()
            depth += (character in "[{") - (character in "]}")
        line = self._text.count("\n", 0, start) + 1
        raise ValueError(f"{self.path} is not JSON, or was cut short: the entry in line {line} has no end")

    def _skip(self, place: int) -> int:
        found = _SPACE.match(self._text, place)
        return place if found is None else found.end()

    def _at(self, place: int) -> str:
        return self._text[place] if 0 <= place < len(self._text) else ""


def list_entries(path: PathLike) -> Iterator[tuple[str, Any]]:
    """
    The entries of all lists that a JSON file's object holds, read piece by piece, so that a file may be larger than
    the memory. Other values of the object are left out.

    Yields:
        The key of a list, and one of its entries, in the file's order.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
        ValueError: if it is not such a file, or an entry is broken; the message begins with its path.
    """
    with open_regular(path) as file:
        text = _Pieces(file)
        try:
            text.expect("{")
            while text.next() == '"':
                key = text.value()
                text.expect(":")
                if text.next() != "[":
                    text.value()
                else:
                    text.expect("[")
                    while text.next() != "]":
                        yield str(key), text.value()
                        if text.next() != "]":
                            text.expect(",")
                    text.expect("]")
                if text.next() != "}":
                    text.expect(",")
            text.expect("}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} cannot be read: {_words(error)}") from error


class _Pieces:
    """JSON text of which only a piece is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decode = file, getincrementaldecoder("utf-8-sig")().decode
        self._text, self._place, self._line, self._ended = "", 0, 1, False

    def next(self) -> str:
        """The next character that is not a space, or nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            self._place = self._place if found is None else found.end()
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def expect(self, character: str) -> None:
        """
        Goes past a character.

        Raises:
            ValueError: if another one is next.
        """
        found = self.next()
        if found != character:
            what = repr(found) if found else "the end of the file"
            raise ValueError(f"not JSON, or cut short: line {self._at_line()} has {what} in place of {character!r}")
        self._place += 1

    def value(self) -> Any:
        """
        Goes past a value, and returns it.

        Raises:
            ValueError: if there is none.
        """
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                # A number may go on in the next piece.
                if end < len(self._text) or not self._more():
                    break
            except json.JSONDecodeError as error:
                if len(self._text) - self._place > MAX_RECORD_BYTES or not self._more():
                    line = self._at_line()
                    raise ValueError(f"not JSON, or cut short: {error.msg}, in what begins in line {line}") from error
        if _ESCAPED_SURROGATE.search(self._text, self._place, end):
            refuse_surrogates(value)
        self._place = end
        return value

    def _more(self) -> bool:
        """Reads another piece; `False` at the end of the file."""
        if self._ended:
            return False
        piece = self._file.read(_PIECE)
        self._ended = not piece
        self._line = self._at_line()
        self._text = self._text[self._place :] + self._decode(piece, self._ended)
        self._place = 0
        return True

    def _at_line(self) -> int:
        return self._line + self._text.count("\n", 0, self._place)


def open_regular(path: PathLike) -> BinaryIO:
    """
    A file, opened for reading bytes.

    Raises:
        OSError: if it cannot be opened, or is a pipe, a socket or a device, which might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a pipe, a socket or a device"
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file", os.fspath(path))
    return open(path, "rb")


def brief(value: object) -> str:
    """At most 80 characters of a value, however large or deeply nested it is, for a message."""
    return _REPR.repr(value)[:80]


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def refuse_surrogates(value: object) -> None:
    """
    Raises:
        ValueError: for a value with a lone surrogate in any of its strings.
    """
    waiting = [value]
    while waiting:  # no recursion, for values of any depth
        value = waiting.pop()
        if isinstance(value, str):
            if (found := _LONE_SURROGATE.search(value)) is not None:
                code = ord(found[0])
                raise ValueError(
                    f"byte 0x{code - 0xDC00:02x} is not UTF-8"
                    if 0xDC80 <= code <= 0xDCFF
                    else f"it contains half of a character, \\u{code:04x} (a lone surrogate)"
                )
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"
    if "integer string conversion" in str(error):  # Python's words advise to raise its limit
        return "it contains a number of thousands of digits"
    return str(error)


def _too_large(size: int) -> ValueError:
    return ValueError(f"it has {size:,} bytes, more than the {MAX_RECORD_BYTES:,} that a record may have")
