"""A detector's initial weights from a file of an earlier run, even one with other classes.

The layers that depend on the classes are those whose shapes change when the same detector is built with one more class, so no
detector has to name its head.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from dtg_core.engine.checkpoint import load_into, load_weights
from dtg_core.errors import UserError


def start_from(
    path: Path, detector: nn.Module, build: Callable[[int], nn.Module], class_names: Sequence[str], reset_head: bool
) -> list[str]:
    """Load a weights file into a fresh detector.

    Args:
        path: the file; for this project's files the classes are compared too.
        detector: made by ``build`` for ``class_names``; changed.
        build: makes the detector for a number of classes, without reading any weights.
        class_names: of the labelled data.
        reset_head: keep the detector's own random weights in the layers that depend on the classes.

    Returns:
        Warnings: how many tensors were not taken from the file.

    Raises:
        UserError: not a weights file; for other classes, unless ``reset_head``; for another architecture. Then nothing has been
            changed.
    """
    tensors, metadata = load_weights(path)
    own = detector.state_dict()
    theirs = metadata.get("class_names")
    misfits = {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    if not (reset_head or misfits or (theirs is not None and list(theirs) != list(class_names))):
        load_into(detector, tensors, path)
        return []
    other = build(len(class_names) + 1).state_dict()
    head = {name for name, tensor in own.items() if other[name].shape != tensor.shape}
    load = tensors | {name: own[name] for name in head}
    if reset_head:
        load_into(detector, load, path)
        return [f"{path}: {len(head)} of {len(own)} tensors start at random, because they depend on the classes "
                f"({', '.join(sorted(head)[:3])}{', ...' if len(head) > 3 else ''})"]
    if misfits <= head and own.keys() == tensors.keys():
        if theirs is not None and sorted(map(str, theirs)) == sorted(class_names):
            raise UserError(f"{path}: made for the same classes in another order - number the categories so that their ids ascend "
                            f"as in {list(theirs)}, or give --reset-head to train the layers that depend on them from scratch")
        found = _of_classes(theirs) if theirs is not None else f"{len(misfits)} tensors of other shapes"
        raise UserError(f"{path}: made for other classes ({found}; the data has {_of_classes(class_names)}) - give --reset-head to "
                        "train the layers that depend on them from scratch")
    load_into(detector, tensors, path)  # raises, naming what does not fit
    return []


def _of_classes(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"
