"""Self-contained HTML pages from the templates in ``templates/``: one file that needs no network.

The templates escape everything that they are given. Only a page with a sortable table holds a script.
"""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


class Words(str):
    """A cell of a table that holds a sentence instead of a number."""


class Link(str):
    """A cell of a table that leads to a file, of a path relative to the page."""

    target: str

    def __new__(cls, text: str, target: str) -> Link:
        """The text, with its target."""
        link = super().__new__(cls, text)
        link.target = target
        return link


class Ranked(str):
    """A cell of a table that is sorted by a number instead of its text; None comes last."""

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
    """A page from its template."""
    return environment().get_template(template).render(values)


def _inline(png: bytes) -> str:
    """A picture as an address that holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
