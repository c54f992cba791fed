"""Configuration dataclasses as flat dictionaries and as YAML text; ``dtg_core.settings`` reads it.

    flatten        {"optim.lr": 0.01, ...}
    to_yaml        every value, in a form that ``load_config`` reads back equal
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dtg_core.errors import printable

_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)


def flatten(config: Any) -> dict[str, Any]:
    """{dotted key: value} of every value, in declaration order; free-form dictionaries and tuples are values."""
    return dict(_leaves(config, ""))


def dotted(content: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries; empty dictionaries and lists are values."""
    if not isinstance(content, dict) or (key and not content):
        return {key: content}
    parts = (dotted(inner, f"{key}.{child}" if key else child) for child, inner in content.items())
    return {name: value for part in parts for name, value in part.items()}


def to_yaml(config: Any, origins: Mapping[str, str] | None = None) -> str:
    """The complete configuration as YAML; with ``origins`` each line ends with a comment that names its value's origin."""
    lines = list(_lines(config, "", 0))
    width = min(max((len(line) for line, _ in lines), default=0), 60)
    if origins is not None:
        lines = [(f"{line:<{width}}  # {printable(origins[key])}" if key in origins else line, key) for line, key in lines]
    return "".join(f"{line}\n" for line, _ in lines)


def yaml_scalar(value: object) -> str:
    """None, a bool, number, text, list or dictionary in YAML's flow syntax, on one line, as ``load_config`` reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")  # 1e-05 is text to other readers
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(yaml_scalar, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{yaml_scalar(str(key))}: {yaml_scalar(item)}' for key, item in value.items())}}}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}:
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(quoted)}"'


def join(key: str, name: str) -> str:
    """The key of a section's entry."""
    return f"{key}.{name}" if key else name


def _children(value: Any) -> dict[str, Any] | None:
    """The named parts of a section, None for a value."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict) and value and all(is_dataclass(item) for item in value.values()):
        return value
    return None


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    children = _children(value)
    if children is None:
        yield key, value
        return
    for name, child in children.items():
        yield from _leaves(child, join(key, name))


def _lines(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    """(line, key) of each entry of a section."""
    for name, child in (_children(value) or {}).items():
        head = f"{'  ' * depth}{yaml_scalar(name)}:"
        if _children(child) is None:
            yield f"{head} {yaml_scalar(child)}", join(key, name)
        else:
            yield head, join(key, name)
            yield from _lines(child, join(key, name), depth + 1)
