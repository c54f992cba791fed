"""Finished runs in one table: mean and spread over seeds and folds, and the differences to the first row.

    python scripts/compare.py RUN... [--output DIR]

The first run's row is the one that others are measured against. The table goes to stdout; with ``--output`` also to
``compare.md`` and, with the curves of AP, to ``compare.html``, a single file.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import STAGES, Parser, main_guard

from dtg_core.errors import UserError


def parser() -> Parser:
    result = Parser("Compare finished runs in one table.")
    add = result.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders; those that differ in seed or fold only are one row")
    add("--output", type=Path, metavar="DIR", help="where compare.md and compare.html go")
    add("--over", nargs="+", action="extend", default=[], metavar="KEY",
        help="settings, beside seed and fold, that may differ between the runs of a row")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    show(arguments.runs, arguments.output, arguments.over)
    return 0


def show(runs: Sequence[Path], output: Path | None = None, over: Sequence[str] = ()) -> None:
    """Print the table of finished runs, and write it to ``output`` with a page of curves."""
    from dtg_core.engine.compare import compare, draw_curves, to_html, to_markdown

    comparison = compare(runs, STAGES, over)
    markdown = to_markdown(comparison)
    print(markdown, end="")
    if output is None:
        return
    curves = draw_curves(comparison)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "compare.md").write_text(markdown, encoding="utf-8")
        (output / "compare.html").write_text(to_html(comparison, curves), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}) - give another --output") from error
    if curves is None:
        print("no curves: they need evaluations in metrics.jsonl, and matplotlib (pip install 'dtg-ssod[report]')")
    print(f"written to {output}")


if __name__ == "__main__":
    main_guard(main)
