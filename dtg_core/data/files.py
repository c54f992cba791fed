"""Names of image files: what lies under a folder, and whether the names that a JSON gives are there and stay inside."""
from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dtg_core.config import DataRules
from dtg_core.data.report import Report
from dtg_core.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"))
SKIPPED = frozenset(("__macosx", "thumbs.db", "desktop.ini"))  # and hidden ones, such as .ipynb_checkpoints
LONGEST = 4095  # bytes of a path
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
FILE, LINK, OTHER = range(3)


def list_images(folder: Path, report: Report, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[str]:
    """Image files under a folder, or those of other lower-case ``suffixes``, relative to it and sorted; links are followed,
    hidden and known junk files are skipped."""
    names: list[str] = []
    junk: list[str] = []
    seen: set[str] = set()  # real folders, so that links in a circle end
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        where = os.path.join(folder, prefix)
        real = os.path.realpath(where)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(where))
        except OSError as error:
            raise UserError(f"{where}: the folder cannot be read ({error.strerror}) - check its permissions") from error
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name.lower() in SKIPPED:
                junk.append(name)
            elif entry.is_dir():
                waiting.append(name + "/")
            elif os.path.splitext(entry.name)[1].lower() not in suffixes or not entry.is_file():
                junk.append(name)
            else:
                names.append(name)
    report.add(folder, "files are skipped, as hidden or as no image", junk)
    names.sort()
    return names


def no_folder(path: Path) -> str:
    """Why a path that should be a folder is none, in words that follow its name and a colon."""
    return "is a file, not a folder" if path.exists() else "there is no such folder"


def require_plain_names(names: Sequence[str], source: Path, rules: DataRules) -> None:
    """Refuse names that no data set on a disk has, or that lead out of its folder."""
    for number, name in enumerate(names):
        if name and name.isascii() and name.isprintable() and ".." not in name and name[0] != "/" and len(name) < 256 \
                and "\\" not in name and ":" not in name:
            continue  # nearly all names of nearly all files
        problem = _problem(name, rules)
        if problem:
            raise UserError(f"{source}: images[{number}].file_name {problem} (found {name[:100]!r})")


def _problem(name: str, rules: DataRules) -> str | None:
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        return "is no text - export the file again"
    if not name or "\0" in name or length > LONGEST:
        return f"is empty, holds a NUL or is longer than {LONGEST} bytes - give the name of a file"
    if _URL.match(name):
        return "is an address - download the images, and give names of files"
    if "\\" in name:
        return "has backslashes - write / between folders"
    if not rules.allow_outside_root and (name.startswith("/") or ".." in name.split("/")):
        return "leads out of the images' folder - give names inside of it, or set data.rules.allow_outside_root=true"
    return None


def missing_files(root: Path, names: Sequence[str], source: Path, rules: DataRules) -> list[int]:
    """Rows of the files that are not there.

    Each folder is listed once instead of asking for each file, which matters on network disks.

    Raises:
        UserError: a name differs from an existing one in case only, is no regular file, or is a link that leads out of root.
    """
    folders: dict[str, dict[str, int]] = {}
    missing = []
    for row, name in enumerate(names):
        prefix, base = os.path.split(name)
        if prefix not in folders:
            folders[prefix] = _listed(root, prefix, source, rules)
        kind = folders[prefix].get(base)
        if kind is None:
            _refuse_other_case(source, row, base, folders[prefix])
            missing.append(row)
        elif kind == OTHER:
            raise UserError(f"{source}: images[{row}] {name!r} in {root} is not a regular file - take it out")
        elif kind == LINK and not rules.allow_outside_root and not _inside(root, name):
            raise UserError(f"{source}: images[{row}] {name!r} in {root} is a link out of the images' folder - copy the "
                            "image, "
                            "or set data.rules.allow_outside_root=true")
    return missing


def real_paths(root: Path, names: Sequence[str]) -> list[str]:
    """Where files under ``root`` are when links of folders and files are followed.

    Each folder is looked at once instead of each file, as in ``missing_files``.
    """
    folders: dict[str, tuple[str, set[str]]] = {}
    paths = []
    for name in names:
        above, base = os.path.split(name)
        if above not in folders:
            real = os.path.realpath(os.path.join(root, above))
            folders[above] = real, {entry.name for entry in os.scandir(real) if entry.is_symlink()}
        real, links = folders[above]
        path = os.path.join(real, base)
        paths.append(os.path.realpath(path) if base in links else path)
    return paths


def nearest_name(root: Path, name: str) -> str:
    """The file beside ``name`` whose name is most like it, in words that end a message; empty if none is like it."""
    folder = os.path.join(root, os.path.dirname(name))
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))[:5000]
    close = difflib.get_close_matches(os.path.basename(name), names, n=1, cutoff=0.6)
    return f", where the nearest name is {close[0]!r}" if close else ""


def _listed(root: Path, prefix: str, source: Path, rules: DataRules) -> dict[str, int]:
    """Kind of each entry of a folder, without its folders."""
    where = os.path.join(root, prefix)
    if prefix and not rules.allow_outside_root and not _inside(root, prefix):
        raise UserError(f"{source}: the folder {prefix!r} leads out of {root} - set data.rules.allow_outside_root=true to "
                        "allow it")
    try:
        entries = list(os.scandir(where))
    except PermissionError as error:
        raise UserError(f"{source}: the images' folder {where} cannot be read ({error.strerror}) - mend its rights") from error
    except OSError:
        return {}
    kinds = {}
    for entry in entries:
        if not entry.is_dir():
            kinds[entry.name] = OTHER if not entry.is_file() else LINK if entry.is_symlink() else FILE
    return kinds


def _inside(root: Path, name: str) -> bool:
    base = os.path.realpath(root)
    real = os.path.realpath(os.path.join(root, name))
    return real == base or real.startswith(base.rstrip("/") + "/")


def _refuse_other_case(source: Path, row: int, base: str, listed: dict[str, int]) -> None:
    if len(listed) > 10_000 and base.lower() not in listed:  # a scan for each name would be quadratic
        return
    other = next((name for name in listed if name.lower() == base.lower()), None)
    if other is not None:
        raise UserError(f"{source}: images[{row}] is {base!r}, but the file is called {other!r} - rename one of them")
