"""Report pages: self-contained, escaped whatever is filled in; charts that show their numbers."""

import base64
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError

from defi import html
from Step1_GFDM.gallery import write_gallery

VOID = {"meta", "img"}
HOSTILE = "<script>alert('$x^')</script>\"onerror=alert(1) {{ 7 * 7 }} & $\\frac$"
PAGES = [str(file.relative_to(html.ROOT)) for file in html.ROOT.glob("*/**/*.html.j2")]


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects what a browser would load, and what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text())
    assert not parser.open
    return parser


def gallery(folder: Path, words: str = "push it") -> Path:
    """A page with everything: figures, videos, captions, charts, notes."""
    (folder / "clip.mp4").write_bytes(b"not decoded here")
    figures = {"psnr": [30.0, 20.0, 10.0], "psnr_still": [30.0, float("nan"), 5.0]}
    figures["one_step"] = {"latents": [0.0, 0.1, 0.2], "latents_still": [0.0, 0.2, 0.3], "features": None}
    figures["fvd"] = {"imagined": 1.0, "still": 2.0, "clips": 3, "warning": words}
    metrics = {"checkpoint": words, "split": "val", **figures, "sets": {words: figures, "other": figures}}
    films = {name: {folder / "clip.mp4": words} for name in metrics["sets"]}
    write_gallery(folder / "deep" / "gallery.html", films, metrics)
    return folder / "deep" / "gallery.html"


def test_a_page_is_self_contained_and_balanced(tmp_path: Path) -> None:
    page = parse(gallery(tmp_path))
    assert "Imagined futures" in page.text and "FVD 1.0" in page.text and "prefers-color-scheme" in page.text
    assert len(page.sources) == 2 + 3 * 2 and all(source.startswith("data:") for source in page.sources)
    video = next(source for source in page.sources if source.startswith("data:video/mp4;base64,"))
    assert base64.b64decode(video.partition(",")[2]) == b"not decoded here"


def test_whatever_is_filled_in_is_text(tmp_path: Path) -> None:
    page = parse(gallery(tmp_path, HOSTILE))
    assert page.text.count(HOSTILE) >= 5 and "script" not in page.tags
    assert "onerror" not in page.attributes and all(source.startswith("data:") for source in page.sources)


@pytest.mark.parametrize("template", PAGES)
def test_no_template_switches_escaping_off(template: str) -> None:
    text = (html.ROOT / template).read_text()
    assert "autoescape" not in text and "safe" not in text and len(PAGES) >= 8


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="subtitle"):
        html.write_page(tmp_path / "page.html", "defi/assets/page.html.j2", title="a page")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- charts


def svg(address: str) -> ET.Element:
    kind, _, data = address.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return ET.fromstring(base64.b64decode(data))


def test_a_chart_is_a_picture_of_words_that_run_nothing() -> None:
    address = html.embed(html.line_chart({HOSTILE: ([0, 1], [1.0, 2.0])}, x_label=HOSTILE))
    tags = {element.tag.rpartition("}")[2] for element in svg(address).iter()}
    assert "path" in tags and "script" not in tags
    assert address == html.embed(html.line_chart({HOSTILE: ([0, 1], [1.0, 2.0])}, x_label=HOSTILE))


def test_a_chart_shows_its_numbers_and_leaves_gaps() -> None:
    (axis,) = html.line_chart(
        {"a": (range(4), [3.0, float("nan"), 0.0, -1.0])}, x_label="step", log_y=True
    ).axes
    (line,) = axis.lines
    np.testing.assert_array_equal(line.get_ydata(), [3.0, np.nan, 0.0, -1.0])
    assert axis.get_yscale() == "log" and axis.get_xlabel() == "step"


def test_long_curves_are_thinned_but_keep_their_ends() -> None:
    (axis,) = html.line_chart({"a": (range(100_000), range(100_000))}, x_label="").axes
    (line,) = axis.lines
    assert len(line.get_xdata()) <= 500 and set(line.get_xdata()[[0, -1]]) == {0, 99_999}
    wave = html.line_chart({"a": (range(100_000), np.sin(range(100_000)))}, x_label="")
    assert len(html.embed(wave)) < 100_000


@pytest.mark.parametrize("curves", [{}, {"a": ([], [])}, {"a": ([1], [5.0])}, {"a": ([0, 1], [0.0, 0.0])}])
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_of_little_data_still_draw(curves: dict, log_y: bool) -> None:
    svg(html.embed(html.line_chart(curves, x_label="", log_y=log_y)))


def test_numbers_are_not_code(tmp_path: Path) -> None:
    """A health.json or results.json of others holds texts where numbers belong."""
    page = html.TEMPLATES.get_template("defi/assets/page.html.j2")
    assert "<script" not in page.render(title=json.dumps({"a": HOSTILE}), subtitle=[HOSTILE])
