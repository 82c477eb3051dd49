"""Instructions as data sets hold them: a text, whatever it is wrapped in."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from defi.errors import UserError

UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})  # Unicode's controls, marks, blanks
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing
BYTE_ORDER_MARK = "\ufeff"  # with which some programs begin their texts


def read_instruction(value: Any, where: str) -> str:
    """The text in what a data set has in its place; "" if it is blank.

    A text, its bytes in UTF-8, or one of these in lists and arrays, several times perhaps.

    where: what it is, for errors ("<file>: the text of span 3").

    Raises:
        UserError: it is something else, none at all say, or several texts.
    """
    try:
        text = _text(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is {error}; expected is one text in UTF-8") from None
    blank = all(unicodedata.category(sign) in UNSEEN or sign in FILLERS for sign in text)
    return "" if blank else text


def read_instructions(values: Iterable[Any], where: str) -> list[str]:
    """The texts among some values; blank ones and, as long as there is a text, others are passed over."""
    texts, faults = [], []
    for value in values:
        try:
            texts.append(read_instruction(value, where))
        except UserError as error:
            faults.append(error)
    texts = list(filter(None, texts))
    if faults and not texts:
        raise faults[0]
    return texts


def is_utf8(text: str) -> bool:
    """Whether a text, a file's name say, was UTF-8: of other bytes Python makes surrogates."""
    return not re.search("[\ud800-\udfff]", text)


def _text(value: Any) -> str:
    """Raises ValueError that says what is there instead."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        texts = {_text(item) for item in value}
        if len(texts) != 1:
            raise ValueError(f"a list of {len(texts)} texts")
        (value,) = texts
    if isinstance(value, bytes):
        value = value.rstrip(b"\0").decode(errors="surrogateescape")
    if not isinstance(value, str):
        known = value is None or isinstance(value, (int, float))
        raise ValueError(f"{value!r}" if known else f"a {type(value).__name__}")
    if not is_utf8(value):
        raise ValueError(f"not UTF-8 ({value[:40]!r})")
    return value.removeprefix(BYTE_ORDER_MARK)
