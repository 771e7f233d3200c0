"""Self-contained HTML pages: text, tables and pictures in one file that needs no network.

Only a page with a sortable table holds a script, a few lines of its own; without it the table is merely not sortable.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from urllib.parse import quote

from scripts.cohorts.files import write_text

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; color: #1c2530; background: #fff;
  max-width: 1020px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 50rem; }
.warning { background: #fff3d6; border-left: 6px solid #d55e00; padding: .8rem 1rem; margin: 1rem 0; font-weight: 600;
  max-width: none; }
.note { color: #5a6673; font-size: .88rem; }
.loud { color: #a33b00; font-weight: 600; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2.4rem; }
.columns > div { flex: 1 1 400px; min-width: 0; }
.columns h3, .sheet > h3 { margin: 1.2rem 0 .2rem; border-bottom: 1.5px solid #0072b2; }
table.pairs { width: 100%; font-size: .88rem; table-layout: fixed; }
table.pairs th { text-align: left; font-weight: 500; color: #33404d; width: 36%; border-bottom: 1px solid #e3e8ed; }
table.pairs tr td:not(.words):not(:first-child) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
h1 { overflow-wrap: anywhere; }
body > table.pairs th { width: 18%; }
table.sortable th { cursor: pointer; white-space: nowrap; }
table.sortable th::after { content: " \\2195"; color: #8795a3; font-weight: 400; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .9rem; color: #33404d; padding-bottom: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e8ed; }
th { border-bottom: 1.5px solid #8795a3; font-weight: 600; }
th:first-child, td:first-child, th.words { text-align: left; }
td:not(.words):not(:first-child) { white-space: nowrap; }
td.words { text-align: left; padding-left: .6rem; color: #5a6673; font-size: .85rem; max-width: 22rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #33404d; max-width: 50rem; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.row figure { flex: 1 1 400px; max-width: 495px; margin: .4rem 0; }
.row figure.wide { max-width: none; }
.flow { display: flex; flex-direction: column; gap: 0; margin: 1rem 0; max-width: 46rem; }
.flow div { border: 1.5px solid #0072b2; border-radius: 6px; padding: .45rem .8rem; background: #f4f9fc; }
.flow .out { border-color: #b9c2cb; background: #fafafa; margin: .35rem 0 .35rem 2.5rem; font-size: .9rem; }
.flow .arrow { border: 0; background: none; padding: 0 1.2rem; color: #0072b2; line-height: 1.3; }
pre { background: #f4f6f8; padding: .7rem .9rem; overflow-x: auto; font-size: .84rem; white-space: pre-wrap; }
dl { margin: .5rem 0; max-width: 50rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; }
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


SORT_SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const turn = head.dataset.turn = head.dataset.turn === "1" ? "-1" : "1";
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
    return turn * (x !== "" && !isNaN(x) && !isNaN(y) ? x - y : x.localeCompare(y, "en", {numeric: true}));
  });
  body.append(...rows);
});
"""


class Words(str):
    """A cell of a table that holds a sentence instead of a number."""


class Link(str):
    """A cell of a table that leads to a file beside the page.

    Args:
        text: what is shown.
        target: path relative to the page, as a plain string.
    """

    target: str

    def __new__(cls, text: str, target: str) -> Link:
        """The text, with its target."""
        link = super().__new__(cls, text)
        link.target = target
        return link


class Ranked(str):
    """A cell of a table that is sorted by a number instead of its text; None comes last.

    Args:
        text: what is shown.
        rank: the number.
    """

    rank: float | None

    def __new__(cls, text: str, rank: float | None) -> Ranked:
        """The text, with its rank."""
        cell = super().__new__(cls, text)
        cell.rank = rank
        return cell


