"""Flags that several scripts have, and what is made of them: weights, files to write, and rules for data."""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from command_line import Parser, one_of

from dtg_core.config import DEFAULT_RULES, Config, DataConfig, DataRules, cross_check
from dtg_core.drafts import require_writable, write_text, writing
from dtg_core.errors import UserError
from dtg_core.ranges import check_ranges
from dtg_core.settings import overridden

RULES = "data.rules."  # the settings for reading data
WHICH = ("teacher", "student", "best")  # the weights in a run folder


def add_weights(parser: Parser, device: bool = True, which: bool = True) -> None:
    """What a trained detector is loaded from, as ``load_detector`` takes it."""
    parser.add_argument("weights", type=Path, metavar="RUN_OR_WEIGHTS", help="run folder, or a weights file of one")
    if which:
        parser.add_argument("--which", type=one_of(WHICH), default=WHICH[0], metavar="|".join(WHICH),
                            help="which detector of a run folder (default: teacher); best: the teacher at its best evaluation")
    if device:
        parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: what is available)")


def require_own_files(data: DataConfig, keys: Mapping[str, str], run: Path) -> None:
    """UserError if the settings of ``run`` name files relative to the folder that it was trained in, and this is another.

    Args:
        data: the run's. keys: those of ``data`` that are to be read, each with the flags that would replace it; empty: none do.
    """
    if data.labeled is None:  # the built-in data set, whatever the other keys say
        return
    for key, flags in keys.items():
        path = getattr(data, key)
        if path is not None and not os.path.isabs(path) and not os.path.exists(path):
            other = f", or give {flags}" if flags else ""
            raise UserError(f"data.{key}={path} of {run}: not found from here - run it in the folder where the run was trained"
                            f"{other}")


def add_overwrite(parser: Parser) -> None:
    """The flag that ``require_new`` names."""
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing files")


def require_new(files: Iterable[Path], overwrite: bool, flag: str = "--output", inputs: Iterable[str | Path | None] = ()) -> None:
    """UserError unless all ``files``, given by ``flag``, can be written without loss: none exists, or ``overwrite`` and none is one
    of the ``inputs``. To be called before long work."""
    read = {os.path.realpath(path) for path in inputs if path is not None}
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder - give another {flag}")
        if os.path.realpath(file) in read:
            raise UserError(f"{file}: is read, too, and would be lost - give another {flag}")
        if not overwrite and os.path.lexists(file):
            raise UserError(f"{file}: exists - give another {flag}, or --overwrite")
        require_writable(file.parent, flag)


def write_json(file: Path, figures: Mapping[str, object]) -> None:
    """Write what ``--json FILE`` asks for, with its parent folders."""
    with writing(f"--json {file}", "give another file"):
        write_text(file, json.dumps(figures, indent=1) + "\n")


def add_rules(parser: Parser) -> None:
    """The flag that messages about data refer to."""
    parser.add_list("--set", "data.rules.key=value", "what is tolerated")


def rules_of(arguments: argparse.Namespace, rules: DataRules = DEFAULT_RULES) -> DataRules:
    """``rules`` with the changes of ``add_rules``. UserError for other keys."""
    for text in arguments.set:
        if not text.startswith(RULES):
            raise UserError(f"--set {text}: is not used here - give {RULES}KEY=VALUE, or a flag for files")
    config = overridden(Config(data=DataConfig(rules=rules)), arguments.set)
    check_ranges(config)
    cross_check(config, {})
    return config.data.rules
