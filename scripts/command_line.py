"""How scripts meet the terminal: arguments, progress, errors and exit statuses.

Exit status: what ``main`` returns, 0 for nothing; 2 after a mistake, reported in one line; 130 after Ctrl-C.

Heavy imports are inside functions of the scripts, so that ``--help`` and a mistyped flag are answered at once.
"""
from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

from dtg_core.errors import UserError, nearest, one_line, printable
from dtg_core.ranges import out_of

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, with the nearest flag, and takes no abbreviations."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # a shell leaves the ~ of --flag=~/file as it is
        self.add_argument("--debug", action="store_true", help="show the whole traceback of an error")

    def add_list(self, flag: str, metavar: str, help: str) -> None:
        """A flag of one value or more that may be given several times; [] without it."""
        self.add_argument(flag, nargs="+", action="extend", default=[], metavar=metavar, help=help)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``argv``, or name the first argument that is not known."""
        arguments, unknown = self.parse_known_args(argv)
        given = [text.partition("=")[0] for text in argv]
        for action in self._actions:
            if action.nargs is None and sum(map(given.count, action.option_strings)) > 1:
                print(f"warning: {action.option_strings[-1]}: is given twice, and only the last counts", file=sys.stderr)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            advice = nearest(unknown[0].partition("=")[0], flags) if unknown[0].startswith("-") else ""
            raise UserError(f"{unknown[0]}: unknown argument{advice}")
        return arguments


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of ``choices``, with the nearest one in the error."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"unknown value {text!r}{nearest(text, choices)}")
        return text

    return parse


def number(range_: Any) -> Callable[[str], Any]:
    """An argparse type: a number of a range of ``dtg_core.ranges``, such as ``Count``."""
    kind, interval = get_args(range_)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wanted {wanted} (found {text!r})") from None
        if problem := out_of(value, interval):
            raise argparse.ArgumentTypeError(problem)
        return value

    return parse


def progress(items: Iterable[T] | None = None, total: int | None = None, unit: str = "image") -> tqdm[T]:
    """``items`` with a bar, on a terminal only; without ``items`` the caller updates it."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would be forked into workers, and write to the stderr that check_data.py reads
    return tqdm(items, total=total, unit=unit, leave=False, disable=None, miniters=1)


def warn(lines: Iterable[str]) -> None:
    """Print warnings on stderr."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def main_guard(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run ``main(sys.argv[1:])`` and exit with its status.

    A UserError becomes one line on stderr and status 2, Ctrl-C status 130; with ``--debug`` the traceback is shown. If the
    reader of the output has gone, as with ``head``, it is status 141 without a message.
    """
    try:
        with _warnings_told():
            status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(141)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {printable(one_line(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if "--debug" in sys.argv:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Show what the core's modules log on stderr, like other warnings; loader processes inherit this."""
    core, lines = logging.getLogger("dtg_core"), logging.StreamHandler()
    lines.setFormatter(logging.Formatter("warning: %(message)s"))
    core.addHandler(lines)
    core.propagate = False
    try:
        yield
    finally:
        core.removeHandler(lines)
        core.propagate = True