class Page:
    """A page that grows from top to bottom. All text is escaped: what comes from files cannot become markup.

    Args:
        title: of the page.

    Example:
        >>> page = Page("a < b")
        >>> page.paragraph("1 & 2")
        >>> "<h1>a &lt; b</h1>" in page.html() and "<p>1 &amp; 2</p>" in page.html()
        True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts = [f"<h1>{escape(title)}</h1>"]
        self.script = ""

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 2 for sections, 3 below them."""
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str, kind: str = "") -> None:
        """A paragraph; ``kind`` is empty, ``note`` (small), ``loud`` (coloured) or ``warning`` (framed)."""
        self.parts.append(f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        """Text with its line breaks, such as commands."""
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def definitions(self, items: Sequence[tuple[str, str]]) -> None:
        """Terms and what they mean."""
        rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in items)
        self.parts.append(f"<dl>{rows}</dl>")

    @contextmanager
    def block(self, kind: str) -> Iterator[None]:
        """What is added inside stands in one block: ``columns`` sets the blocks inside it side by side."""
        self.parts.append(f'<div class="{escape(kind)}">' if kind else "<div>")
        yield
        self.parts.append("</div>")

    def pairs(self, rows: Sequence[tuple[str, str]]) -> None:
        """A table of names and what is said of them."""
        body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
        self.parts.append(f'<table class="pairs"><tbody>{body}</tbody></table>')

    def link(self, text: str, target: str) -> None:
        """A line that leads to a file beside the page; ``target`` is its relative path."""
        self.parts.append(f"<p>{_anchor(text, target)}</p>")

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", sortable: bool = False
    ) -> None:
        """A table; :class:`Words` are set as words, everything else to the right (the first column to the left).

        A cell may be a :class:`Link` or :class:`Ranked`. With ``sortable``, a click on a title sorts by its column.

        Raises:
            ValueError: for a row that is not as long as the titles.
        """
        wrong = [row for row in rows if len(row) != len(titles)]
        if wrong:
            raise ValueError(f"a table with {len(titles)} titles has a row of {len(wrong[0])} cells")
        words = [all(isinstance(row[column], Words) for row in rows) for column in range(len(titles))]
        head = "".join(
            f'<th class="words">{escape(title)}</th>' if is_words else f"<th>{escape(title)}</th>"
            for title, is_words in zip(titles, words, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        kind = ' class="sortable"' if sortable else ""
        self.script = SORT_SCRIPT if sortable else self.script
        self.parts.append(
            f'<div class="scroll"><table{kind}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figures(self, pictures: Sequence[tuple[bytes, str]], wide: bool = False) -> None:
        """PNG pictures, each with its caption, in two columns or (``wide``) one below the other."""
        kind = ' class="wide"' if wide else ""
        shown = [
            f'<figure{kind}><img alt="{escape(caption)}" src="{_inline(png)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for png, caption in pictures
        ]
        self.parts.append(f'<div class="row">{"".join(shown)}</div>')

    def flow(self, steps: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Boxes from top to bottom: what is there, and what leaves after it."""
        boxes = []
        for number, (text, leaving) in enumerate(steps):
            boxes += ['<div class="arrow">&darr;</div>'] if number else []
            boxes.append(f"<div>{escape(text)}</div>")
            boxes += [f'<div class="out">{escape(item)}</div>' for item in leaving]
        self.parts.append(f'<div class="flow">{"".join(boxes)}</div>')

    def html(self) -> str:
        """The page as a whole."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>"
        )
        body = "\n".join(self.parts)
        script = f"<script>{self.script}</script>\n" if self.script else ""
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n{script}</body></html>\n'

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        write_text(path, self.html())


def _cell(value: object) -> str:
    if isinstance(value, Link):
        return f"<td>{_anchor(value, value.target)}</td>"
    if isinstance(value, Ranked):
        rank = "" if value.rank is None else f"{value.rank:g}"
        return f'<td data-sort="{rank}">{escape(value)}</td>'
    kind = ' class="words"' if isinstance(value, Words) else ""
    return f"<td{kind}>{escape(str(value))}</td>"


def _anchor(text: str, target: str) -> str:
    """A link to a relative path, whatever signs are in it."""
    return f'<a href="{escape(quote(target))}">{escape(text)}</a>'


def _inline(png: bytes) -> str:
    """A picture as an address that holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
