"""The charts of a comparison as one PNG, for slides and chats where no page goes; its text is English."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tunewright.evaluate.charts import COLOURS, Chart
from tunewright.evaluate.frontier import Frontier

_FINE = 2
"""Everything is drawn so many times as large and then made smaller, which smooths edges."""
_PANEL = (800, 420)
_LEFT, _TOP, _RIGHT, _BOTTOM = 74, 56, 40, 62
_ROW = 30
_INK, _MUTED, _GRID, _FRONT = "#17202b", "#5c6979", "#e2e6eb", "#7d8997"


class _Canvas:
    """A panel's box in an image, in percent."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        self.draw = draw
        self.box = (left + _LEFT, top + _TOP, left + _PANEL[0] - _RIGHT, top + _PANEL[1] - _BOTTOM)

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + (right - left) * x / 100) * _FINE, (top + (bottom - top) * y / 100) * _FINE

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2.0) -> None:
        if len(points) > 1:
            self.draw.line(
                [self.at(*p) for p in points], fill=colour, width=round(width * _FINE), joint="curve"
            )

    def dot(self, x: float, y: float, colour: str, filled: bool) -> None:
        middle_x, middle_y = self.at(x, y)
        size = 6 * _FINE
        box = (middle_x - size, middle_y - size, middle_x + size, middle_y + size)
        self.draw.ellipse(box, fill=colour if filled else "white", outline=colour, width=round(2.5 * _FINE))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        anchor: str,
        shift: tuple[int, int] = (0, 0),
        colour: str = _MUTED,
    ) -> None:
        left, top = self.at(x, y)
        _write(self.draw, (left + shift[0] * _FINE, top + shift[1] * _FINE), words, anchor, colour)

    def frame(self, title: str, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> None:
        self.text(0, 0, title, "ls", (-_LEFT + 16, -22), _INK)
        for at, label in up:
            self.line([(0, at), (100, at)], _GRID, 1)
            self.text(0, at, label, "rm", (-10, 0))
        for at, label in across:
            self.text(at, 100, label, "rt" if at == 100 and not label[0].isdigit() else "mt", (0, 10))


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], words: str, anchor: str, colour: str, size: int = 16
) -> None:
    draw.text(at, words, fill=colour, anchor=anchor, font=ImageFont.load_default(size * _FINE))


def png(title: str, names: Sequence[str], fronts: Sequence[Frontier], curves: Sequence[Chart]) -> bytes:
    """Two panels a row: what costs what, then curves; below, which colour is whose."""
    panels: list[Frontier | Chart] = [*fronts, *curves]
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns)
    legend = -(-len(names) // 3)
    width, height = columns * _PANEL[0], 70 + rows * _PANEL[1] + legend * _ROW + 20
    image = Image.new("RGB", (width * _FINE, height * _FINE), "white")
    draw = ImageDraw.Draw(image)
    _write(draw, (16 * _FINE, 40 * _FINE), title, "lm", _INK, 24)
    for number, panel in enumerate(panels):
        canvas = _Canvas(draw, number % columns * _PANEL[0], 70 + number // columns * _PANEL[1])
        _front(canvas, panel) if isinstance(panel, Frontier) else _curves(canvas, panel)
    for number, name in enumerate(names):
        x, y = 16 + number % 3 * (width // 3), 70 + rows * _PANEL[1] + number // 3 * _ROW + 14
        colour = COLOURS[number % len(COLOURS)]
        draw.rounded_rectangle(
            [x * _FINE, (y - 6) * _FINE, (x + 26) * _FINE, (y + 6) * _FINE], 4 * _FINE, fill=colour
        )
        _write(draw, ((x + 36) * _FINE, y * _FINE), name, "lm", _INK)
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(out, "PNG", optimize=True)
    return out.getvalue()


def _front(canvas: _Canvas, front: Frontier) -> None:
    canvas.frame(front.title, front.x, front.y)
    canvas.text(50, 100, front.across, "mt", (0, 34))
    canvas.line(front.line, _FRONT, 1.5)
    for mark in front.marks:
        colour = COLOURS[mark.colour % len(COLOURS)]
        canvas.line([(mark.x, mark.low), (mark.x, mark.high)], colour, 1.5)
        canvas.dot(mark.x, mark.y, colour, mark.efficient)
    for mark in front.marks:
        left = mark.label_left
        canvas.text(mark.x, mark.label_y, mark.name, "rm" if left else "lm", (-12 if left else 12, 0), _INK)


def _curves(canvas: _Canvas, chart: Chart) -> None:
    canvas.frame(chart.title, chart.x, chart.y)
    for name, points in chart.lines.items():
        pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
        canvas.line(
            [(x / 10, y / 10) for x, y in pairs], COLOURS[int(name.partition(" ")[0].removeprefix("c"))]
        )
