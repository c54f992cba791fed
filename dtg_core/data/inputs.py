"""The images that a command line means: files, folders and patterns, and which of them a JSON lists."""
from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtg_core.data.files import OWN, instead_of, list_images, passed_over
from dtg_core.data.findings import Report
from dtg_core.data.strict_json import read_json
from dtg_core.errors import UserError, counted, printable


def require_apart(paths: Sequence[str], output: Path) -> None:
    """UserError if ``output`` lies in a folder that is given or searched by a pattern: whatever reads that folder later, such as
    ``train.py --unlabeled``, would take drawn pictures for more photos."""
    target = os.path.realpath(output)
    for path in paths:
        if os.path.isdir(path) or "**" in path:
            root = _root_of(path)
            real = os.path.realpath(root)
            if os.path.commonpath((real, target)) == real:
                raise UserError(f"--output {output}: lies in the images' folder {root} - give an --output beside it")


def find_images(paths: Sequence[str], output: Path, suffixes: frozenset[str]) -> tuple[list[str], Path, list[str]]:
    """The files that are meant, as names relative to a common folder; that folder; and what to warn of, a line each.

    Args:
        paths: files, folders and patterns. output: files under it are not input. suffixes: of the files to take in folders.

    Raises:
        UserError: nothing is found under a path, it is a JSON, or ``output`` is an input folder or holds one. A folder without
            images is only warned of if other paths have some.
    """
    report = Report()
    target = os.path.realpath(output)
    files: list[str] = []
    roots: list[str] = []
    empty: list[str] = []
    for path in paths:
        root = _root_of(path)
        if os.path.isdir(path):
            found = [os.path.join(path, name) for name in list_images(Path(path), report, suffixes)]
        elif path.lower().endswith(".json") and os.path.isfile(path):
            raise UserError(f"{path}: a JSON, not an image - give its images, or their folder")
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if os.path.commonpath((target, os.path.realpath(root))) == target:
            raise UserError(f"{output}: holds the images themselves - give another --output")
        found = [os.path.abspath(name) for name in found if not os.path.realpath(name).startswith(target + os.sep)]
        if found:
            files += found
            roots.append(os.path.abspath(root))
        elif os.path.isdir(path):
            empty.append(path)
        else:
            raise UserError(f"{path}: no image there - give images, folders of images, or a quoted pattern")
    if not files:
        kinds, told = passed_over(report, Path(empty[0]), suffixes)
        other = "convert them to JPEG or PNG, or give images" if kinds else "give images, folders of images, or a quoted pattern"
        raise UserError(f"{empty[0]}: no image there{told} - {instead_of(kinds, other)}")
    warnings = [printable(f"{path}: no image there{passed_over(report, Path(path), suffixes)[1]}") for path in empty]
    warnings += [
        str(finding) for finding in report.findings.values()
        if finding.kind == OWN or (finding.file not in empty and passed_over(report, Path(finding.file), suffixes)[0])
    ]
    common = os.path.commonpath([*roots, *map(os.path.dirname, files)])  # a pattern may lead out of its root by ..
    return list(dict.fromkeys(os.path.relpath(name, common) for name in files)), Path(common), warnings


def _root_of(path: str) -> str:
    """A folder itself, that of a file, or the one that a pattern begins with."""
    if os.path.isdir(path):
        return path
    return os.path.dirname(path if os.path.exists(path) else re.split(r"[*?[]", path)[0]) or "."


def listed_images(annotations: Path, root: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Entries of images in a COCO JSON, whose file names are relative to ``root``, to its own folder or to ``images`` next to it;
    and what to warn of. Images that it does not list are left out: one folder may hold the images of several files.

    Args:
        annotations: the JSON; only its list of images is read. root: folder of ``names``, those of the images.

    Raises:
        UserError: it has no such list, or one that leaves an id in doubt or has none of the images.
    """
    kept = ("images", "id", "file_name", "width", "height")
    content = read_json(annotations, lambda record: {key: record[key] for key in kept if key in record})
    records = content.get("images") if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise UserError(f"{annotations}: no list of images in it (found {type(content).__name__}) - give a COCO JSON")
    odd = next((number for number, record in enumerate(records) if not _is_image(record)), None)
    if odd is not None:
        raise UserError(f"{annotations}: images[{odd}] has no 'id' or no 'file_name' - add it")
    for key in ("id", "file_name"):
        value, times = Counter(record[key] for record in records).most_common(1)[0]
        if times > 1:
            raise UserError(f"{annotations}: {times} images have the {key} {value!r} - fix it, so that each has its own")
    entries = {os.path.normpath(record["file_name"]): record for record in records}
    found: dict[str, Any] = {}
    for folder in (root, annotations.parent, annotations.parent / "images"):
        way = os.path.relpath(os.path.realpath(root), os.path.realpath(folder))
        keys = {name: os.path.normpath(os.path.join(way, name)) for name in names}
        found = max(found, {name: entries[key] for name, key in keys.items() if key in entries}, key=len)
    missing = [name for name in names if name not in found]
    if not found:
        raise UserError(f"{annotations}: does not list {missing[0]!r} ({len(missing)} of {counted(len(names), 'file')}) - give the "
                        "folder that its file names are relative to, or leave --annotations out")
    shown = f"{missing[0]!r}{', ...' if len(missing) > 1 else ''}" if missing else ""
    told = f"{annotations}: does not list {len(missing)} of {counted(len(names), 'file')} ({shown}) - left out"
    return found, [printable(told)] if missing else []


def _is_image(record: object) -> bool:
    """Whether an entry of a JSON's list of images has an id and a file name."""
    return isinstance(record, dict) and type(record.get("id")) in (int, float, str) and type(record.get("file_name")) is str
