"""Self-contained report pages: one file, no network, readable in light and dark.

A page is put together from blocks. A block is `Markup`; plain strings given to any of these functions are
escaped, so an instruction or a file name can hold anything. Pictures and videos are embedded, charts are
drawn as SVG with the page's colours.

    write_page(path, "Rollout", section("Result", table(["limit", "average"], rows), video("chain_0.mp4")))
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from defi.engine.output import write_file

Block = Markup | str

STYLE = Path(__file__).parent / "assets" / "report.css"


def page(title: str, *blocks: Block, subtitle: str = "") -> Markup:
    """A whole HTML document."""
    return Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{title}</title><style>{style}</style></head>\n"
        "<body><h1>{title}</h1>{subtitle}\n{body}\n</body></html>\n"
    ).format(
        title=title,
        style=Markup(STYLE.read_text()),
        subtitle=note(subtitle) if subtitle else "",
        body=join(blocks),
    )


def write_page(path: Path | str, title: str, *blocks: Block, subtitle: str = "") -> Path:
    """Write a page, replacing an older one in one step; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, page(title, *blocks, subtitle=subtitle))
    return path


def join(blocks: Iterable[Block]) -> Markup:
    """Blocks below each other."""
    return Markup("\n").join(blocks)


def section(title: str, *blocks: Block) -> Markup:
    """A titled part of the page."""
    return Markup("<section><h2>{}</h2>\n{}</section>").format(title, join(blocks))


def subsection(title: str, *blocks: Block) -> Markup:
    """A titled part of a section."""
    return Markup("<h3>{}</h3>\n{}").format(title, join(blocks))


def paragraph(text: Block) -> Markup:
    return Markup("<p>{}</p>").format(text)


def note(text: Block) -> Markup:
    """A paragraph in a quieter colour: units, sources, conditions."""
    return Markup('<p class="soft">{}</p>').format(text)


def link(text: str, address: str) -> Markup:
    return Markup('<a href="{}">{}</a>').format(address, text)


def code(text: str) -> Markup:
    """Commands or settings, in a fixed-width box."""
    return Markup("<pre>{}</pre>").format(text)


def cards(figures: Mapping[str, object]) -> Markup:
    """The few numbers that matter most, large: {label: value}."""
    return Markup('<div class="cards">{}</div>').format(
        join(
            Markup('<div><b>{}</b><span class="soft">{}</span></div>').format(_cell(v), k)
            for k, v in figures.items()
        )
    )


def grid(*blocks: Block, width: int = 280) -> Markup:
    """Blocks beside each other, each at least `width` CSS pixels wide."""
    style = f"grid-template-columns: repeat(auto-fill, minmax(min({int(width)}px, 100%), 1fr))"
    return Markup('<div class="grid" style="{}">{}</div>').format(style, join(blocks))


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", strong: Iterable[int] = ()
) -> Markup:
    """A table. Columns that hold only numbers are aligned right; rows whose index is in `strong` are bold."""
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(header)} columns: {row}")
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    kinds = [Markup(' class="number"') if n else "" for n in numeric]
    head = join(Markup("<th{}>{}</th>").format(kind, cell) for kind, cell in zip(kinds, header))
    strong = set(strong)
    body = join(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="strong"') if i in strong else "",
            join(Markup("<td{}>{}</td>").format(kind, _cell(cell)) for kind, cell in zip(kinds, row)),
        )
        for i, row in enumerate(rows)
    )
    title = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return Markup(
        '<div class="wide"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(title, head, body)


def picture(source: np.ndarray | Path | str, caption: Block = "", *, width: int | None = None) -> Markup:
    """An embedded picture: uint8 [H,W,3] or [H,W], or a PNG, JPEG or SVG file. `width` in CSS pixels.

    Arrays narrower than 64 pixels are enlarged without smoothing.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ValueError(f"pictures are uint8, not {source.dtype}")
        buffer = io.BytesIO()
        Image.fromarray(source).save(buffer, format="PNG", optimize=True)
        data, kind, pixels = buffer.getvalue(), "png", source.shape[1] < 64
    else:
        data, kind, pixels = Path(source).read_bytes(), _picture_kind(Path(source)), False
    return Markup('<figure><img{} src="data:image/{};base64,{}"{} alt="{}">{}</figure>').format(
        Markup(' class="pixels"') if pixels else "",
        kind,
        base64.b64encode(data).decode(),
        Markup(' style="width: {}px"').format(int(width)) if width else "",
        escape(caption).striptags(),
        _figcaption(caption),
    )


def video(source: bytes | Path | str, caption: Block = "", *, width: int | None = None) -> Markup:
    """An embedded MP4 that plays muted, in a loop, from the moment the page opens."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return Markup(
        '<figure><video autoplay loop muted playsinline controls preload="auto"{} '
        'src="data:video/mp4;base64,{}"></video>{}</figure>'
    ).format(
        Markup(' style="width: {}px"').format(int(width)) if width else "",
        base64.b64encode(data).decode(),
        _figcaption(caption),
    )


