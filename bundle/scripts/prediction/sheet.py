"""The report on two A4 pages as a PDF: the main results and the pictures; then all text, in columns.

Text is broken by the widths of its letters and set smaller until all of it fits; what does not fit at the smallest
size is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath
from PIL import Image

from scripts.cohorts.files import written_whole
from scripts.prediction.findings import Section

if TYPE_CHECKING:
    from scripts.prediction.report import Report

WIDTH_MM, HEIGHT_MM, MARGIN_MM = 210.0, 297.0, 12.0
INNER_MM, COLUMN_GAP_MM, GAP_MM = WIDTH_MM - 2 * MARGIN_MM, 8.0, 1.0
OVERVIEW_MM = 50.0  # height of the projections and of the curve
TILES = 5  # in a row
MOST_WARNINGS, LONGEST_WARNING = 6, 250  # on the first page, and letters of one
MM_PER_INCH, MM_PER_POINT = 25.4, 25.4 / 72
LEADING = 1.25  # from line to line, in font sizes
NAME_SHARE = 0.31  # of a column, for the names of rows
SIZES = (8.0, 7.5, 7.0, 6.5, 6.0, 5.5)  # of the text, in points
LEAST_WHOLE = 7.0
REFERENCE_SIZE = 100.0
INK, PALE, ALARM, RULE = "#1c2530", "#5a6673", "#a33b00", "#0072b2"
DPI = 150  # of pictures inside the PDF


@dataclass(frozen=True)
class Line:
    """A line of a column.

    Attributes:
        pieces: text and its place from the column's left, in mm.
        height: in font sizes.
        kind: ``title``, ``row``, ``loud`` or ``note``.
    """

    pieces: tuple[tuple[str, float], ...]
    height: float
    kind: str


STYLES = {
    "title": {"fontweight": "bold", "color": INK},
    "row": {"color": INK},
    "loud": {"fontweight": "bold", "color": ALARM},
    "note": {"color": PALE},
}


class Sheet:
    """A page or a picture. Places and sizes are millimetres from the upper left corner.

    Args:
        title: of the document.
        width: in mm; A4 unless told.
        height: in mm.
    """

    def __init__(self, title: str = "", width: float = WIDTH_MM, height: float = HEIGHT_MM) -> None:
        self.title, self.width, self.height = title, width, height
        self.figure = Figure(figsize=(width / MM_PER_INCH, height / MM_PER_INCH), facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place."""
        return self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, text: str, size: float, **style: Any) -> None:
        """One line of text; nothing in it is read as mathematics."""
        self.figure.text(
            left / self.width, 1 - top / self.height, text, fontsize=size, va="top", parse_math=False, **style
        )

    def paragraph(self, left: float, top: float, width: float, text: str, size: float, **style: Any) -> float:
        """Text broken into lines; the result is where it ends."""
        bold = style.get("fontweight") == "bold"
        for line in wrapped(text, width, size, bold):
            self.text(left, top, line, size, **style)
            top += size * LEADING * MM_PER_POINT
        return top

    def warning(self, left: float, top: float, width: float, text: str, size: float = 8.0) -> float:
        """A framed paragraph that is not missed; the result is where it ends."""
        lines = len(wrapped(text, width - 6, size, bold=True))
        height = lines * size * LEADING * MM_PER_POINT + 2.6
        for x, wide, colour in ((left, width, "#fff3d6"), (left, 1.2, "#d55e00")):
            self.figure.add_artist(
                Rectangle(
                    (x / self.width, 1 - (top + height) / self.height),
                    wide / self.width,
                    height / self.height,
                    facecolor=colour,
                    linewidth=0,
                )
            )
        self.paragraph(left + 3.5, top + 1.5, width - 6, text, size, fontweight="bold", color=INK)
        return top + height

    def columns(self, sections: Sequence[Section], tops: Sequence[float], width: float, gap: float, left: float) -> int:
        """Let sections flow through columns, in the largest size at which all of them fit.

        Sections stay whole if that takes no smaller letters than :data:`LEAST_WHOLE`.

        Args:
            sections: in their order.
            tops: where each column begins; all end at the page's margin.
            width: of a column.
            gap: between columns.
            left: of the first one.

        Returns:
            Lines that did not fit even at the smallest size; the page says so.
        """
        bottom = self.height - MARGIN_MM
        tries = [(size, True) for size in SIZES if size >= LEAST_WHOLE] + [(size, False) for size in SIZES]
        for size, whole in tries:
            blocks = [_lines(section, width, size) for section in sections]
            unit = size * MM_PER_POINT
            placed, left_over = _flow(blocks, [(bottom - top) / unit for top in tops], whole)
            if not left_over:
                break
        for column, offset, line in placed:
            x, y = left + column * (width + gap), tops[column] + offset * unit
            self._draw(line, x, y, width, size)
        if left_over:
            text = f"{left_over} more lines did not fit on this page: see report.html"
            self.text(left + (len(tops) - 1) * (width + gap), bottom + 0.5, text, SIZES[-1], **STYLES["loud"])
        return left_over

    def picture(self, png: bytes, left: float, top: float, height: float, most: float = 1000.0) -> float:
        """A picture in its proportions, at most so high and so wide; the result is its width in mm."""
        pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
        height = min(height, most * pixels.shape[0] / pixels.shape[1])
        width = height * pixels.shape[1] / pixels.shape[0]
        panel = self.axes(left, top, width, height)
        panel.imshow(pixels, aspect="auto")
        panel.set_axis_off()
        return width

    def _draw(self, line: Line, left: float, top: float, width: float, size: float) -> None:
        for text, indent in line.pieces:
            self.text(left + indent, top, text, size * (1.1 if line.kind == "title" else 1), **STYLES[line.kind])
        if line.kind == "title":
            y = 1 - (top + 1.35 * size * MM_PER_POINT) / self.height
            self.figure.add_artist(
                Line2D([left / self.width, (left + width) / self.width], [y, y], color=RULE, linewidth=0.8)
            )


