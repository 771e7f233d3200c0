"""Self-contained HTML pages from the templates in ``templates/``: one file that needs no network.

The templates escape everything that they are given. Only a page with a sortable table holds a script.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scripts.cohorts.files import write_text

TEMPLATES = Path(__file__).parent / "templates"


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


@cache
def environment() -> Environment:
    """The environment of all templates: everything is escaped, and a name that is not given is an error."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(address=quote, inline=_inline)
    made.tests.update(
        link_cell=lambda value: isinstance(value, Link),
        ranked_cell=lambda value: isinstance(value, Ranked),
        words_cell=lambda value: isinstance(value, Words),
    )
    return made


def render(template: str, **values: Any) -> str:
    """A page from its template.

    Args:
        template: file in ``templates/``; it extends ``page.html``.
        values: for the template.
    """
    return environment().get_template(template).render(values)


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
        self.parts: list[Markup] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; level 2 for sections, 3 below them."""
        self._add("heading", text, level)

    def paragraph(self, text: str, kind: str = "") -> None:
        """A paragraph; ``kind`` is empty, ``note`` (small), ``loud`` (coloured) or ``warning`` (framed)."""
        self._add("paragraph", text, kind)

    def preformatted(self, text: str) -> None:
        """Text with its line breaks, such as commands."""
        self._add("preformatted", text)

    def definitions(self, items: Sequence[tuple[str, str]]) -> None:
        """Terms and what they mean."""
        self._add("definitions", items)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """A table; :class:`Words` are set as words, everything else to the right (the first column to the left).

        Raises:
            ValueError: for a row that is not as long as the titles.
        """
        wrong = [row for row in rows if len(row) != len(titles)]
        if wrong:
            raise ValueError(f"a table with {len(titles)} titles has a row of {len(wrong[0])} cells")
        self._add("table", titles, rows, caption)

    def figures(self, pictures: Sequence[tuple[bytes, str]], wide: bool = False) -> None:
        """PNG pictures, each with its caption, in two columns or (``wide``) one below the other."""
        self._add("figures", pictures, wide)

    def flow(self, steps: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Boxes from top to bottom: what is there, and what leaves after it."""
        self._add("flow", steps)

    def html(self) -> str:
        """The page as a whole."""
        return render("page.html", title=self.title, parts=self.parts, sortable=False)

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        write_text(path, self.html())

    def _add(self, part: str, *values: object) -> None:
        """Append a macro of ``parts.html``."""
        macros = environment().get_template("parts.html").module
        self.parts.append(getattr(macros, part)(*values))


def _inline(png: bytes) -> str:
    """A picture as an address that holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
