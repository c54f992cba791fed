"""Several COCO JSONs as one, for the second round of labelling: classes are matched by name, ids are given anew."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dtg_core.data.findings import Report
from dtg_core.errors import UserError

LACKING = "classes are in other files but not in this one - if its images show them, what is seen of them is taught as background"


def merged(contents: Mapping[str, Mapping[str, Any]], folders: Sequence[str], report: Report) -> dict[str, Any]:
    """One COCO content with the images and annotations of all.

    Args:
        contents: checked content (see ``parse_coco``) by the name of its file.
        folders: of each file, where its images are, relative to the folder of the merged file's images.
        report: collects what is odd.

    Returns:
        The content, with ids from 1. Other keys of images and annotations stay as they are.

    Raises:
        UserError: an image is in two of the files.
    """
    # As ``load_coco`` orders them, so that ``--init`` finds the classes of a run on the first file in their old places.
    ordered = [sorted(content["categories"], key=lambda category: category["id"]) for content in contents.values()]
    names = list(dict.fromkeys(category["name"] for categories in ordered for category in categories))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    source: dict[str, str] = {}  # of each image file
    for (file, content), folder in zip(contents.items(), folders, strict=True):
        own = {category["id"]: category["name"] for category in content["categories"]}
        report.add(file, LACKING, (name for name in names if name not in own.values()))
        number = {}
        for image in content["images"]:
            path = os.path.normpath(PurePosixPath(folder, image["file_name"]))
            if path in source:
                raise UserError(f"{file}: the image {path!r} is in {source[path]}, too - take it out of one of the two")
            source[path] = file
            number[image["id"]] = len(images) + 1
            images.append({**image, "id": len(images) + 1, "file_name": path})
        for annotation in content["annotations"]:
            changed = {"id": len(annotations) + 1, "image_id": number[annotation["image_id"]],
                       "category_id": names.index(own[annotation["category_id"]]) + 1}  # fmt: skip
            annotations.append({**annotation, **changed})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
