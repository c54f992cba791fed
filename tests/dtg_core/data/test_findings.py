"""What is said of odd data: one line for each kind, the same for one item and for many."""
from __future__ import annotations

from dtg_core.data.findings import KEPT, Report


def test_lines_name_file_kind_count_and_the_first_items() -> None:
    report = Report()
    report.add("own.json", "boxes partly outside their image are clipped", ["annotations[4]"])
    report.add("own.json", "classes have no box", ["cat", "dog", "yak"])
    report.add("more.json", "classes have no box", ["cat", "dog", "yak", "gnu"])
    report.add("more.json", "files are skipped", [])
    report.add("own.json", "boxes partly outside their image are clipped", ["annotations[7]"])
    assert report.lines() == [
        "own.json: boxes partly outside their image are clipped (2: annotations[4], annotations[7])",
        "own.json: classes have no box (3: cat, dog, yak)",
        "more.json: classes have no box (4: cat, dog, yak, ...)",
    ]


def test_names_of_the_user_stay_as_they_are() -> None:
    """Also where they are words of a message, and where a terminal would take them for commands."""
    report = Report()
    report.add("lines have.json", "folders have different images called 'them are.jpg', and classes/ is used", ["images are"])
    report.add("a\x1b[31m.json", "images cannot be used", ["b\n.png"])
    assert report.lines() == [
        "lines have.json: folders have different images called 'them are.jpg', and classes/ is used (1: images are)",
        "a\\x1b[31m.json: images cannot be used (1: b\\n.png)",
    ]


def test_all_are_counted_though_not_all_are_kept() -> None:
    report, other = Report(), Report()
    other.add("own.json", "classes have no box", range(KEPT + 5))
    other.add("own.json", "something else", "a")
    report.take(other, "own.json", "classes have no box")
    report.take(other, "more.json", "classes have no box")
    assert report.lines() == [f"own.json: classes have no box ({KEPT + 5}: 0, 1, 2, ...)"]
    assert [len(finding["items"]) for finding in report.as_json()] == [KEPT]
