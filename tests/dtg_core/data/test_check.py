"""Near copies by their signatures; and the processes that look at images end with the one that started them."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from conftest import ROOT
from PIL import Image

from dtg_core.data.check import Look, LookedAt, check_shared
from dtg_core.data.findings import Report

WORKERS = 8  # most of them idle, as images are dealt in chunks


def test_ctrl_c_ends_workers_without_a_word(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.jpg")
    for number in range(1, 40):
        (tmp_path / f"{number}.jpg").hardlink_to(tmp_path / "0.jpg")
    (tmp_path / "own.json").write_text(json.dumps({
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 2000, "height": 1500} for number in range(40)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [5, 5, 200, 200]}], "categories": [{"id": 1, "name": "thing"}],
    }))  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), "--annotations", str(tmp_path / "own.json"), "--workers", str(WORKERS)]
    check = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(psutil.Process(check.pid).children()) < WORKERS:
        assert check.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(check.pid, signal.SIGINT)  # as a terminal does
    out, err = check.communicate(timeout=60)
    assert (check.returncode, out, err) == (130, "", "interrupted\n")


def test_near_copies_differ_in_up_to_three_bits_and_are_not_plain() -> None:
    busy, plain, report = 0xFF00FF00FF00FF00, 0b1111111, Report()
    looks = [Look(None, (), bytes([number]), bits) for number, bits in enumerate((busy, plain, busy ^ 0b111, busy ^ 0b1111, plain))]
    other, own = SimpleNamespace(file_names=["busy", "plain"]), SimpleNamespace(file_names=["three", "four", "none"])
    check_shared(LookedAt(own, Path("own.json"), looks[2:]), LookedAt(other, Path("other.json"), looks[:2]), report)  # type: ignore[arg-type]
    assert report.lines() == ["own.json: IMAGES LOOK LIKE ONES OF other.json (1: three ~ busy)"]
