"""Pictures of strangers: decoded, or refused as damaged; nothing else can happen."""

import io
import multiprocessing
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_mutations import damage_bytes
from PIL import Image

from defi.errors import UserError
from defi.picture import decode_picture, encode_picture

FRAME = np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8)


def test_jpeg_and_png_in_colour() -> None:
    assert np.array_equal(decode_picture(encode_picture(FRAME, "PNG"), "a.png"), FRAME)
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    coded = encode_picture(smooth, "JPEG")
    found = decode_picture(coded + b"\0" * 99, "a.jpg")  # padded, as HDF5 files keep them
    assert found.shape == smooth.shape and np.abs(found.astype(int) - smooth).max() < 40
    grey = decode_picture(encode_picture(smooth[..., 0], "PNG"), "a.png")
    assert np.array_equal(grey, np.repeat(smooth[..., :1], 3, axis=2))


@pytest.mark.parametrize("form", ["GIF", "EPS", "TIFF", "WEBP"])
def test_other_formats_are_refused(form: str) -> None:
    """An EPS file, say, is drawn by a program."""
    with pytest.raises(UserError, match=r"a\.png: .*neither JPEG nor PNG"):
        decode_picture(encode_picture(FRAME, form), "a.png")


def test_small_files_may_not_become_large_pictures() -> None:
    jpeg = bytearray(encode_picture(FRAME, "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(UserError, match="4225000000 pixels"):
        decode_picture(bytes(jpeg), "a.jpg")
    png = bytearray(encode_picture(FRAME, "PNG"))
    png[16:24] = (65_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(UserError, match="4225000000 pixels"):
        decode_picture(bytes(png), "a.png")


def _decode_damaged(count: int, done: Path) -> None:
    valid = [
        encode_picture(FRAME, "JPEG"),
        encode_picture(FRAME, "PNG"),
        encode_picture(FRAME[..., 0], "PNG"),
    ]
    progressive = io.BytesIO()
    Image.fromarray(FRAME).save(progressive, "JPEG", progressive=True)
    outcomes = []
    for number in range(count):
        chance = random.Random(number)
        try:
            coded = damage_bytes(chance.choice([*valid, progressive.getvalue()]), chance)
            picture = decode_picture(coded, "a picture")
            outcomes.append(picture.dtype == np.uint8 and picture.shape[2:] == (3,))
        except UserError:
            outcomes.append(True)
    done.write_text(str(sum(outcomes)))


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_pictures(count: int, tmp_path: Path) -> None:
    """In a process of its own: what would fail here is a decoder in C."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_decode_damaged, args=(count, tmp_path / "done"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "done").read_text() == str(count)