def write_pdf(path: str | Path, report: Report) -> None:
    """Write a report on two pages, whole or not at all.

    Args:
        path: of the PDF.
        report: what it shows.
    """
    pages = [_first_page(report), _second_page(report)]
    about = {"Title": report.title, "Creator": None, "CreationDate": None}
    letters = matplotlib.rc_context({"pdf.fonttype": 42})  # that can be searched
    with written_whole(path) as partial, letters, PdfPages(partial, metadata=about) as file:
        for page in pages:
            file.savefig(page.figure, dpi=DPI)


def _first_page(report: Report) -> Sheet:
    sheet, left = Sheet(report.title), MARGIN_MM
    size = next((s for s in (14, 12, 10) if len(wrapped(report.title, INNER_MM, s, bold=True)) == 1), 9)
    top = sheet.paragraph(left, 8.0, INNER_MM, report.title, size, fontweight="bold", color=INK) + 0.5
    for text in _short([report.verdict, *report.warnings]):
        top = sheet.warning(left, top, INNER_MM, text, 7.5)
    top = sheet.paragraph(left, top + 1.0, INNER_MM, report.notice, 7.5, fontweight="bold", color=INK) + 0.5
    facts = " | ".join(f"{name}: {value}" for name, value in report.facts)
    top = sheet.paragraph(left, top + 0.5, INNER_MM, facts, 7.0, color=PALE) + 0.8
    width = INNER_MM / max(1, len(report.results))
    for number, (name, value, remark) in enumerate(report.results):
        x = left + number * width
        sheet.text(x, top, name, 7.0, color=PALE)
        sheet.text(x, top + 3.2, value, 12, fontweight="bold", color=INK)
        sheet.paragraph(x, top + 8.4, width - 2, remark, 7.0, color=PALE)
    top += 16.0
    x = left
    for png, _ in report.projections:
        x += sheet.picture(png, x, top, OVERVIEW_MM, 45.0) + 3
    if report.curve:
        sheet.picture(report.curve[0], x, top, OVERVIEW_MM, left + INNER_MM - x)
    top += OVERVIEW_MM + 2
    room = (HEIGHT_MM - MARGIN_MM - 9 - top) / len(report.rows) - 5.0 - GAP_MM
    edge = min(room, (INNER_MM - (TILES - 1) * GAP_MM) / TILES)
    for row in report.rows:
        top = sheet.paragraph(left, top, INNER_MM, row.title, 7.5, fontweight="bold", color=INK) + 0.8
        for number, (png, _) in enumerate(row.tiles):
            sheet.picture(png, left + number * (edge + GAP_MM), top, edge)
        top += edge + GAP_MM
    sheet.paragraph(left, top + 0.5, INNER_MM, report.caption, 6.0, color=PALE)
    return sheet


