"""The report as a PDF: A4 pages in real letters, set by fpdf2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from fpdf import FPDF, FontFace
from fpdf.enums import TableBordersLayout
from fpdf.fonts import TTFFont

from scripts.cohorts.files import written_whole
from scripts.keys import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from scripts.prediction.findings import Section
    from scripts.prediction.report import Report

MARGIN_MM, GAP_MM, OVERVIEW_MM, TILES = 12.0, 1.0, 46.0, 5
INK, PALE, ALARM, RULE, WARNING, PASSED = "#1c2530", "#5a6673", "#a33b00", "#0072b2", "#fff3d6", "#e8f4ec"
FONT, LEADING = "dejavu", 0.44  # millimetres a line, of a point
MOST_WARNINGS, LONGEST = 6, 250  # on the first page, and letters of one; the quality section has all
MOST_ROWS, LONGEST_CELL = 12, 200  # of a section
LONGEST_FOOTER = 90  # letters of the title in it


def write_pdf(path: str | Path, report: Report) -> None:
    """Write a report: results and pictures on the first page, all text from the second on. Whole or not at all."""
    pdf = _Pdf(report.title)
    pdf.say(report.title, 13 if len(report.title) < 70 else 9, "B")
    pdf.box([report.verdict, *_short(report.warnings)], WARNING if report.warnings else PASSED)
    pdf.say(report.notice, 7.5, "B")
    pdf.say(" | ".join(f"{name}: {value}" for name, value in report.facts), 7, colour=PALE)
    if report.results:
        pdf.grid([[cell[k] for cell in report.results] for k in range(3)], (7, 12, 7), ("", "B", ""))
    pdf.pictures([png for png, _ in report.projections] + ([report.curve[0]] if report.curve else []), OVERVIEW_MM)
    room = (pdf.h - MARGIN_MM - 10 - pdf.get_y()) / max(1, len(report.rows)) - 6
    for row in report.rows:
        pdf.say(row.title, 7.5, "B")
        pdf.pictures([png for png, _ in row.tiles], max(20.0, min(room, (pdf.epw + GAP_MM) / TILES - GAP_MM)))
    pdf.say(" ".join([report.caption, *([report.curve[1]] if report.curve else [])]), 6, colour=PALE)
    pdf.add_page()
    for section in report.sections:
        pdf.section(section)
    with written_whole(path) as partial:
        pdf.output(str(partial))


class _Pdf(FPDF):
    """A document in one font that has the letters of most languages."""

    def __init__(self, title: str) -> None:
        super().__init__(format="A4")
        self.set_margins(MARGIN_MM, MARGIN_MM)
        self.set_auto_page_break(True, MARGIN_MM)
        self.c_margin = 0.5
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        for style, file in (("", "DejaVuSans.ttf"), ("B", "DejaVuSans-Bold.ttf")):
            self.add_font(FONT, style, fonts / file)
        self.set_title(title)
        self.add_page()

    def normalize_text(self, text: str) -> str:
        """The text with an escape for every character that the font lacks: none of a patient's id is lost."""
        known = self.current_font.cmap if isinstance(self.current_font, TTFFont) else {}
        signs = (sign if ord(sign) in known or sign.isspace() else ascii(sign)[1:-1] for sign in text)
        return super().normalize_text("".join(signs))

    def footer(self) -> None:
        """Whose page it is, on each: printed pages get separated."""
        self.set_y(-MARGIN_MM + 3)
        self.set_font(FONT, "", 6)
        self.set_text_color(PALE)
        self.cell(0, 3, f"{_cut(str(self.title), LONGEST_FOOTER)} | {RESEARCH_USE_ONLY}")
        self.set_x(self.l_margin)
        self.cell(0, 3, f"page {self.page_no()} of {self.str_alias_nb_pages}", align="R")

    def say(self, text: str, size: float, style: str = "", colour: str = INK, fill: str | None = None) -> None:
        """A paragraph."""
        self.set_font(FONT, style, size)
        self.set_text_color(colour)
        self.set_fill_color(fill or "#ffffff")
        self.multi_cell(0, size * LEADING, text, align="L", fill=fill is not None, new_x="LMARGIN", new_y="NEXT")
        self.ln(0 if fill else 0.8)

    def box(self, lines: Sequence[str], fill: str) -> None:
        """A framed list, the first line bold."""
        for number, text in enumerate(lines):
            self.say(text if number == 0 else f"\u2022 {text}", 7.5, "" if number else "B", fill=fill)
        self.ln(1)

    def grid(self, rows: Sequence[Sequence[str]], sizes: Sequence[float], styles: Sequence[str]) -> None:
        """Texts in columns without lines, a size a row."""
        with self.table(
            borders_layout=TableBordersLayout.NONE,
            first_row_as_headings=False,
            text_align="LEFT",
            line_height=max(sizes) * LEADING,
        ) as table:
            for row, size, style in zip(rows, sizes, styles, strict=True):
                line = table.row(style=FontFace(FONT, style, size, color=INK if style else PALE))
                for text in row:
                    line.cell(text)
        self.ln(1)

    def pictures(self, pngs: Sequence[bytes], height: float) -> None:
        """Pictures of one height side by side."""
        x, top = self.l_margin, self.get_y()
        for png in pngs:
            x += self.image(png, x, top, h=height).rendered_width + GAP_MM
        self.set_y(top + height + GAP_MM)

    def section(self, section: Section) -> None:
        """A title that stays with its text, rows, the table and the notes."""
        if self.will_page_break(22):
            self.add_page()
        self.say(section.title, 9, "B", RULE)
        for text in section.loud:
            self.say(text, 7, "B", ALARM)
        rows, more = section.rows[:MOST_ROWS], len(section.rows) - MOST_ROWS
        if rows:
            self._table(
                [[name, _cut(value, LONGEST_CELL, " (see report.html)")] for name, value in rows],
                (24, 76),
                headings=False,
            )
        if more > 0:
            self.say(f"{more} more: see report.html", 7, "B", ALARM)
        if section.table:
            self._table([section.table[0], *section.table[1]], None, headings=True)
        for text in section.notes:
            self.say(text, 6.5, colour=PALE)
        self.ln(1.5)

    def _table(self, rows: Sequence[Sequence[str]], widths: tuple[int, ...] | None, headings: bool) -> None:
        self.set_font(FONT, "", 7)
        self.set_text_color(INK)
        self.set_draw_color("#e3e8ed")
        with self.table(
            rows,
            col_widths=widths,
            first_row_as_headings=headings,
            headings_style=FontFace(emphasis="BOLD", color=INK),
            borders_layout=TableBordersLayout.HORIZONTAL_LINES,
            line_height=7 * LEADING + 0.6,
            text_align="LEFT" if widths else ("LEFT", *["RIGHT"] * (len(rows[0]) - 1)),
        ):
            pass  # it is drawn at the end of the block
        self.ln(0.8)


def _cut(text: str, longest: int, more: str = "") -> str:
    return text if len(text) <= longest else f"{text[:longest]} ...{more}"


def _short(warnings: Sequence[str]) -> list[str]:
    """The first warnings, each cut where it is very long."""
    shown = [_cut(text, LONGEST) for text in warnings]
    more = len(shown) - MOST_WARNINGS
    return shown if more <= 0 else [*shown[:MOST_WARNINGS], f"{more} more: see the next page or report.html"]
