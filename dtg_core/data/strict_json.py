"""JSON by its standard: UTF-8, no duplicate keys, sane nesting and lengths of numbers; each fault is reported with its line and
column."""
from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtg_core.errors import UserError

LARGE = 100_000_000  # bytes; reading more takes seconds, so that it is announced
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # first, because they begin like UTF-16's
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"PK\x03\x04": "unzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}
_LONG_NUMBER = re.compile(r"\d{4301,}")  # Python refuses longer integers


class _KeyTwice(ValueError):
    pass


def read_json(path: Path, convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file; a byte order mark of UTF-8 is accepted.
        convert: applied to each object as soon as it is read, to keep memory low.

    Raises:
        UserError: the file is missing, in another encoding or not JSON.
    """
    text = _text(path)

    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            known = f" of the object with id {result['id']!r}" if "id" in result else ""
            raise _KeyTwice(f"the key {twice!r}{known} stands there twice")
        return convert(result) if convert else result

    try:
        return json.loads(text, object_pairs_hook=record)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: it is not JSON ({error.msg} at {place}) - export it again") from None
    except _KeyTwice as error:
        raise UserError(f"{path}: it is not JSON ({error}) - remove one of the two") from None
    except RecursionError:
        raise UserError(f"{path}: it is not a data set (brackets nested too deeply) - export it again") from None
    except ValueError as error:
        long = _LONG_NUMBER.search(text)
        place = _place(text, long.start()) if long else str(error)
        raise UserError(f"{path}: it is not a data set (a number of over 4300 digits at {place}) - export it again") from None


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a FIFO would never end
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{path}: it is {kind} ({path.resolve()}) - give a JSON file")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file ({path.absolute()}) - check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it cannot be read ({error}) - give a JSON file") from None
    if len(raw) > LARGE:
        print(f"reading {path.name} ({len(raw) / 1e6:.0f} MB)", file=sys.stderr)
    if not raw.strip():
        raise UserError(f"{path}: it is empty (line 1, column 1) - export it again")
    for mark, tool in _COMPRESSED.items():
        if raw.startswith(mark):
            raise UserError(f"{path}: it is compressed - unpack it with {tool}")
    for mark, name in _OTHER_ENCODINGS.items():
        if raw.startswith(mark):
            raise UserError(f"{path}: it is {name} text - save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        guess = "UTF-16" if b"\0" in raw[:4] else "another encoding"
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: it is not UTF-8 but {guess} (byte {byte:#04x} in line {line}) - save it as "
                        "UTF-8") from None


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"
