"""Reads HTML pages as a browser would, as far as requests go."""
from __future__ import annotations

from html.parser import HTMLParser


class Requests(HTMLParser):
    """Collects what a page would ask for, and elements that are not closed in order."""

    ADDRESSES = frozenset({"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"})
    VOID = frozenset({"meta", "img", "link", "br", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value or "" for name, value in attrs if name in self.ADDRESSES and not (value or "").startswith("data:")]
        self.asked += [tag] if tag in ("script", "iframe", "link", "object", "embed") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.asked += [data] if "url(" in data or "@import" in data else []
        self.text.append(data)


def read_page(page: str) -> Requests:
    found = Requests()
    found.feed(page)
    found.close()
    assert not found.open, found.open
    return found


def stands_alone(page: str) -> bool:
    """Whether a browser that shows the page asks for nothing else."""
    return not read_page(page).asked and "http" not in page
