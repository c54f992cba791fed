"""Locks of run folders; what they may hold is tested from the command line's end."""
from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from dtg_core.engine.folder import RunFolder
from dtg_core.errors import UserError


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse(monkeypatch, number)
    folder = RunFolder(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        folder.open(resume=False, overwrite=False)
    assert folder.lock is not None
    folder.lock.close()
    assert caplog.messages == [f"{tmp_path / 'run'}: cannot be locked ({os.strerror(number)}), so a second run in it would not be "
                               "noticed"]  # fmt: skip


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_folder_that_another_process_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / ".lock").write_text("7 on there")
    refuse(monkeypatch, number)
    with pytest.raises(UserError, match=r"another run is using it \(process 7 on there\)"):
        RunFolder(tmp_path).open(resume=True, overwrite=False)
