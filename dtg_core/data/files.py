"""Names of image files: what is under a folder, and whether the files that a JSON names exist and are inside it."""
from __future__ import annotations

import contextlib
import difflib
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from dtg_core.config import DataRules
from dtg_core.data.findings import Report
from dtg_core.data.video import VIDEO_SUFFIXES
from dtg_core.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"))
HEIC_SUFFIXES = frozenset((".heic", ".heif"))
SKIPPED = frozenset(("__macosx", "thumbs.db", "desktop.ini"))  # and hidden ones, such as .ipynb_checkpoints
PREDICTION = "detections.json", "detections.csv"  # the lists of predict.py, ``.tmp`` until they are complete
LONGEST = 4095  # bytes of a path
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
FILE, LINK, OTHER = range(3)
# What ``list_images`` reports.
OWN = "folders are passed over, as this program has written them"
VIDEO = "files are skipped, as video instead of frames"
HEIC = "files are skipped, as HEIC instead of JPEG"
JUNK = "files are skipped, as hidden or as no image"


def list_images(
    folder: Path, report: Report, suffixes: frozenset[str] = IMAGE_SUFFIXES, expected: tuple[str, ...] = ()
) -> list[str]:
    """Image files under a folder, or those of other lower-case ``suffixes``, relative to it and sorted; links are followed.

    Hidden and known junk files are skipped, and so are subfolders that hold a run, a study or a prediction: their pictures have
    boxes drawn on them. Junk with an ``expected`` suffix is not reported.
    """
    names: list[str] = []
    skipped: dict[str, list[str]] = {OWN: [], VIDEO: [], HEIC: [], JUNK: []}
    seen: set[str] = set()  # real folders, so that circular links end
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
        if prefix and _holds_own(where, {entry.name for entry in entries}):
            skipped[OWN].append(prefix.rstrip("/"))
            continue
        for entry in entries:
            name, suffix = prefix + entry.name, os.path.splitext(entry.name)[1].lower()
            if _is_hidden(entry.name):
                skipped[JUNK].append(name)
            elif entry.is_dir():
                waiting.append(name + "/")
            elif suffix not in suffixes or not entry.is_file():
                skipped[VIDEO if suffix in VIDEO_SUFFIXES else HEIC if suffix in HEIC_SUFFIXES else JUNK].append(name)
            else:
                names.append(name)
    skipped[JUNK] = [name for name in skipped[JUNK] if not name.lower().endswith(expected)]
    for kind, items in skipped.items():  # what may be images after all before hidden files
        items.sort(key=lambda name: (_is_hidden(os.path.basename(name)), name))
        report.add(folder, kind, items)
    names.sort()
    return names


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SKIPPED


def is_own(folder: Path) -> bool:
    """Whether a folder holds a run, a study or a prediction, or the pictures of one, on which boxes are drawn."""
    owners = (folder, folder.parent) if folder.name == "pictures" else (folder,)
    with contextlib.suppress(OSError):
        return any(_holds_own(str(owner), set(os.listdir(owner))) for owner in owners)
    return False


def _holds_own(where: str, names: set[str]) -> bool:
    """Whether this program has written the folder that holds ``names``: as a study, a prediction, even an unfinished one, or a run,
    whose config.yaml states the version of its keys."""
    if {"study.yaml", "logs"} <= names or all(name in names or f"{name}.tmp" in names for name in PREDICTION):
        return True
    return "config.yaml" in names and not names.isdisjoint((".lock", "metrics.jsonl")) and holds_run(where)


def holds_run(folder: str | Path) -> bool:
    """Whether a folder's config.yaml is that of a run, which states the version of its keys."""
    config = Path(folder, "config.yaml")
    with contextlib.suppress(OSError):
        return config.is_file() and re.search(rb"^schema:", config.read_bytes(), re.MULTILINE) is not None
    return False


