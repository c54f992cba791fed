"""Ranges of the numbers in a configuration, each beside its field.

    steps: Count = 1000                              an alias below
    rotate: Annotated[float, "[0, 180]"] = 30.0      any interval; a round bracket excludes its end
    check_ranges                                     refuses numbers outside their intervals
"""
from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from dtg_core.settings import refuse
from dtg_core.settings_text import join

Count = Annotated[int, "[1, inf)"]
Whole = Annotated[int, "[0, inf)"]
Seed = Annotated[int, "[0, 4294967296)"]
Positive = Annotated[float, "(0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
PositiveShare = Annotated[float, "(0, 1]"]
PartialShare = Annotated[float, "[0, 1)"]
OpenShare = Annotated[float, "(0, 1)"]
Percent = Annotated[float, "(0, 100)"]

NOT_EMPTY = "not empty"  # of a tuple: Annotated[tuple[Count, ...], NOT_EMPTY]


def check_ranges(config: Any, origins: Mapping[str, str] | None = None) -> None:
    """Refuse what lies outside the interval that its field is annotated with, and floats that are not finite.

    Args:
        config: a configuration dataclass. None in place of a number passes.
        origins: the keys' origins, for the message.

    Raises:
        UserError: naming the key, its origin, the interval and the value.
    """
    _check(type(config), config, "", origins)


def out_of(value: float, interval: str) -> str | None:
    """What is wrong with a number outside an interval such as "(0, 1]"; None: nothing."""
    if not -math.inf < value < math.inf:
        return f"is not a finite number (found {value})"
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if above and below:
        return None
    lower = "" if low == -math.inf else f"{'more than' if interval[0] == '(' else 'at least'} {low:.12g}"
    upper = "" if high == math.inf else f"{'less than' if interval[-1] == ')' else 'at most'} {high:.12g}"
    return f"is out of range (found {value}) - use {' and '.join(part for part in (lower, upper) if part)}"


def _check(hint: Any, value: Any, key: str, origins: Mapping[str, str] | None) -> None:
    """``check_ranges`` of a value that is declared as ``hint``."""
    if value is None:
        return
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    limits = None
    if get_origin(hint) is Annotated:
        hint, limits = get_args(hint)
    if limits == NOT_EMPTY and not value:
        refuse(key, "is empty - give at least one number", origins)
    if is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        for field in fields(value):
            _check(hints[field.name], getattr(value, field.name), join(key, field.name), origins)
    elif isinstance(value, dict):  # of sections; what others hold has no range
        for name, item in value.items():
            if is_dataclass(item):
                _check(type(item), item, join(key, name), origins)
    elif isinstance(value, tuple):
        for item in value:
            _check(get_args(hint)[0], item, key, origins)
    elif (isinstance(value, float) or limits) and (problem := out_of(value, limits or "(-inf, inf)")):
        refuse(key, problem, origins)