def bars(
    values: Mapping[str, float], *, texts: Mapping[str, str] | None = None, highest: float = 1.0
) -> Markup:
    """Horizontal bars from 0 to `highest`, one per label, each followed by its text (default: percent)."""
    rows = []
    for label, value in values.items():
        share = min(max(value / highest, 0.0), 1.0) * 100 if math.isfinite(value) else 0.0
        text = texts[label] if texts else f"{100 * value:.0f} %"
        rows.append(
            Markup('<span>{}</span><div><i style="width: {}%"></i></div><span class="soft">{}</span>').format(
                label, f"{share:.1f}", text
            )
        )
    return Markup('<div class="bars">{}</div>').format(join(rows))


def line_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    log_y: bool = False,
) -> Markup:
    """Curves {name: (x, y)} as SVG. Values that are not finite (on a log axis: not positive) leave gaps."""
    width, height, left, right, top, bottom = 640, 280, 58, 12, 12, 40
    series = {name: _drawable(x, y, log_y) for name, (x, y) in curves.items()}
    xs = [x for points in series.values() for x, _ in points if x is not None] or [0.0, 1.0]
    ys = [y for points in series.values() for _, y in points if y is not None] or [0.1, 1.0]
    y_ticks = (_log_ticks if log_y else _ticks)(min(ys), max(ys))
    across = _scale(min(xs), max(xs), left, width - right)
    up = _scale(y_ticks[0], y_ticks[-1], height - bottom, top, log=log_y)
    parts = []
    for tick, y in ((tick, up(tick)) for tick in y_ticks):
        parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick, x in ((tick, across(tick)) for tick in _ticks(min(xs), max(xs))):
        if left <= x <= width - right:
            anchor = "end" if x > width - 30 else "middle"
            place = f'x="{x:.1f}" y="{height - bottom + 17}" text-anchor="{anchor}"'
            parts.append(f"<text {place}>{_short(tick)}</text>")
    for index, points in enumerate(series.values()):
        parts.append(_path(points, across, up, f"var(--c{index % 6})"))
    place = f'x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle"'
    parts.append(f"<text {place}>{escape(x_label)}</text>")
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    swatch = Markup('<span><i style="background: var(--c{})"></i>{}</span>')
    legend = join(swatch.format(index % 6, name) for index, name in enumerate(series))
    return Markup('<div class="chart">{}{}{}<div class="legend soft">{}</div></div>').format(
        Markup("<h3>{}</h3>").format(title) if title else "",
        note(y_label) if y_label else "",
        Markup(f"<svg {box}>{''.join(parts)}</svg>"),
        legend,
    )


def _figcaption(caption: Block) -> Block:
    return Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""


def _picture_kind(path: Path) -> str:
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg+xml"}
    if path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: not a PNG, JPEG or SVG file")
    return kinds[path.suffix.lower()]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _cell(value: object) -> Block:
    if isinstance(value, (float, np.floating)):
        return f"{value:.3g}"
    return value if isinstance(value, Markup) else str(value)


def _drawable(
    x: Sequence[float], y: Sequence[float], log: bool, most: int = 400
) -> list[tuple[float | None, float | None]]:
    """At most about `most` points; a value that cannot be drawn becomes (None, None), a gap in the curve."""
    stride = max(1, math.ceil(len(x) / most))
    keep = sorted({*range(0, len(x), stride), len(x) - 1}) if len(x) else []
    points = [(float(x[i]), float(y[i])) for i in keep]
    fine = [math.isfinite(a) and math.isfinite(b) and (b > 0 or not log) for a, b in points]
    return [point if good else (None, None) for point, good in zip(points, fine)]


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False):
    turn = math.log10 if log else float
    low, high = turn(low), turn(high)
    span = high - low or 1.0
    return lambda value: start + (turn(value) - low) / span * (end - start)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low … high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover low … high, with 2 and 5 between them where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [m * 10.0**p for p in range(first, last + 1) for m in steps]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    inside = [t for t in ticks if below <= t <= above]
    return inside if len(inside) > 1 else [below, below * 10]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def _path(points, across, up, colour: str) -> str:
    """One curve: a line per stretch between gaps, a dot for a point that stands alone."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if x is None:
            stretches.append([])
        else:
            stretches[-1].append((across(x), up(y)))
    parts = []
    for stretch in stretches:
        if len(stretch) == 1:
            ((x, y),) = stretch
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: {colour}"/>')
        elif stretch:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
            parts.append(f'<polyline class="curve" style="stroke: {colour}" points="{line}"/>')
    return "".join(parts)
