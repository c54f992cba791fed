"""The one exception for what a user can fix: scripts print it as a single line and exit with status 2."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """``UserError("FILE or item: what is wrong (what was found) - what to do")``."""

    def __str__(self) -> str:
        # A loader's worker passes its error on as the text of its traceback, which ends with the message.
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip()


class NeedsSetting(UserError):
    """A sound image that only needs a setting, such as ``data.rules.float_range``: no other image replaces it."""


def nearest(word: str, choices: Iterable[str], otherwise: str = "") -> str:
    """``" - did you mean 'X'?"`` for the choice nearest to a misspelt word; when none is near, ``otherwise`` or the choices."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f" - did you mean {close[0]!r}?"
    if otherwise:
        return f" - {otherwise}"
    more = f" or {len(names) - 12} more" if len(names) > 12 else ""
    return f" - choose from {', '.join(sorted(names)[:12])}{more}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """"1 box", "2 boxes"; ``many`` is the plural of ``one``, by default with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def one_line(error: Exception) -> str:
    """What an error of another library says, without line breaks; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """``text`` as one line without control characters or undecodable bytes, which a file name may contain."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
