"""The command line of a command, generated from its function: ``run_tool(function, its errors ...)``.

Every parameter is an option ``--name``, parsed by its annotation and not by its looks, so that ``2024_001`` stays the
name of a folder. Words without an option's name are the parameters without a default, in their order. An invalid value
or an unknown option ends the program before anything is done.

Every command imports this module before the bundle's package ``scripts``, which it makes importable.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import gc
import inspect
import io
import itertools
import math
import os
import re
import runpy
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
NAME = "head_neck_pet_ct_multitask"  # of the bundle; without a word that MONAI Label takes for a task ("deepedit", ...)
sys.path.insert(0, str(BUNDLE))

SWITCH = {"true": True, "yes": True, "false": False, "no": False}
HELP = ("-h", "--help")


def tell_end(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Say in one line that the program was stopped, also while its modules are imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).stem}: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = tell_end


class UsageError(ValueError):
    """An invalid command line; the message says what to give instead."""


def run_tool(
    function: Callable[..., None],
    *errors: type[Exception],
    words: Sequence[str] = (),
    others: Iterable[str] | None = None,
    read: Callable[[str, str], Any] = lambda name, text: text,
    resume: str = "",
) -> None:
    """Call a tool's function with what was typed.

    Args:
        function: the tool; its docstring is the help.
        *errors: what it raises for people: one line on the error stream and exit code 1 (``TRACEBACK=1`` in the
            environment shows more). A command line that cannot be read ends with code 2.
        words: parameters that words without an option's name stand for; by default those without a default.
        others: names that the function's ``**`` takes; None for any.
        read: value of such an option from its name and text.
        resume: how to go on after a Ctrl-C, which the last line says.
    """
    plain_console()
    name = function.__name__
    try:
        arguments = read_arguments(function, sys.argv[1:], words, others, read)
    except UsageError as error:
        print(f"{name}: {error}; --help lists the options", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        function(**arguments)
    except (UsageError, *errors) as error:  # type: ignore[misc]
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt as stopped:
        stopped.__traceback__ = None
        gc.collect()  # closes progress bars now, not below the last line
        print(f"{name}: stopped{resume and f'; {resume}'}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def run_room(room: str, *commands: str) -> None:
    """Run a command of a room, by the first word of the command line: ``python scripts/ROOM COMMAND [options]``.

    Commands are modules of the room that call :func:`run_tool` when they are run.
    """
    name = typed_command(room, commands)
    runpy.run_module(f"{room}.{name}", run_name="__main__", alter_sys=True)


def run_commands(commands: Mapping[str, tuple[Callable[..., None], Sequence[type[Exception]]]]) -> None:
    """Run a command of a file, by the first word of the command line: ``python scripts/FILE.py COMMAND [options]``.

    Each has its function and the errors that it raises for people, as for :func:`run_tool`.
    """
    name = typed_command(Path(sys.argv[0]).name, commands)
    function, errors = commands[name]
    vars(function)["command"] = name
    run_tool(function, *errors)


def typed_command(place: str, commands: Iterable[str]) -> str:
    """The first word of the command line, removed from ``sys.argv``.

    A word that is no command ends the program with code 2, ``--help`` with 0.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        usage = f"python scripts/{place} COMMAND [options]; COMMAND is one of {', '.join(commands)}"
        if name in HELP:
            print(f"usage: {usage}; COMMAND --help lists its options")
            raise SystemExit(0)
        print(f"{Path(place).stem}: {f'no command {name!r}' if name else 'which command?'}; {usage}", file=sys.stderr)
        raise SystemExit(2)
    del sys.argv[1]
    return name


def start_of(function: Callable[..., None]) -> str:
    """How a command is started, by the file of its function.

    Example:
        >>> start_of(start_of)
        'python scripts/command_line.py'
    """
    file = Path(inspect.getfile(function))
    room = file.parent.name
    start = f"python scripts/{file.name}" if room == "scripts" else f"python scripts/{room} {file.stem}"
    return " ".join([start, *([function.command] if hasattr(function, "command") else [])])


