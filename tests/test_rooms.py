"""Rooms of the bundle's package: who may import from whom, as the diagram in CONTRIBUTING.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from conftest import BUNDLE, ROOT

PACKAGE = BUNDLE / "scripts"
MOST_ENTRIES = 10
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
ENTRIES = sorted(path.name for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__")))
ROOMS = {Path(name).stem for name in ENTRIES} - {"__init__"}


def diagram() -> dict[str, set[str]]:
    """Room to the rooms that it may import from: those that its arrows reach, directly or through others."""
    block = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    assert block, "CONTRIBUTING.md has no diagram"
    arrows: dict[str, set[str]] = {}
    for line in block[1].splitlines()[1:]:
        arrow = re.fullmatch(r"\s*(\w+) --> (\w+)", line)
        assert arrow, f"not an arrow from a room to a room: {line}"
        arrows.setdefault(arrow[1], set()).add(arrow[2])
        arrows.setdefault(arrow[2], set())
    return {room: set(_reached(room, arrows)) for room in arrows}


def _reached(room: str, arrows: Mapping[str, set[str]]) -> Iterator[str]:
    for other in arrows[room]:
        yield other
        yield from _reached(other, arrows)


def faults(name: str, source: str, allowed: Mapping[str, set[str]]) -> list[str]:
    """What is wrong with the imports of one module.

    Args:
        name: path of the module, relative to ``bundle/scripts``.
        source: its text.
        allowed: of :func:`diagram`.
    """
    room, tree = Path(name).parts[0].removesuffix(".py"), ast.parse(source)
    found, foreign = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "scripts" for alias in node.names):
            found.append(f"{name}:{node.lineno}: import as 'from scripts.room.module import name'")
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".")
        if node.level:
            found.append(f"{name}:{node.lineno}: a relative import")
        elif parts[0] == "scripts":
            rooms = {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            for other in sorted(rooms - {room} - allowed.get(room, set())):
                found.append(f"{name}:{node.lineno}: {room} imports from {other}")
            names = [alias for alias in node.names if rooms != {room}]
            found += [f"{name}:{node.lineno}: {alias.name} is private" for alias in names if alias.name[0] == "_"]
            foreign |= {alias.asname or alias.name for alias in names}
    for node in ast.walk(tree):
        of_import = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in foreign
        if of_import and re.match(r"_(?!_)", node.attr):
            found.append(f"{name}:{node.lineno}: {node.value.id}.{node.attr} is private")
    return found


def test_all_rooms_are_in_the_diagram_and_no_others() -> None:
    assert set(diagram()) == ROOMS
    assert len(ENTRIES) <= MOST_ENTRIES, ENTRIES


def test_the_package_lists_the_rooms_in_the_order_of_the_diagram() -> None:
    allowed = diagram()
    listed = re.findall(r"^(\w+)  +\S", SOURCES["__init__.py"], re.MULTILINE)
    assert {*listed, "keys"} == set(allowed)
    for position, room in enumerate(listed):
        assert allowed[room] <= {"keys", *listed[:position]}, room


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = {*re.findall(r"`([\w./]+\.(?:py|json|md|toml))`", text), *re.findall(r"^python .*?(\w+/\S+)", text, re.M)}
    files = [*(ROOT / "tests").iterdir(), *PACKAGE.rglob("*.py")]
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists() and name not in {f.name for f in files}] == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_what_the_diagram_allows(name: str) -> None:
    assert faults(name, SOURCES[name], diagram()) == []


ALLOWED = {"keys": set(), "low": {"keys"}, "high": {"low", "keys"}}


@pytest.mark.parametrize(
    "source, fault",
    [
        pytest.param("from scripts.high.some import name", "low imports from high", id="against_an_arrow"),
        pytest.param("from scripts import high", "low imports from high", id="a_whole_room"),
        pytest.param("def f():\n    from scripts.high.some import name", "low imports from high", id="in_a_function"),
        pytest.param("from scripts.new.some import name", "low imports from new", id="a_room_not_in_the_diagram"),
        pytest.param("from .other import name", "a relative import", id="relative"),
        pytest.param("import scripts.low.other", "import as 'from scripts.room.module import name'", id="import"),
        pytest.param("from scripts.keys import _name", "_name is private", id="private_name"),
        pytest.param("from scripts import keys\nkeys._name", "keys._name is private", id="private_attribute"),
    ],
)
def test_faults_are_found(source: str, fault: str) -> None:
    assert [found.split(": ", 1)[1] for found in faults("low/this.py", source, ALLOWED)] == [fault]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("from scripts.low.other import _name", id="private_name_of_the_same_room"),
        pytest.param("from scripts import keys\nkeys.NAME, keys.__name__", id="keys"),
        pytest.param("import numpy\nfrom torch import _C", id="libraries"),
    ],
)
def test_what_is_allowed_is_no_fault(source: str) -> None:
    assert faults("low/this.py", source, ALLOWED) == []


COMMANDS = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"command_line"}
MOST_COMMANDS = 10


def test_there_are_few_commands() -> None:
    assert len(COMMANDS) <= MOST_COMMANDS, COMMANDS


def test_rooms_import_no_command() -> None:
    found = {}
    for path in (ROOT / "scripts").glob("*/*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found[path.relative_to(ROOT / "scripts").as_posix()] = names & COMMANDS
    assert {name: used for name, used in found.items() if used} == {}