def passed_over(report: Report, folder: Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> tuple[set[str], str]:
    """What ``list_images`` has reported on a folder without images: the suffixes of its files, and a text to follow "no images",
    such as ", only .heic, .mp4 files"; empty if there is nothing."""
    kinds: set[str] = set()
    for kind in (VIDEO, HEIC, JUNK):
        finding = report.findings.get((str(folder), kind))
        paths = [Path(item) for item in finding.items] if finding else []
        kinds |= {path.suffix.lower() for path in paths if not _is_hidden(path.name)}
    kinds -= suffixes | {""}  # files with such a suffix are broken links
    shown = ", ".join([*sorted(kinds)[:5], *(["..."] if len(kinds) > 5 else [])])
    told = [f"{shown} files"] if kinds else []
    if (str(folder), OWN) in report.findings:
        told.append("what this program has written")
    return kinds, f", only {' and '.join(told)}" if told else ""


def instead_of(kinds: Collection[str], other: str) -> str:
    """What to do with non-image files of these suffixes; ``other`` if none of them is known."""
    remedies = [
        ("extract frames, e.g. mkdir frames && ffmpeg -i a.mp4 -vf fps=1 frames/%06d.jpg", VIDEO_SUFFIXES),
        ("convert HEIC to JPEG", HEIC_SUFFIXES),
    ]
    return ", and ".join(remedy for remedy, suffixes in remedies if not suffixes.isdisjoint(kinds)) or other


def no_folder(path: Path) -> str:
    """Why a path that should be a folder is not one, as a text to follow its name and a colon."""
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

    Each folder is listed once instead of checking each file, which matters on network disks.

    Raises:
        UserError: a name differs from an existing one in case or in the Unicode form of accents only, is not a regular file, or
            is a link that leads out of root.
    """
    folders: dict[str, dict[str, int]] = {}
    missing = []
    for row, name in enumerate(names):
        prefix, base = os.path.split(name)
        if prefix not in folders:
            folders[prefix] = _listed(root, prefix, source, rules)
        kind = folders[prefix].get(base)
        if kind is None:
            _refuse_other_spelling(source, row, base, folders[prefix])
            missing.append(row)
        elif kind == OTHER:
            raise UserError(f"{source}: images[{row}] {name!r} in {root} is not a regular file - take it out")
        elif kind == LINK and not rules.allow_outside_root and not _inside(root, name):
            raise UserError(f"{source}: images[{row}] {name!r} in {root} is a link out of the images' folder - copy the "
                            "image, or set data.rules.allow_outside_root=true")
    return missing


def real_paths(root: Path, names: Sequence[str]) -> list[str]:
    """Where files under ``root`` are when links of folders and files are followed.

    Each folder is listed once instead of checking each file, as in ``missing_files``.
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
    """The file next to ``name`` with the most similar name, as the end of a message; empty if none is similar."""
    folder = os.path.join(root, os.path.dirname(name))
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))[:5000]
    close = difflib.get_close_matches(os.path.basename(name), names, n=1, cutoff=0.6)
    return f", where the nearest name is {close[0]!r}" if close else ""


def _listed(root: Path, prefix: str, source: Path, rules: DataRules) -> dict[str, int]:
    """Kind of each entry of a folder, without subfolders."""
    where = os.path.join(root, prefix)
    if prefix and not rules.allow_outside_root and not _inside(root, prefix):
        raise UserError(f"{source}: the folder {prefix!r} leads out of {root} - set data.rules.allow_outside_root=true to allow it")
    try:
        entries = list(os.scandir(where))
    except PermissionError as error:
        raise UserError(f"{source}: the images' folder {where} cannot be read ({error.strerror}) - fix its rights") from error
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


def _refuse_other_spelling(source: Path, row: int, base: str, listed: dict[str, int]) -> None:
    if len(listed) > 10_000 and base.lower() not in listed:  # a scan for each name would be quadratic
        return
    composed = unicodedata.normalize("NFC", base)
    for name in listed:
        if name.lower() == base.lower():
            raise UserError(f"{source}: images[{row}] is {base!r}, but the file is called {name!r} - rename one of them")
        if not base.isascii() and unicodedata.normalize("NFC", name) == composed:  # accents can be written in two ways
            raise UserError(f"{source}: images[{row}] is {base!a}, but the file is called {name!a}, which looks the same - "
                            "rename one of them")