def _short(warnings: Sequence[str]) -> list[str]:
    """The first warnings, each cut where it is very long: all of them stand in the section on quality."""
    shown = [text if len(text) <= LONGEST_WARNING else f"{text[:LONGEST_WARNING]} ..." for text in warnings]
    more = len(shown) - MOST_WARNINGS
    return shown if more <= 0 else [*shown[:MOST_WARNINGS], f"{more} more: see the next page or report.html"]


def _second_page(report: Report) -> Sheet:
    sheet, width = Sheet(report.title), (INNER_MM - COLUMN_GAP_MM) / 2
    sheet.columns(report.sections, (MARGIN_MM, MARGIN_MM), width, COLUMN_GAP_MM, MARGIN_MM)
    return sheet


def wrapped(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Lines of at most ``width`` mm; words that are longer are cut.

    Args:
        text: without line breaks.
        width: in mm.
        size: of the letters, in points.
        bold: whether they are bold.
    """
    scale = size / REFERENCE_SIZE * MM_PER_POINT
    lines: list[str] = []
    used = width + 1.0
    space = _width(" ", bold) * scale
    for word in (part for whole in text.split() for part in _cut(whole, width, scale, bold)):
        wide = _width(word, bold) * scale
        if used + space + wide > width:
            lines.append(word)
            used = wide
        else:
            lines[-1] += " " + word
            used += space + wide
    return lines or [""]


def _cut(word: str, width: float, scale: float, bold: bool) -> list[str]:
    """A word in pieces that fit, each as long as possible."""
    pieces, start = [], 0
    while start < len(word):
        end = len(word)
        while end > start + 1 and _width(word[start:end], bold) * scale > width:
            end -= 1
        pieces.append(word[start:end])
        start = end
    return pieces


@lru_cache(maxsize=4096)
def _width(text: str, bold: bool) -> float:
    """Width in points at :data:`REFERENCE_SIZE`."""
    font = FontProperties(weight="bold" if bold else "normal", size=REFERENCE_SIZE)
    if text == " ":
        return _width("a b", bold) - _width("ab", bold)
    return float(TextToPath().get_text_width_height_descent(text, font, ismath=False)[0])


def _lines(section: Section, width: float, size: float) -> list[Line]:
    """The lines of a section at a size."""
    lines = [Line(((section.title, 0.0),), LEADING + 0.7, "title")]
    for text in section.loud:
        lines += [Line(((part, 0.0),), LEADING, "loud") for part in wrapped(text, width, size, bold=True)]
    second = NAME_SHARE * width
    for name, value in [*section.rows, *section.table_rows()]:
        left, right = wrapped(name, second - 1.5, size), wrapped(value, width - second, size)
        for k in range(max(len(left), len(right))):
            pieces = [(left[k], 0.0)] if k < len(left) else []
            pieces += [(right[k], second)] if k < len(right) else []
            lines.append(Line(tuple(pieces), LEADING, "row"))
    for text in section.notes:
        lines += [Line(((part, 0.0),), LEADING, "note") for part in wrapped(text, width, size)]
    last = lines[-1]
    return [*lines[:-1], Line(last.pieces, last.height + 0.9, last.kind)]


def _flow(
    blocks: Sequence[Sequence[Line]], room: Sequence[float], whole: bool
) -> tuple[list[tuple[int, float, Line]], int]:
    """Place lines in columns with so much room (in font sizes): column, offset and line; and how many found none.

    A block stays in one column where ``whole``; else a title stays with the line below it.
    """
    placed: list[tuple[int, float, Line]] = []
    column, used, left_over = 0, 0.0, 0
    for block in blocks:
        for number, line in enumerate(block):
            together = block[number:] if whole and number == 0 else block[number : number + 1 + (number == 0)]
            if column < len(room) and used + sum(other.height for other in together) > room[column]:
                column, used = column + 1, 0.0
            if column == len(room):
                left_over += 1
                continue
            placed.append((column, used, line))
            used += line.height
    return placed, left_over
