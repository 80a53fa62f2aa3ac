"""The page of results: one self-contained HTML file, with pictures as data URIs and curves as inline SVG."""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_FRAME_MS = 125  # duration of a clip's frame in milliseconds: 8 frames per second
_COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1c1c1e;background:#fff}
.rows{display:flex;flex-wrap:wrap;gap:1rem}.row{border:1px solid #ddd;border-radius:8px;padding:.6rem}
.row>b{display:block;max-width:24rem;font-weight:600;margin-bottom:.4rem}.cells{display:flex;gap:.6rem}
figure{margin:0;width:7.5rem}figure img{width:96px;image-rendering:pixelated;display:block;border:3px solid #ddd}
figure.right img{border-color:#15803d}figure.wrong img{border-color:#b91c1c}
figcaption{font-size:12px;overflow-wrap:anywhere}pre{background:#f6f6f7;padding:1rem;overflow:auto;font-size:12px}
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A picture or clip with its caption.

    Attributes:
        caption: text below the picture.
        pixels: uint8 [H, W, 3] or, for a clip, [T, H, W, 3].
        right: whether the picture is right (green frame) or wrong (red frame); None for a grey frame.
    """

    caption: str
    pixels: np.ndarray
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """The pictures of one case, under its title."""

    title: str
    cells: Sequence[Cell]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line chart: named lines over the same x values. Values are shares from 0 to 1."""

    label: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page: headline, explanation, cases and an optional line chart."""

    title: str
    text: str
    rows: tuple[Row, ...]
    curve: Curve | None = None


def render(title: str, figures: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Returns the HTML of the page. `figures` appear as JSON at its end."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        if section.curve is not None:
            parts.append(line_chart(section.curve))
        parts.append('<div class="rows">')
        parts.extend(_row(row) for row in section.rows)
        parts.append("</div>")
    parts.append(f"<h2>All figures</h2><pre>{html.escape(json.dumps(figures, indent=2))}</pre></body></html>")
    return "\n".join(parts) + "\n"


def _row(row: Row) -> str:
    cells = []
    for cell in row.cells:
        kind = {None: "", True: ' class="right"', False: ' class="wrong"'}[cell.right]
        text = html.escape(cell.caption)
        source = _data_uri(cell.pixels)
        cells.append(f'<figure{kind}><img alt="" src="{source}"><figcaption>{text}</figcaption></figure>')
    return f'<div class="row"><b>{html.escape(row.title)}</b><div class="cells">{"".join(cells)}</div></div>'


def _data_uri(pixels: np.ndarray) -> str:
    """A lossless data URI: PNG for a picture, animated WebP for a clip."""
    stream = io.BytesIO()
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        first, *rest = map(Image.fromarray, pixels)
        first.save(stream, "WEBP", save_all=True, append_images=rest, lossless=True, duration=_FRAME_MS, loop=0)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def line_chart(curve: Curve, width: int = 420, height: int = 220) -> str:
    """The SVG of a line chart, with percent on the y axis."""
    left, right, top, bottom = 46, 70, 12, 40
    span = curve.x[-1] - curve.x[0] or 1.0
    highest = max(0.05, *(value for values in curve.lines.values() for value in values))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * (x - curve.x[0]) / span
        return round(across, 1), round(height - bottom - (height - top - bottom) * y / highest, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="system-ui,sans-serif" font-size="11" role="img">'
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = place(curve.x[0], share * highest)
        parts.append(f'<line x1="{x}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{100 * share * highest:.0f}%</text>')
    for value in curve.x:
        x, y = place(value, 0)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{value:g}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(curve.label)}</text>')
    for (name, values), colour in zip(curve.lines.items(), _COLOURS, strict=False):
        points = [place(x, y) for x, y in zip(curve.x, values, strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)
        x, y = points[-1]
        parts.append(f'<text x="{x + 8}" y="{y + 4}" fill="{colour}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])
