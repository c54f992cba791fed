"""What is odd in the user's data but does not stop the work: counted, with the first few items named."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtg_core.errors import printable

SHOWN = 3  # items named in a line
KEPT = 10_000  # items kept per finding, for check.json
#: Words used in kinds of findings, with their forms for a single item.
NOUNS = {"annotations": "annotation", "boxes": "box", "categories": "category", "classes": "class", "files": "file",
         "images": "image", "lines": "line", "objects": "object"}  # fmt: skip
OTHERS = {"are": "is", "crowds": "a crowd", "get": "gets", "have": "has", "look": "looks", "make": "makes", "ones": "one",
          "stand": "stands", "their": "its", "them": "it"}  # fmt: skip


@dataclass
class Finding:
    """One kind of oddity of one file or folder."""

    file: str
    kind: str  # what it is and what is done about it, as in "boxes partly outside their image are clipped"
    count: int = 0
    items: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(self.items[:SHOWN])
        more = ", ..." if self.count > SHOWN else ""
        kind = self.kind if self.count != 1 else singular(self.kind)
        return printable(f"{self.file}: {self.count} {kind}{f' ({shown}{more})' if shown else ''}")


def singular(kind: str) -> str:
    """A kind of finding, worded for one item: its first noun and all verbs change. Words of a path stay as they are."""

    def replaced(text: str, words: Mapping[str, str], count: int = 0) -> str:
        def one(match: re.Match[str]) -> str:
            word = words[match[0].lower()]
            return word.upper() if match[0].isupper() else word

        return re.sub(rf"(?<![\w/.-])({'|'.join(words)})(?![\w/.-])", one, text, count=count, flags=re.IGNORECASE)

    return replaced(replaced(kind, NOUNS, 1), OTHERS)


class Report:
    """Findings in the order in which they were first made."""

    def __init__(self) -> None:
        self.findings: dict[tuple[str, str], Finding] = {}

    def add(self, file: object, kind: str, items: Iterable[object]) -> None:
        """Count ``items``, each of which names a place, under a file and a kind; no items: nothing to report."""
        for item in items:
            finding = self.findings.setdefault((str(file), kind), Finding(str(file), kind))
            finding.count += 1
            if len(finding.items) < KEPT:
                finding.items.append(str(item))

    def lines(self) -> list[str]:
        """One line for each finding, safe for a terminal."""
        return [str(finding) for finding in self.findings.values()]

    def as_json(self) -> list[dict[str, Any]]:
        """For check.json."""
        return [
            {"file": finding.file, "kind": finding.kind, "count": finding.count, "items": finding.items}
            for finding in self.findings.values()
        ]
