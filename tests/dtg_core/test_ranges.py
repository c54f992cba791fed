"""Ranges: what is refused, that every number of the settings has one, and that it acts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts")]

from read_settings import RunSettings  # noqa: E402

from dtg_core.engine.study import Study  # noqa: E402
from dtg_core.errors import UserError  # noqa: E402
from dtg_core.ranges import NOT_EMPTY, Count, PositiveShare, Share, Whole, check_ranges, out_of  # noqa: E402
from dtg_core.settings_text import flatten  # noqa: E402


@dataclass(frozen=True)
class Inner:
    share: Share = 0.5
    free: float = 0.0
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    count: Count = 1
    limit: PositiveShare | None = None
    pair: tuple[Whole, Whole] = (0, 1)
    strides: Annotated[tuple[Count, ...], NOT_EMPTY] = (8,)
    angle: Annotated[float, "[0, 180]"] = 0.0
    inner: Inner = field(default_factory=Inner)
    stages: dict[str, Inner] = field(default_factory=lambda: {"rpn": Inner()})
    options: dict[str, Any] = field(default_factory=lambda: {"depth": -1, "deeper": {"sizes": [1]}})


@pytest.mark.parametrize(("changes", "told"), [
    ({"count": 0}, "count: is out of range (found 0) - use at least 1"),
    ({"limit": 0.0}, "limit: is out of range (found 0.0) - use more than 0 and at most 1"),
    ({"limit": 1.5}, "limit: is out of range (found 1.5) - use more than 0 and at most 1"),
    ({"pair": (0, -1)}, "pair: is out of range (found -1) - use at least 0"),
    ({"strides": ()}, "strides: is empty - give at least one number"),
    ({"strides": (8, 0)}, "strides: is out of range (found 0) - use at least 1"),
    ({"angle": 180.5}, "angle: is out of range (found 180.5) - use at least 0 and at most 180"),
    ({"inner": Inner(share=2)}, "inner.share: is out of range (found 2) - use at least 0 and at most 1"),
    ({"inner": Inner(free=math.nan)}, "inner.free: is not a finite number (found nan)"),
    ({"stages": {"rpn": Inner(), "rcnn": Inner(share=-1)}}, "stages.rcnn.share: is out of range (found -1) - use at least 0 and at most 1"),
])  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_ranges(replace(Outer(), **changes))
    assert str(caught.value) == told


@pytest.mark.parametrize("changes", [
    {}, {"limit": 1.0}, {"pair": (5, 0)}, {"angle": 180.0}, {"inner": Inner(free=-1e9, names=())}, {"stages": {}}, {"options": {}},
])  # fmt: skip
def test_what_passes(changes: dict[str, Any]) -> None:
    check_ranges(replace(Outer(), **changes))


def test_a_message_names_where_the_value_came_from() -> None:
    with pytest.raises(UserError, match=r"^own\.yaml:3: inner\.share: is out of range"):
        check_ranges(Outer(inner=Inner(share=2)), {"inner.share": "own.yaml:3"})


@pytest.mark.parametrize(("value", "interval", "outside"), [
    (0, "[0, 1]", False), (1, "[0, 1]", False), (0, "(0, 1]", True), (1, "[0, 1)", True), (5, "(-inf, inf)", False),
    (math.inf, "[0, inf)", True), (math.nan, "(-inf, inf)", True),
])  # fmt: skip
def test_ends_of_an_interval(value: float, interval: str, outside: bool) -> None:
    assert (out_of(value, interval) is not None) == outside


def numbers(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, declared type) of every number of a configuration, read from the declarations' text alone."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from numbers(value, f"{key}{name}.")
        elif isinstance(value, dict):
            for child, item in value.items():
                if is_dataclass(item):
                    yield from numbers(item, f"{key}{name}.{child}.")
        elif any(kind in repr(hint) for kind in ("int", "float")):
            yield f"{key}{name}", hint


@pytest.mark.parametrize("config", [RunSettings(), Study()], ids=["run", "study"])
def test_every_number_has_a_range(config: Any) -> None:
    found = dict(numbers(config))
    assert len(found) == len({*found} & {*flatten(config)}) > 3
    without = {key for key, hint in found.items() if "Annotated" not in repr(hint)}
    assert without == ({"data.rules.float_range"} if isinstance(config, RunSettings) else set())  # any two numbers
    check_ranges(config)


def test_every_range_acts() -> None:
    """A number far outside is refused for each setting, by its own name, wherever it is nested."""
    config = RunSettings()
    for key, hint in numbers(config):
        if "Annotated" in repr(hint):
            with pytest.raises(UserError, match=rf"^{key}: is out of range"):
                check_ranges(changed(config, key.split("."), hint))


def changed(config: Any, path: list[str], hint: Any) -> Any:
    """The configuration with -1,000,000 in place of a number, or of each number of a tuple."""
    if isinstance(config, dict):
        return {**config, path[0]: changed(config[path[0]], path[1:], hint)}
    if is_dataclass(config) and not isinstance(config, type):
        assert path[0] in {one.name for one in fields(config)}
        return replace(config, **{path[0]: changed(getattr(config, path[0]), path[1:], hint)})
    return (-1_000_000,) * max(1, len(config)) if "tuple" in repr(hint) else -1_000_000
