"""Instructions in whatever data sets wrap them in."""

import numpy as np
import pytest

from defi.errors import UserError
from defi.instructions import read_instruction, read_instructions


@pytest.mark.parametrize(
    "value",
    ["lift it", b"lift it", np.str_("lift it"), np.bytes_(b"lift it"), np.array("lift it"), ["lift it"]]
    + [(("lift it",),), np.array([b"lift it"], object), ["lift it"] * 3, b"lift it\0\0", "\ufefflift it"],
    ids=repr,
)
def test_one_text_is_taken_out(value) -> None:
    assert read_instruction(value, "here") == "lift it"


def test_a_text_stays_as_it_is() -> None:
    assert read_instruction("  Lift\\n it. ", "here") == "  Lift\\n it. "


@pytest.mark.parametrize("value", ["", " \t\n", "\u200b", "\u3000\ufeff\u2060", b"\0", [""], np.array("")])
def test_blank_texts_are_none(value) -> None:
    assert read_instruction(value, "here") == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        (float("nan"), "nan"),
        (7, "7"),
        (True, "True"),
        ({}, "a dict"),
        ([], "a list of 0 texts"),
        (["a", "b"], "a list of 2 texts"),
        ([None], "None"),
        (np.zeros((1, 384)), "0.0"),
        (b"T\xfcr", "not UTF-8"),
        ("T\udcfcr", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_named(value, said: str) -> None:
    with pytest.raises(UserError, match=f"^here is {said}.*; expected is one text in UTF-8$"):
        read_instruction(value, "here")


def test_one_good_text_among_several_is_enough() -> None:
    assert read_instructions(["", None, "lift", ["put"]], "here") == ["lift", "put"]
    assert read_instructions(["", " "], "here") == []
    with pytest.raises(UserError, match="here is None"):
        read_instructions(["", None, 3], "here")
