"""Files that are complete or absent, and one-line errors when a disk cannot be written or read."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dtg_core.errors import UserError


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file ``<name>.tmp`` to be written first, which is renamed to ``path`` if the block succeeds and otherwise deleted.

    Parent folders are created. In an ``ExitStack``, several files get their names once all are written. Raises OSError.
    """
    draft = path.with_name(f"{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all. Raises OSError."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(place: Path | str, remedy: str = "give another --output") -> Iterator[None]:
    """Turn an OSError of the block into the UserError ``PLACE: cannot be written (REASON) - REMEDY``."""
    try:
        yield
    except BrokenPipeError:  # the terminal's, not the disk's
        raise
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror or error}) - {remedy}") from error


def require_writable(folder: Path, flag: str = "--output") -> None:
    """UserError unless ``folder``, given by ``flag``, can be created or written to; this is checked without writing."""
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"{folder}: cannot be written ({place} is a file, not a folder) - give another {flag}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written (no right to write in {place}) - give another {flag}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror or error}) - fix the rights, or give another path") from error
