"""What is odd in the user's data but does not stop the work: counted, with the first few items named."""
from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dtg_core.errors import printable

log = logging.getLogger(__name__)

SHOWN = 3  # items named in a line
KEPT = 10_000  # items kept per finding, for check.json


@dataclass
class Finding:
    """One kind of oddity of one file or folder."""

    file: str
    kind: str  # what it is and what is done about it in general, as in "boxes partly outside their image are clipped"
    count: int = 0
    items: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = ", ..." if self.count > SHOWN else ""
        return printable(f"{self.file}: {self.kind} ({self.count}: {', '.join(self.items[:SHOWN])}{more})")


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

    def take(self, other: Report, file: object, kind: str) -> None:
        """Add what ``other`` has found of a file and a kind, if anything."""
        if (str(file), kind) in other.findings:
            self.findings[str(file), kind] = other.findings[str(file), kind]

    def lines(self) -> list[str]:
        """One line for each finding, safe for a terminal."""
        return [str(finding) for finding in self.findings.values()]

    def log(self) -> None:
        """Log the lines as warnings."""
        for line in self.lines():
            log.warning("%s", line)

    def as_json(self) -> list[dict[str, Any]]:
        """For check.json."""
        return [
            {"file": finding.file, "kind": finding.kind, "count": finding.count, "items": finding.items}
            for finding in self.findings.values()
        ]
