"""Charts put points where they belong, and pages ask for nothing."""
from __future__ import annotations

import math
import re

import pytest
from pages import read_page, stands_alone

from dtg_core.engine import page
from dtg_core.engine.page import BOTTOM, LEFT, RIGHT, TOP, Line, chart

WIDTH, HEIGHT = 400, 230


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline points="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in found]


def test_points_land_on_the_axes():
    svg = chart("AP", [Line("teacher", [(0, 0), (50, 5), (100, 10)])])
    (line,) = polylines(svg)
    assert line == [(LEFT, HEIGHT - BOTTOM), ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2), (WIDTH - RIGHT, TOP)]
    assert "5 at 50" in svg
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0", "2", "4", "6", "8", "10"]


def test_values_below_0_hang_from_the_axis():
    """The axes start at 0, whether or not a value is there."""
    for points, ends in (([(1, -1.0)], [(WIDTH - RIGHT, HEIGHT - BOTTOM)]),
                         ([(1, -2), (2, -1)], [((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM), (WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2)])):
        svg = chart("x", [Line("a", points)])
        assert polylines(svg) == [ends]
        assert re.findall(r'text-anchor="end">([^<]*)<', svg)[-1] == "0"


def test_values_that_are_not_finite_leave_gaps_and_no_trace():
    (line,) = polylines(chart("loss", [Line("cls", [(0, 1), (1, math.nan), (2, math.inf), (3, 1)])]))
    assert len(line) == 2
    for empty in ([], [Line("none", [])], [Line("zero", [(0, 0), (0, 0)])], [Line("below", [(1, -3), (2, -1)])]):
        assert "nan" not in chart("nothing", empty)


def test_long_lines_are_thinned_to_their_means():
    points = [(float(x), float(x % 2)) for x in range(100_000)]
    (line,) = polylines(chart("loss", [Line("cls", points)]))
    assert len(line) <= page.MOST_POINTS + 1
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert all(y == pytest.approx(middle, abs=1) for _, y in line[:-1])
    assert line[-1] == (WIDTH - RIGHT, TOP)  # the last value itself


@pytest.mark.parametrize(("low", "high", "wanted"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.07, [0, 0.02, 0.04, 0.06, 0.08]), (0, 26.4, [0, 10, 20, 30]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
])  # fmt: skip
def test_ticks_are_round(low, high, wanted):
    assert page._ticks(low, high) == pytest.approx(wanted)


def test_texts_are_escaped_and_elements_closed():
    odd = '<script src="http://example.org">&"\''
    parts = [page.section(odd, page.paragraph(odd), page.table([[odd, odd], [odd, odd]]), page.folded(odd, odd)),
             page.charts([chart(odd, [Line(odd, [(1, 1)]), Line("b", [(1, 2)])], odd)]), page.picture(b"x", "png", odd)]  # fmt: skip
    found = read_page(page.page(odd, parts))
    assert not found.asked
    assert sum(odd in text for text in found.text) >= 10
    assert not stands_alone(page.page("a", ['<img src="pictures/a.png">']))