def plain_console() -> None:
    """Let a console that lacks a character show its code instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_arguments(
    function: Callable[..., None],
    typed: Sequence[str],
    words: Sequence[str] = (),
    others: Iterable[str] | None = None,
    read: Callable[[str, str], Any] = lambda name, text: text,
) -> dict[str, Any]:
    """Arguments for ``function``, by name, from the words of a command line; options as for :func:`run_tool`.

    Raises:
        UsageError: an unknown option (the nearest known one is named), a value that cannot be read, a word too many or
            too few.
    """
    signature = inspect.signature(function, eval_str=True)
    known = {n: p for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    takes_more = len(known) < len(signature.parameters)
    needed = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    words = list(words or needed)
    parser = Parser(function, known, words)
    names = [*known, *(others or ())]
    switches = {name for name, parameter in known.items() if bool in kinds_of(parameter.annotation)}
    more = [] if HELP[1] in typed or HELP[0] in typed else unknown_options(typed, known)
    for name in more:
        if not takes_more or (others is not None and name not in names):
            close = difflib.get_close_matches(name, names, 1)
            raise UsageError(f"no option --{name}" + (f": is --{close[0]} meant?" if close else ""))
        parser.add_argument(f"--{name}", type=functools.partial(read, name), default=argparse.SUPPRESS)
    found = vars(parser.parse_intermixed_args(list(written_out(typed, switches))))
    rest = found.pop("words")
    free = [name for name in words if name not in found]
    if len(rest) > len(free):
        extra = rest[len(free)]
        for before, word in itertools.pairwise(typed):
            if word == extra and _is_option(before) and "=" not in before and _name(before) in switches:
                raise UsageError(f"{before}: {extra!r} is neither True nor False")
        raise UsageError(f"what is {extra!r}? Options have names, such as --{next(iter(known))}")
    for name, text in zip(free, rest, strict=False):
        if not text:  # of a shell's variable that is not set; as a path it would be the working folder
            raise UsageError(f"{name.upper()} is empty")
        try:
            found[name] = reader(known[name].annotation)(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name.upper()}: {error}") from None
    if missing := [name for name in needed if name not in found]:
        raise UsageError(f"give {', '.join(f'--{name}' for name in missing)}")
    return found


class Parser(argparse.ArgumentParser):
    """Options of a function's parameters, with its docstring as their help; raises :class:`UsageError`."""

    def __init__(
        self, function: Callable[..., None], known: Mapping[str, inspect.Parameter], words: Sequence[str]
    ) -> None:
        about, helps = described(function)
        usage = f"{start_of(function)} {' '.join(name.upper() for name in words)} [options]"
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(usage=usage, description=about, formatter_class=layout, allow_abbrev=False)
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        for name, parameter in known.items():
            default = "" if parameter.default in (parameter.empty, None, "", ()) else f" [{parameter.default}]"
            self.add_argument(
                f"--{name}",
                type=reader(parameter.annotation),
                default=argparse.SUPPRESS,
                metavar="",
                help=(helps.get(name, "") + default).replace("%", "%%"),
            )

    def error(self, message: str) -> NoReturn:
        """Instead of argparse's own end of the program."""
        raise UsageError(message.removeprefix("argument "))


def unknown_options(typed: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Names of the options that are not among the known ones, in their order; minus signs in names are underscores."""
    names = [_name(word) for word in typed if _is_option(word)]
    return [name for name in dict.fromkeys(names) if name not in known]


def written_out(typed: Sequence[str], switches: Iterable[str]) -> Iterable[str]:
    """The words with ``_`` in the names of options, and a value for every switch: ``--force`` is ``--force=True``.

    Example:
        >>> list(written_out(["--force", "in", "--report", "False", "--ckpt-dir=a-b"], ["force", "report"]))
        ['--force=True', 'in', '--report=False', '--ckpt_dir=a-b']
    """
    rest = list(typed)
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            yield word
            continue
        _, equals, value = word.partition("=")
        option = f"--{_name(word)}"
        if not equals and option[2:] in switches:
            equals, value = "=", rest.pop(0) if rest and rest[0].lower() in (*SWITCH, "none") else "True"
        elif not equals and rest and not _is_option(rest[0]):
            equals, value = "=", rest.pop(0)  # argparse takes -1e-1 for an option
        yield option + equals + value


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _name(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_")


def reader(annotation: Any) -> Callable[[str], Any]:
    """What reads the value of an option.

    ``str`` keeps the text as it is. ``int``, ``float`` and ``bool`` read strictly, and ``None`` where the annotation
    has it. Where it has a sequence, ``a,b`` and ``[a,b]`` are lists; one value alone stays one.

    Raises:
        argparse.ArgumentTypeError: by what is returned, for text that is no such value.

    Example:
        >>> reader(str)("2024_001"), reader(int | Sequence[int] | None)("0,2"), reader(int)("3")
        ('2024_001', [0, 2], 3)
    """
    kinds = kinds_of(annotation)
    sequences = [kind for kind in kinds if typing.get_origin(kind) is not None]
    plain = [kind for kind in kinds if kind not in sequences and kind is not type(None)]
    single = str if str in plain or not plain else plain[0]
    optional = type(None) in kinds and single is not str

    def value(text: str) -> Any:
        if optional and text == "None":
            return None
        if sequences and ("," in text or text[:1] in ("[", "(")):
            items = [item.strip().strip("'\"") for item in text.strip().strip("[]()").split(",")]
            return [READERS[single](item) for item in items if item]
        return READERS[single](text)

    return value


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def _switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return SWITCH[text.lower()]


READERS: dict[Any, Callable[[str], Any]] = {str: str, int: _whole, float: _number, bool: _switch}


def described(function: Callable[..., None]) -> tuple[str, dict[str, str]]:
    """The text of a docstring before ``Args:``, and the description of each parameter, without Sphinx markup."""
    text = re.sub(r":\w+:`([^`]*)`", r"\1", inspect.getdoc(function) or "").replace("``", "")
    about, _, rest = text.partition("\nArgs:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE)
    return about.strip(), {name: " ".join(said.split()) for name, said in entries}
