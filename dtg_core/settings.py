"""Strict reading of configuration dataclasses; ``dtg_core.settings_text`` writes them.

    load_config    defaults, then a YAML file, then ``a.b=value`` overrides; every value is parsed by its declared type

A file may say ``schema: N``, the version of its keys. Keys of an older version are renamed by tables; a newer version is refused.

A dotted *key* names a value ("guidance.stages.rpn.tau"); its *origin* is "default", "FILE:LINE" or "command line". Files
can only set what the dataclasses declare: no anchors, tags, duplicate or unknown keys.
"""
from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from dtg_core.errors import UserError, nearest, printable
from dtg_core.settings_text import flatten, join

T = TypeVar("T")

DEFAULT, COMMAND_LINE = "default", "command line"
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)")
_FLOAT = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_MAX_DIGITS = 18  # fits 64 bits


#: Tables of renamed keys: the first takes keys of version 1 to those of version 2, and so on. None: the key no longer exists.
Renames = Sequence[Mapping[str, str | None]]


def load_config(
    kind: type[T], file: Path | None = None, overrides: Sequence[str] = (), renamed: Renames | None = None,
    notes: list[str] | None = None,
) -> tuple[T, dict[str, str]]:
    """Build ``kind`` from its defaults, a YAML file and overrides, the later winning.

    Args:
        kind: a dataclass all of whose fields have defaults.
        file: YAML that may set any field at any depth; None: defaults only.
        overrides: "dotted.key=value" with the value in YAML's syntax; an empty value is null.
        renamed: what older versions of the file called its keys; None: the file has no version.
        notes: takes a warning when the file was of an older version.

    Returns:
        The configuration, and the origin of each key of ``flatten``.

    Raises:
        UserError: naming the file and line (or the override), the key, what was found and the nearest valid key.
    """
    config = kind()
    origins = dict.fromkeys(flatten(config), DEFAULT)
    if file is not None:
        node = _migrated(_compose(_read(file), str(file)), str(file), renamed, notes)
        if node is not None:
            config = _Reader(kind, str(file), None, origins).read(config, node)
    config = overridden(config, overrides, origins)
    return config, {key: origins[key] for key in flatten(config)}


def overridden(config: T, overrides: Sequence[str], origins: dict[str, str] | None = None) -> T:
    """A configuration with ``overrides`` as in ``load_config``, noted in ``origins``; UserError for an invalid one."""
    for text in overrides:
        reader = _Reader(type(config), f"--set {text}", COMMAND_LINE, {} if origins is None else origins)
        config = reader.read(config, _override(text))
    return config


def plain_yaml(text: str, name: str, renamed: Renames | None = None) -> Any:
    """A YAML text of any content as dictionaries with text keys, lists and scalars, with ``renamed`` as in ``load_config``.

    Raises UserError naming ``name`` and the line.
    """
    node = _migrated(_compose(text, name), name, renamed, None)
    reader = _Reader(type(None), name, None, {})
    try:
        return None if node is None else reader.free(node, "")
    except RecursionError as error:
        raise UserError(f"{name}: nested too deeply") from error


def refuse(key: str, problem: str, origins: Mapping[str, str] | None = None) -> NoReturn:
    """Raise a UserError for a key whose value cannot be used, naming where the value came from."""
    origin = (origins or {}).get(key)
    place = {None: "", DEFAULT: "default: ", COMMAND_LINE: "command line: "}.get(origin, f"{origin}: ")
    raise UserError(f"{place}{key}: {problem}")


# Reading ---------------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """Nodes only: nothing is constructed, and anchors, aliases and tags are refused."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors (&) and aliases (*) are not read", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not read", event.start_mark)
        return super().compose_node(parent, index)


