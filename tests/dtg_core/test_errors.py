"""Hints in error messages, word for word."""
from __future__ import annotations

import pytest

from dtg_core.errors import nearest


@pytest.mark.parametrize(("word", "choices", "hint"), [
    ("dens", ["sparse", "dense"], " - did you mean 'dense'?"),
    ("xyz", ["sparse", "dense"], " - choose from dense, sparse"),
    ("xyz", [f"a{number:02d}" for number in range(12)], " - choose from " + ", ".join(f"a{number:02d}" for number in range(12))),
    ("xyz", [f"a{number:02d}" for number in range(15)],
     " - choose from " + ", ".join(f"a{number:02d}" for number in range(12)) + " or 3 more"),
])  # fmt: skip
def test_a_misspelt_word_gets_the_nearest_choice_or_all(word, choices, hint):
    assert nearest(word, choices) == hint


def test_a_remedy_of_ones_own_replaces_the_choices_only():
    assert nearest("xyz", ["dense"], "see --help") == " - see --help"
    assert nearest("dens", ["dense"], "see --help") == " - did you mean 'dense'?"
