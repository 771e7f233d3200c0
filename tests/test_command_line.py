"""Command lines of the tools: names stay text, values are read strictly, unknown options are refused first."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from command_line import UsageError, read_arguments, run_commands, run_tool

import serve
from conftest import ROOT, exit_code
from experiments.experiment import read_override, typed
from scripts.cohorts.clinical import FEATURES

SCRIPTS = ROOT / "scripts"
TOOLS = sorted(
    ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
    for path in SCRIPTS.rglob("*.py")
    if re.search(rf"run_tool\(\s*{path.stem}\b", path.read_text())
)
ROOMS = ("research", "runtimes")


def tells(path: Path) -> bool:
    """Whether a file of ``scripts/`` is a command that reads its options before it imports torch."""
    return path.stem not in ("command_line", "serve")


def tool(
    run: str,
    compare: str | None = None,
    folds: int | Sequence[int] | None = None,
    tasks: str | Sequence[str] = (),
    penalizer: float = 0.1,
    explain: bool = False,
    amp: bool | None = None,
) -> None:
    """Do it.

    Args:
        run: the ``folder``,
            100 % of it.
        compare: another.
        folds: of them.
        tasks: of them.
        penalizer: of :data:`x`.
        explain: why.
        amp: or not.
    """


def any_id(dataset_dir: str, folds: str = "", **overrides: object) -> None:
    """Take ids of the configs."""


@pytest.mark.parametrize(
    "typed, expected",
    [
        pytest.param(["2024_001"], {"run": "2024_001"}, id="underscore_between_digits"),
        pytest.param(["--run", "1.10"], {"run": "1.10"}, id="number_with_a_last_zero"),
        pytest.param(["--run=2025_11"], {"run": "2025_11"}, id="equals"),
        pytest.param(["007"], {"run": "007"}, id="leading_zeros"),
        pytest.param(["1e5", "--compare", "None"], {"run": "1e5", "compare": "None"}, id="a_name_that_is_a_word"),
        pytest.param(["[a,b]"], {"run": "[a,b]"}, id="brackets_in_a_name"),
        pytest.param(["a#b", "--compare", "$x@y"], {"run": "a#b", "compare": "$x@y"}, id="marks_of_configs"),
        pytest.param(["x", "--folds", "0,2"], {"run": "x", "folds": [0, 2]}, id="folds"),
        pytest.param(["x", "--folds", "(0, 2)"], {"run": "x", "folds": [0, 2]}, id="folds_in_brackets"),
        pytest.param(["x", "--folds", "1"], {"run": "x", "folds": 1}, id="one_fold"),
        pytest.param(["x", "--folds", "None"], {"run": "x", "folds": None}, id="none"),
        pytest.param(["x", "--tasks", "seg,surv"], {"run": "x", "tasks": ["seg", "surv"]}, id="tasks"),
        pytest.param(["x", "--tasks", "['seg','surv']"], {"run": "x", "tasks": ["seg", "surv"]}, id="tasks_as_python"),
        pytest.param(["x", "--tasks", "2024_001"], {"run": "x", "tasks": "2024_001"}, id="one_text_of_a_list"),
        pytest.param(["x", "--penalizer", "-1e-1"], {"run": "x", "penalizer": -0.1}, id="negative_number"),
        pytest.param(["--explain", "x"], {"run": "x", "explain": True}, id="switch_before_a_word"),
        pytest.param(["--explain", "False", "x"], {"run": "x", "explain": False}, id="switch_off"),
        pytest.param(
            ["x", "--explain=no", "--amp", "None"], {"run": "x", "explain": False, "amp": None}, id="switches"
        ),
        pytest.param(["x", "--amp"], {"run": "x", "amp": True}, id="switch_with_none"),
    ],
)
def test_what_is_typed_is_what_the_tool_gets(typed, expected):
    got = read_arguments(tool, typed)
    assert repr(sorted(got.items())) == repr(sorted(expected.items()))  # True is not 1, nor 1 "1"


@pytest.mark.parametrize(
    "typed, message",
    [
        pytest.param(["x", "--fold", "1"], "no option --fold: is --folds meant?", id="misspelt"),
        pytest.param(["x", "--exp"], "no option --exp: is --explain meant?", id="shortened"),
        pytest.param(["x", "--quickly"], "no option --quickly$", id="nothing_like_it"),
        pytest.param(["x", "-f", "1"], "unrecognized arguments: -f", id="one_minus"),
        pytest.param(["x", "y"], "what is 'y'?", id="a_word_too_many"),
        pytest.param(
            ["x", "--explain", "maybe"], "--explain: 'maybe' is neither True nor False", id="switch_with_another_word"
        ),
        pytest.param(["x", "--explain=maybe"], "--explain: 'maybe' is neither True nor False", id="no_switch"),
        pytest.param([], "give --run", id="nothing"),
        pytest.param([""], "RUN is empty", id="a_variable_of_the_shell_that_is_not_set"),
        pytest.param(["x", "--folds", "1.5"], "--folds: '1.5' is no whole number", id="no_whole_number"),
        pytest.param(["x", "--folds", "0,b"], "--folds: 'b' is no whole number", id="not_in_a_list"),
        pytest.param(["x", "--folds", "1_0"], "--folds: '1_0' is no whole number", id="underscore"),
        pytest.param(["x", "--penalizer", "nan"], "--penalizer: 'nan' is no number", id="not_finite"),
        pytest.param(["x", "--penalizer"], "--penalizer: expected one argument", id="no_value"),
    ],
)
def test_what_cannot_be_meant_is_refused(typed, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        read_arguments(tool, typed)


@pytest.mark.parametrize(
    "name, text, value",
    [
        pytest.param("epochs", "3", 3, id="number"),
        pytest.param("roi_size", "[64,64,32]", [64, 64, 32], id="list"),
        pytest.param("task_weights", "None", None, id="none"),
        pytest.param("cache_dir", "2024_001", "2024_001", id="path"),
        pytest.param("cache_dir", "1.10", "1.10", id="path_like_a_number"),
        pytest.param("ehr_csv", "a,b.csv", "a,b.csv", id="comma_in_a_path"),
        pytest.param("ehr_csv", "['a.csv','b.csv']", ["a.csv", "b.csv"], id="paths"),
    ],
)
def test_ids_of_the_configs(name, text, value):
    got = read_arguments(any_id, ["x", f"--{name}", text], read=read_override)
    assert got == {"dataset_dir": "x", name: value} and type(got[name]) is type(value)
    assert read_override(name, typed(value)) == value  # as one tool types it for another


def test_names_of_clinical_values():
    with pytest.raises(UsageError, match=r"no option --agee: is --age meant\?"):
        read_arguments(any_id, ["x", "--agee", "61"], others=FEATURES)
    assert read_arguments(any_id, ["x", "--m-stage", "M0"], others=FEATURES) == {"dataset_dir": "x", "m_stage": "M0"}


def test_errors_are_one_line(monkeypatch, capsys):
    def broken(place: str) -> None:
        """Fail."""
        raise OSError("no ink")

    monkeypatch.setattr(sys, "argv", ["broken.py", "x"])
    with pytest.raises(SystemExit, match=r"^broken: no ink$"):
        run_tool(broken, OSError)
    monkeypatch.setattr(sys, "argv", ["broken.py", "--plaice", "x"])
    with pytest.raises(SystemExit, match=r"^2$"):
        run_tool(broken, OSError)
    assert capsys.readouterr().err == "broken: no option --plaice: is --place meant?; --help lists the options\n"


def test_a_console_without_the_letters_is_no_error():
    code = "import command_line\ndef show(name: str) -> None:\n    print(name)\ncommand_line.run_tool(show)"
    command = [sys.executable, "-c", code, "Müller"]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(SCRIPTS), "PYTHONUTF8": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "M\\xfcller\n"), ended.stderr


# --- the tools -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOOLS)
def test_help_names_every_option(name, capsys):
    function = getattr(importlib.import_module(name), name.rpartition(".")[2])
    with pytest.raises(SystemExit, match=r"^0$"):
        read_arguments(function, ["--help"])
    shown = capsys.readouterr().out
    room, _, command = name.rpartition(".")
    assert (f"python scripts/{room} {command} " if room else f"python scripts/{command}.py ") in shown
    for option in function.__annotations__:
        assert option in ("return", "values", "overrides") or re.search(rf"--{option}\s+\w", shown), option


@pytest.mark.parametrize("command", serve.COMMANDS)
def test_help_of_a_command_of_a_file(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/serve.py", command, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        run_commands(serve.COMMANDS)
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python scripts/serve.py {command} ")
    for option in serve.COMMANDS[command][0].__annotations__:
        assert option == "return" or re.search(rf"--{option}\s+\w", shown), option


@pytest.mark.parametrize(
    "typed, code, shown",
    [
        pytest.param([], 2, "serve: which command?; python scripts/serve.py COMMAND", id="none"),
        pytest.param(["lunch"], 2, "serve: no command 'lunch'; python scripts/serve.py COMMAND", id="unknown"),
        pytest.param(["--help"], 0, "usage: python scripts/serve.py COMMAND [options]; COMMAND is one of", id="help"),
        pytest.param(["label", "--lunch"], 2, "serve_label: no option --lunch", id="option"),
    ],
)
def test_a_file_of_commands(typed, code, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/serve.py", *typed])
    ended = exit_code(run_commands, serve.COMMANDS)
    said = capsys.readouterr()
    assert ended == code and shown in said.out + said.err


@pytest.mark.parametrize(
    "typed, code",
    [
        *(pytest.param([path.name, "--help"], 0, id=path.stem) for path in sorted(SCRIPTS.glob("*.py")) if tells(path)),
        *(pytest.param(["serve.py", name, "--help"], 0, id=f"serve_{name}") for name in serve.COMMANDS),
        pytest.param(["train_folds.py", "--lunch"], 2, id="nothing_given"),
        pytest.param(["predict.py"], 1, id="predict_nothing"),
        pytest.param(["predict.py", "in", "out", "--agee", "61"], 2, id="predict_unknown_option"),
        pytest.param(["predict.py", "no_such_folder", "out"], 1, id="predict_no_such_folder"),
        pytest.param(["predict.py", "out", "--ct", "ct.nii.gz", "--pet", "pet.nii.gz"], 1, id="predict_no_such_file"),
        pytest.param(["ensemble_folds.py", "runs", "--hlf"], 2, id="unknown_option"),
        pytest.param(["package_bundle.py", "--version", "1.0.0"], 1, id="options_that_go_together"),
    ],
)
def test_options_are_read_before_torch_and_monai_are_imported(typed: list[str], code: int, tmp_path: Path) -> None:
    """Their import takes seconds."""
    command = [sys.executable, "-X", "importtime", str(SCRIPTS / typed[0]), *typed[1:]]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}
    assert ended.returncode == code, ended.stderr[-2000:]
    assert "command_line" in imported and not imported & {"torch", "monai", "ignite"}


def commands() -> list[str]:
    """Every command with one of the tools in README, CONTRIBUTING, guides and Dockerfile."""
    found = []
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "Dockerfile",
        *sorted((ROOT / "bundle" / "docs").glob("*.md")),
    ]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(rf"python scripts/(?:\w+\.py|(?:{'|'.join(ROOMS)}) )[^`|#\n]*", text)
    return sorted({command.strip(" .,:()'\"") for command in found})


@pytest.mark.parametrize("command", commands())
def test_documented_commands_can_be_read(command):
    _, start, *words = shlex.split(command)
    name = start.removeprefix("scripts/").removesuffix(".py")
    if name in ROOMS and words:
        name = f"{name}.{words.pop(0)}"
    if not words or "..." in command:
        pytest.skip("the tool's name alone")
    if name == "serve":
        function = serve.COMMANDS[words.pop(0)][0]
    else:
        assert name in TOOLS
        function = getattr(importlib.import_module(name), name.rpartition(".")[2])
    more = {"words": ("input", "output"), "others": FEATURES} if name == "predict" else {}
    read_arguments(function, words, **more)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_runs_its_commands(room: str) -> None:
    """From another folder; a command is found by its name, which the room lists."""

    def started(*typed: str) -> tuple[int, str]:
        command = [sys.executable, str(SCRIPTS / room), *typed]
        ended = subprocess.run(command, cwd=SCRIPTS.parent.parent, capture_output=True, text=True)
        return ended.returncode, ended.stdout + ended.stderr

    names = [name.partition(".")[2] for name in TOOLS if name.startswith(f"{room}.")]
    usage = f"python scripts/{room} COMMAND [options]; COMMAND is one of {', '.join(names)}"
    assert started("--help") == (0, f"usage: {usage}; COMMAND --help lists its options\n")
    assert started() == (2, f"{room}: which command?; {usage}\n")
    assert started("lunch") == (2, f"{room}: no command 'lunch'; {usage}\n")
    code, shown = started(names[0], "--help")
    assert code == 0 and shown.startswith(f"usage: python scripts/{room} {names[0]}"), shown
    assert started(names[0], "--lunch")[0] == 2


def test_one_place_puts_the_bundle_on_the_path() -> None:
    """No command has a path of its own: it imports command_line first."""
    own = [path for path in SCRIPTS.rglob("*.py") if re.search(r"sys\.path\b|noqa: E402", path.read_text())]
    rooms = [SCRIPTS / room / "__main__.py" for room in ROOMS]
    # where MONAI Deploy puts the bundle is not this bundle's place
    others = list((SCRIPTS / "runtimes" / "deploy_app").glob("*.py"))
    on_nodes = SCRIPTS / "cluster" / "nodes.py"  # a process that Ray starts has no command
    assert set(own) - set(others) == {SCRIPTS / "command_line.py", *rooms, on_nodes}


def test_the_image_gets_the_files_that_it_copies() -> None:
    """What the Dockerfile copies is what .dockerignore leaves."""
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    kept = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(" ".join(copied).split()) == sorted(kept)
    assert all((ROOT / path).exists() for path in kept)


def test_the_last_line_after_ctrl_c_says_how_to_go_on():
    """Below the progress bar of whatever was interrupted."""
    code = (
        "import command_line\nfrom tqdm import tqdm\nclass Run:\n    def __init__(self) -> None:\n"
        "        self.me, self.bar = self, tqdm(total=3, desc='predicting')\n"
        "def show() -> None:\n    run = Run()\n    raise KeyboardInterrupt\n"
        "command_line.run_tool(show, resume='go on with --resume')"
    )
    shown = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, env=shown, capture_output=True, text=True)
    assert ended.returncode == 130
    assert "predicting:   0%" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "show: stopped; go on with --resume"


@pytest.mark.parametrize(
    ("error", "said"),
    [("KeyboardInterrupt", r"^-c: stopped\n$"), ("ValueError('why')", r"Traceback.*ValueError: why\n$")],
    ids=["ctrl_c", "any_other_error"],
)
def test_a_command_that_is_stopped_while_it_is_imported_says_so_in_one_line(error, said):
    ended = subprocess.run(
        [sys.executable, "-c", f"import command_line; raise {error}"], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert re.search(said, ended.stderr, re.DOTALL)
    assert ended.returncode == (-signal.SIGINT if "Keyboard" in error else 1)
