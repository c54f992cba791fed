"""Columns of names and ids in one buffer each, so that loader processes share them.

A list of strings would be copied into each worker page by page, because looking at a Python object writes its reference
count.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

CODE = "utf-8", "surrogatepass"  # also takes the surrogates that stand for non-UTF-8 bytes of file names


class Texts(Sequence[str]):
    """An immutable list of strings."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode(*CODE) for text in texts]
        self._buffer = b"".join(encoded)
        self._ends = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(text) for text in encoded], out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, and IndexError
        return self._buffer[self._ends[row] : self._ends[row + 1]].decode(*CODE)

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return (self._buffer[start:end].decode(*CODE) for start, end in pairwise(ends))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def packed(values: Sequence[Any]) -> Sequence[Any]:
    """``values`` as ``Texts``, as an array of integers, or, for anything else, as a list."""
    if all(type(value) is str for value in values):
        return Texts(values)
    if all(type(value) is int and abs(value) < 2**63 for value in values):
        return array("q", values)
    return list(values)
