"""Pages hold all they show, and nothing from a file becomes markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from scripts.prediction.pages import Link, Page, Ranked, Words, environment, render

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>alert('&')</script>"


def full_page() -> Page:
    page = Page(EVIL)
    page.heading(EVIL, 3)
    page.paragraph(EVIL, "warning")
    page.preformatted(EVIL)
    page.definitions([(EVIL, EVIL)])
    page.table([EVIL, EVIL], [[EVIL, Words(EVIL)]], EVIL)
    page.figures([(PNG, EVIL)])
    page.flow([(EVIL, [EVIL]), (EVIL, [])])
    return page


def test_text_is_never_markup() -> None:
    html = full_page().html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 17


def test_tags_are_balanced() -> None:
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(full_page().html())
    assert open_tags == []


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path: Path) -> None:
    full_page().write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert "url(" not in html
    assert "http" not in html


def test_a_column_of_words_is_set_as_words() -> None:
    page = Page("t")
    page.table(["a", "b", "c"], [["x", Words("y"), 1], ["x", Words("z"), Words("w")]])
    assert page.html().count('<th class="words">') == 1
    assert page.html().count('<td class="words">') == 3


def test_rows_must_fit_the_titles() -> None:
    with pytest.raises(ValueError, match="2 titles has a row of 1"):
        Page("t").table(["a", "b"], [["x"]])


def test_links_pairs_and_ranked_cells_are_text_too() -> None:
    cells = [[Link(EVIL, 'a b"/x.html'), Ranked(EVIL, 2.5)], ["x", Ranked("-", None)]]
    values = {"counts": [(EVIL, EVIL)], "risks": None, "titles": ["a", "b"], "patients": cells, "table": EVIL}
    html = render("index.html", title="t", warnings=[], notice="", failures=[], findings=[], sortable=False, **values)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 5
    assert 'href="a%20b%22/x.html"' in html
    assert 'data-sort="2.5"' in html
    assert 'data-sort=""' in html


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'report' is undefined"):
        render("report.html", title="t")


def test_every_template_is_sound() -> None:
    names = {"page.html", "parts.html", "report.html", "index.html", "style.css", "sort.js"}
    assert names | {"viewer.html", "viewer.css", "viewer.js"} == set(environment().list_templates())
    for name in environment().list_templates():
        environment().get_template(name)
