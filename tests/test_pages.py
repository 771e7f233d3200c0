"""Pages hold all they show, and nothing from a file becomes markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from scripts.prediction.pages import Link, Ranked, Words, environment, render

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "<script>alert('&')</script>"


PARTS = """{% extends "page.html" %}{% import "parts.html" as part %}{% block content %}
{{ part.paragraph(evil, "warning") }}{{ part.preformatted(evil) }}{{ part.pairs([(evil, evil)]) }}
{{ part.link(evil, evil) }}{{ part.table([evil, evil], [[evil, words]], evil) }}{{ part.figures([(png, evil)]) }}
{{ part.flow([(evil, [evil]), (evil, [])]) }}{% endblock %}"""
TABLE = """{% import "parts.html" as part %}{{ part.table(["a", "b", "c"], rows) }}"""


def page_of_all_parts() -> str:
    template = environment().from_string(PARTS)
    return template.render(title=EVIL, sortable=False, evil=EVIL, words=Words(EVIL), png=PNG)


def test_text_is_never_markup() -> None:
    html = page_of_all_parts()
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

    Checker().feed(page_of_all_parts())
    assert open_tags == []


def test_pictures_are_inside_and_nothing_is_fetched() -> None:
    html = page_of_all_parts()
    sources = re.findall(r'src="([^"]*)"', html)
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert "url(" not in html
    assert "http" not in html


def test_a_column_of_words_is_set_as_words() -> None:
    html = environment().from_string(TABLE).render(rows=[["x", Words("y"), 1], ["x", Words("z"), Words("w")]])
    assert html.count('<th class="words">') == 1
    assert html.count('<td class="words">') == 3


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
