"""Files that are whole or not there."""
from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import full_disk

from dtg_core.drafts import draft_of, write_text, writing
from dtg_core.errors import UserError


def test_a_file_that_does_not_fit_leaves_the_older_one(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "file", "old")
    told = r"^there: cannot be written \(File too large\) - give another --output$"
    with pytest.raises(UserError, match=told), writing("there"), full_disk(2):
        write_text(tmp_path / "new" / "file", "newer")
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["old"]


@pytest.mark.parametrize("problem", [OSError, KeyboardInterrupt])
def test_several_files_are_written_together_or_not_at_all(tmp_path: Path, problem: type[BaseException]) -> None:
    def write(*names: str) -> None:
        with ExitStack() as drafts:
            for name in names:
                drafts.enter_context(draft_of(tmp_path / name)).write_text(name)
                assert not (tmp_path / name).exists()
            if "b" in names:
                raise problem

    with pytest.raises(problem):
        write("a", "b")
    assert not list(tmp_path.iterdir())
    write("a", "c")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "c"]


def test_a_reader_that_has_gone_is_not_the_disk() -> None:
    with pytest.raises(BrokenPipeError), writing("there"):
        raise BrokenPipeError
