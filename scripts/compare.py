"""Finished runs in one table: mean and spread over seeds and folds, and the differences to a baseline.

    python scripts/compare.py RUN... [--output DIR]

The baseline is the first row with the same detector and labelled images. The table goes to stdout; with
``--output`` also to ``compare.md`` and, with the curves of AP, to ``compare.html``, a single file.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from command_line import Parser, main_guard
from shared_flags import add_overwrite, require_new


def parser() -> Parser:
    result = Parser("Compare finished runs in one table.")
    add = result.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders; those that differ in seed or fold only are one row")
    add("--output", type=Path, metavar="DIR", help="where compare.md and compare.html go")
    add_overwrite(result)
    result.add_list("--over", "KEY", "settings, besides seed and fold, that may differ between the runs of a row")
    return result


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse(argv)
    if arguments.output:
        require_new((arguments.output / f"compare.{kind}" for kind in ("md", "html")), arguments.overwrite)
    show(arguments.runs, arguments.output, arguments.over)
    return 0


def show(
    runs: Sequence[Path], output: Path | None = None, over: Sequence[str] = (), labels: Mapping[Path, str] | None = None
) -> None:
    """Print the tables of finished runs, and write them to ``output`` with a page of curves."""
    from dtg_core.engine.compare import compare, save, to_markdown

    comparison = compare(runs, over, labels)
    print(to_markdown(comparison), end="")
    if output is not None:
        save(comparison, output)
        print(f"written to {output}")


if __name__ == "__main__":
    main_guard(main)