def _read(file: Path) -> str:
    if not file.is_file():
        found = "it is a folder" if file.is_dir() else f"no such file as {file.absolute()}"
        others = [other.name for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise UserError(f"{file}: cannot read the configuration ({found}){nearest(file.name, others) if others else ''}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot read the configuration ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"byte {error.object[error.start]:#04x}"
        raise UserError(f"{file}:{line}: not UTF-8 text ({found}) - save it as UTF-8") from error


def _compose(text: str, name: str) -> yaml.Node | None:
    """The node tree of a YAML text; ``name`` is its file, or the override it comes from."""
    place = name
    try:
        return yaml.compose(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = (error.problem or error.context or "not YAML").replace("\n", " ")
        if mark is not None and not name.startswith("--set"):
            place = f"{name}:{mark.line + 1}:{mark.column + 1}"
        advice = " - indent with spaces, not with a tab" if "\\t" in problem else ""
        raise UserError(f"{place}: not plain YAML ({printable(problem)}){advice}") from error
    except yaml.reader.ReaderError as error:
        if not name.startswith("--set"):
            place = f"{name}:{text[: error.position].count(chr(10)) + 1}"
        raise UserError(f"{place}: not text (character {error.character:#x})") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{place}: not plain YAML (nested too deeply, or a malformed number)") from error


def _migrated(node: yaml.Node | None, name: str, renamed: Renames | None, notes: list[str] | None) -> yaml.Node | None:
    """The node of a file in the current version's keys, without its entry "schema". It is changed in place."""
    version = _taken(node, ["schema"]) if renamed is not None else None
    if version is None or renamed is None:
        return node
    current = len(renamed) + 1
    text = str(version[1].value)
    place = f"{printable(name)}:{version[1].start_mark.line + 1}: schema"
    if not _is_plain(version[1]) or not _INT.fullmatch(text) or len(text) > _MAX_DIGITS or int(text) < 1:
        raise UserError(f"{place}: wanted a version from 1 on (found {_shown(version[1])})")
    if int(text) > current:
        raise UserError(f"{place}: made by version {text} of the settings, newer than this program's version {current} - update it")
    changed = []
    for table in renamed[int(text) - 1 :]:
        for old, new in table.items():
            pair = _taken(node, old.split("."))
            if pair is None:
                continue
            changed.append(f"{old} -> {new}" if new else f"{old} has no effect any more")
            if new:
                *path, last = new.split(".")
                home = _section(node, path)
                home.value.append((yaml.ScalarNode("str", last, pair[0].start_mark), pair[1]))
    if int(text) < current and notes is not None:
        notes.append(f"{printable(name)}: made by version {text} of the settings, read as version {current} ("
                     f"{', '.join(changed) or 'nothing to change'})")
    return node


def _taken(node: yaml.Node | None, path: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
    """Remove the entry of a dotted key from nested mappings and return its key and value; None: there is none."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for pair in node.value:
        if isinstance(pair[0], yaml.ScalarNode) and pair[0].value == path[0]:
            if len(path) > 1:
                return _taken(pair[1], path[1:])
            node.value.remove(pair)
            return pair
    return None


def _section(node: Any, path: Sequence[str]) -> yaml.MappingNode:
    """The mapping of a dotted key, created if it is missing."""
    for name in path:
        found = [child for key, child in node.value if key.value == name and isinstance(child, yaml.MappingNode)]
        if not found:
            found = [yaml.MappingNode("map", [], node.start_mark)]
            node.value.append((yaml.ScalarNode("str", name, node.start_mark), found[0]))
        node = found[0]
    return cast(yaml.MappingNode, node)


def _override(text: str) -> yaml.Node:
    """"a.b=value" as the node of {a: {b: value}}."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {printable(text)}: not of the form dotted.key=value")
    node = _compose(value, f"--set {printable(text)}") or yaml.ScalarNode("null", "")
    for name in reversed(key.strip().split(".")):
        node = yaml.MappingNode("map", [(yaml.ScalarNode("str", name), node)])
    return node


class _Reader:
    """Applies a node tree to a configuration, by the declared types.

    ``source`` is a file, whose lines become origins, or the override that ``origin`` stands for.
    """

    def __init__(self, kind: type, source: str, origin: str | None, origins: dict[str, str]) -> None:
        self.kind, self.source, self.origin, self.origins = kind, source, origin, origins

    def place(self, node: yaml.Node) -> str:
        return self.source if self.origin else f"{self.source}:{node.start_mark.line + 1}"

    def read(self, config: T, node: yaml.Node) -> T:
        try:
            return cast(T, self.value(self.kind, config, node, ""))
        except RecursionError as error:
            raise UserError(f"{self.place(node)}: nested too deeply") from error

    def fail(self, node: yaml.Node, key: str, problem: str) -> NoReturn:
        raise UserError(f"{printable(self.place(node))}: {printable(f'{key}: ' if key else '')}{problem}")

    def wrong(self, node: yaml.Node, key: str, wanted: str) -> NoReturn:
        self.fail(node, key, f"wanted {wanted} (found {_shown(node)})")

    def value(self, hint: Any, current: Any, node: yaml.Node, key: str) -> Any:
        """``node`` as the declared type ``hint``, or ``current`` with what the node sets."""
        if get_origin(hint) in (Union, types.UnionType):
            return self.optional(hint, current, node, key)
        if is_dataclass(hint):
            items = {field.name: getattr(current, field.name) for field in fields(current)}
            hints = get_type_hints(type(current))
            changed = {name: self.value(hints[name], items[name], child, join(key, name))
                       for name, child in self.pairs(node, key, list(items))}
            return replace(current, **changed)
        if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            changed = {name: self.value(get_args(hint)[1], current[name], child, join(key, name))
                       for name, child in self.pairs(node, key, list(current))}
            return {**current, **changed}
        self.origins[key] = self.origin or self.place(node)
        if get_origin(hint) is dict:
            return {**current, **{name: self.free(child, join(key, name)) for name, child in self.pairs(node, key, None)}}
        if get_origin(hint) is tuple:
            return self.items(hint, node, key)
        return self.scalar(hint, node, key)

    def optional(self, hint: Any, current: Any, node: yaml.Node, key: str) -> Any:
        (inner,) = (option for option in get_args(hint) if option is not types.NoneType)
        if _is_null(node):
            self.origins[key] = self.origin or self.place(node)
            return None
        return self.value(inner, current, node, key)

    def pairs(self, node: yaml.Node, key: str, names: list[str] | None) -> Iterator[tuple[str, yaml.Node]]:
        """The entries of a mapping; ``names`` are the keys that may be set, None: any."""
        if _is_null(node):  # a section whose lines are all comments
            return
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, key or "the configuration", f"keys and values{f': {_listed(names)}' if names else ''}")
        seen: dict[str, yaml.Node] = {}
        for name_node, child in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                self.wrong(name_node, key, "a plain key")
            name = name_node.value
            if name in seen:
                first = printable(self.place(seen[name]))
                self.fail(name_node, join(key, name), f"set twice (first at {first}) - remove one")
            if names is not None and name not in names:
                self.fail(name_node, join(key, name), f"unknown key{self.suggestion(key, name, names)}")
            seen[name] = name_node
            yield name, child

    def suggestion(self, key: str, name: str, names: list[str]) -> str:
        """The nearest key: a sibling, or else a key of that name elsewhere."""
        folded = {other.lower().replace("-", "_"): other for other in names}
        # short names: one wrong letter of two is already half of them
        close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6 if len(name) > 3 else 0.4)
        elsewhere = [other for other in flatten(self.kind()) if other.rpartition(".")[2] == name]
        if elsewhere:
            return f" - did you mean {elsewhere[0]!r}?"
        if close:
            return f" - did you mean {join(key, folded[close[0]])!r}?"
        return f" - choose from {_listed(names)}"

    def items(self, hint: Any, node: yaml.Node, key: str) -> tuple[Any, ...]:
        kinds = get_args(hint)
        endless = kinds[-1] is Ellipsis
        example = "[a, b]" if kinds[0] is str else "[1, 2]"
        wanted = f"a list such as {example}{'' if endless else f' with {len(kinds)} items'}"
        if not isinstance(node, yaml.SequenceNode) or not (endless or len(node.value) == len(kinds)):
            self.wrong(node, key, wanted)
        return tuple(self.scalar(kinds[0] if endless else kinds[index], child, f"{key}[{index}]")
                     for index, child in enumerate(node.value))

    def scalar(self, hint: Any, node: yaml.Node, key: str) -> Any:
        choices = get_args(hint) if get_origin(hint) is Literal else None
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, "a choice")
        if not isinstance(node, yaml.ScalarNode):
            self.wrong(node, key, f"one of {_listed(choices)}" if choices else wanted)
        text, plain = node.value, _is_plain(node)
        if choices is not None:
            if text not in choices:
                self.fail(node, key, f"unknown value (found {_shown(node)}){nearest(text, choices)}")
            return text
        if hint is str and not _is_null(node):
            return text
        if hint is bool and plain and text in _BOOL:
            return _BOOL[text]
        if hint is float and plain and _NOT_FINITE.fullmatch(text):
            self.wrong(node, key, "a finite number")
        pattern = {int: _INT, float: _FLOAT}.get(hint)
        if pattern is not None and plain and pattern.fullmatch(text):
            return self.number(hint, node, key)
        self.wrong(node, key, wanted)

    def number(self, hint: type, node: yaml.Node, key: str) -> float:
        if hint is int and sum(map(str.isdigit, node.value)) > _MAX_DIGITS:
            self.wrong(node, key, "a smaller number")
        number = hint(node.value)
        if not math.isfinite(number):
            self.wrong(node, key, "a finite number")
        return number

    def free(self, node: yaml.Node, key: str) -> Any:
        """A value without a declared type, parsed by its form."""
        if isinstance(node, yaml.MappingNode):
            return {name: self.free(child, join(key, name)) for name, child in self.pairs(node, key, None)}
        if isinstance(node, yaml.SequenceNode):
            return [self.free(child, f"{key}[{index}]") for index, child in enumerate(node.value)]
        if _is_null(node):
            return None
        if not _is_plain(node):
            return node.value
        if node.value in _BOOL:
            return _BOOL[node.value]
        if _INT.fullmatch(node.value):
            return self.number(int, node, key)
        if _FLOAT.fullmatch(node.value):
            return self.number(float, node, key)
        if _NOT_FINITE.fullmatch(node.value) and node.value[-1].isalpha() and "." in node.value:
            self.wrong(node, key, "a finite number")
        return node.value


def _is_plain(node: yaml.Node) -> bool:
    """A scalar without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _is_null(node: yaml.Node) -> bool:
    return _is_plain(node) and node.value in _NULL


def _listed(names: Sequence[Any] | None) -> str:
    return ", ".join(str(name) for name in names or ())


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
    if not _is_plain(node):
        return f'the text "{printable(text)}"'
    return f"'{printable(text)}'" if text else "nothing"
