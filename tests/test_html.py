"""Report pages: self-contained, escaped, and charts that show the numbers they are given."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from defi import html

VOID = {"meta", "img", "line", "circle", "polyline"}


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects what a browser would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    return parser


def test_page_is_self_contained_and_balanced(tmp_path):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    (tmp_path / "clip.mp4").write_bytes(b"not decoded here")
    path = html.write_page(
        tmp_path / "deep" / "report.html",
        "A page",
        html.section("One", html.paragraph("text"), html.cards({"average": 1.5}), html.code("a=1 && b")),
        html.section(
            "Two", html.grid(html.picture(pixels, "small"), html.video(tmp_path / "clip.mp4", "clip"))
        ),
        html.line_chart({"loss": ([0, 1, 2], [3.0, 2.0, float("nan")])}, title="Loss", x_label="step"),
        html.bars({"open_drawer": 0.5}),
        subtitle="all of it",
    )
    parsed = parse(path.read_text())
    assert "A page" in parsed.text and "a=1 && b" in parsed.text and "50 %" in parsed.text
    assert parsed.sources and all(source.startswith("data:") for source in parsed.sources)
    picture = next(source for source in parsed.sources if source.startswith("data:image/png"))
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
    "block",
    [
        html.page("<x>", subtitle="<x>"),
        html.section("<x>"),
        html.paragraph("<x>"),
        html.code("<x>"),
        html.cards({"<x>": "<x>"}),
        html.table(["<x>"], [["<x>"]], caption="<x>"),
        html.picture(np.zeros((4, 4, 3), np.uint8), "<x>"),
        html.video(b"", "<x>"),
        html.bars({"<x>": 1.0}, texts={"<x>": "<x>"}),
        html.line_chart({"<x>": ([0], [0])}, title="<x>", x_label="<x>", y_label="<x>"),
        html.link("<x>", 'https://a.example/"<x>'),
    ],
)
def test_text_is_escaped(block):
    assert "<x>" not in block and "&lt;x&gt;" in block


def test_table_aligns_numbers_and_refuses_ragged_rows():
    block = html.table(["name", "rate"], [["a", 0.123456], ["b", 2]], strong=[1])
    assert block.count('td class="number"') == 2 and "0.123<" in block
    assert block.count('tr class="strong"') == 1
    with pytest.raises(ValueError, match="2 columns"):
        html.table(["name", "rate"], [["a"]])


def curve_points(chart: Markup) -> list[np.ndarray]:
    found = re.findall(r'points="([^"]+)"', chart)
    return [np.array([[float(v) for v in point.split(",")] for point in line.split()]) for line in found]


def test_line_chart_is_proportional_and_shows_gaps():
    y = [0.0, 1.0, 4.0, float("nan"), 2.0, 3.0]
    first, second = curve_points(html.line_chart({"a": (range(6), y)}))
    assert len(first) == 3 and len(second) == 2  # the gap splits the curve
    heights = first[:, 1]
    assert heights[0] - heights[2] == pytest.approx(4 * (heights[0] - heights[1]), abs=0.3)
    steps = np.diff(np.concatenate([first, second])[:, 0])
    np.testing.assert_allclose(steps, [steps[0], steps[0], 2 * steps[0], steps[0]], atol=0.2)


def test_log_chart_spaces_decades_evenly():
    (points,) = curve_points(html.line_chart({"a": ([0, 1, 2, 3], [1, 10, 100, 1000])}, log_y=True))
    np.testing.assert_allclose(np.diff(points[:, 1]), np.diff(points[:, 1])[0], atol=0.2)


def test_long_curves_are_thinned_but_keep_their_ends():
    (points,) = curve_points(html.line_chart({"a": (range(100_000), range(100_000))}))
    assert len(points) < 500
    assert points[-1, 0] == pytest.approx(628, abs=0.5)


@pytest.mark.parametrize("curves", [{}, {"a": ([], [])}, {"a": ([1], [5.0])}, {"a": ([0, 1], [0.0, 0.0])}])
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_of_little_data_still_draw(curves, log_y):
    parse(html.line_chart(curves, log_y=log_y))
