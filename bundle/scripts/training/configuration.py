"""Checks of the merged configuration of a run, and the part of it that defines the result.

MONAI merges config files and ``--id value`` options into one configuration and silently accepts unknown ids. Its
command line reads values as Python, so that the folder ``2025_11`` becomes the number 202511, and its parser writes
``#`` as ``::``, also in paths. :func:`check_run` is the first step of a run.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from monai.bundle import ConfigComponent, ConfigExpression, ConfigParser, ReferenceResolver
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, ID_SEP_KEY, MERGE_KEY

from scripts import keys
from scripts.cohorts.files import require_writable
from scripts.keys import Case
from scripts.model.ensemble import FoldEnsemble, load_weights, saved_spec
from scripts.model.ranks import world_size
from scripts.model.spec import ModelSpec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = (
    *("bundle_root", "dataset_dir", "ehr_csv", "output_dir", "ckpt_dir", "cache_dir", "checkpoint"),
    *("evaluation_dir", "trt_dir"),
)
"""Ids that name files and folders, and are text whatever they look like."""
WRITTEN = ("output_dir", "cache_dir")
TABLES = "ehr_csv"  # which may be a list
ENTRIES = ("_meta_", "imports", "initialize", "run", "finalize", "tracking")  # what MONAI itself looks for
TRACKING = {name for settings in cast(Any, DEFAULT_EXP_MGMT_SETTINGS).values() for name in settings["configs"]}
TRACKERS = ("MLFlowHandler",)
IGNORED = "None"  # which MONAI leaves out of its options
PARSED = ("$", "@", "%")  # how text starts that MONAI takes for an expression, a reference, a macro
SETTINGS = tuple(field.name for field in fields(ModelSpec))
SAVED_SPEC = "scripts.model.ensemble.saved_spec"
FREE = (
    *("_meta_", "imports", "bundle_root", "dataset_dir", "ehr_csv", "output_dir", "ckpt_dir", "cache_dir"),
    *("device", "amp", "compile", "checkpointing", "num_workers", "epochs"),
)
"""Ids that may differ when a run is resumed: paths (the cases themselves are compared), execution, and the number of
epochs, which may be increased. All others are compared."""
CONFIGURATION, TRAINING, VALIDATION = "configuration", "training", "validation"
PROCESSES = "processes of torchrun (nnodes x nproc_per_node)"
"""Entry of the configuration; runs of earlier versions lack it. Batches and dropout depend on it."""
LIMITS = {
    **dict.fromkeys(("epochs", "val_interval", "batch_size"), (1, math.inf)),
    **dict.fromkeys(("num_workers", "fold", "seed", "early_stop_patience"), (0, math.inf)),
    "num_folds": (2, math.inf),
    **dict.fromkeys(("learning_rate", "l2_weight", "train#loss#hpv_gamma"), (0.0, math.inf)),
    **{f"train#loss#task_weights#{task}": (0.0, math.inf) for task in keys.TASKS},
    **dict.fromkeys(("train#loss#hpv_alpha", "network_def#network#bn_momentum"), (0.0, 1.0)),
}
"""Ids of numbers with the lowest and the highest value; those with an integer are counts."""
LEAST_LIKENESS = 0.6
LONGEST = 200  # characters of a value, and of a list of patients, in a message


class ConfigurationError(ValueError):
    """An invalid configuration; the message says what to change."""


def check_run(device: Any) -> None:
    """Check the configuration in use; called from a config, before anything is computed.

    Paths that were typed on MONAI's command line become text again.

    Raises:
        ConfigurationError: an unknown id, a path that is no longer text, a value that is not a number, a device that
            is not available.
        scripts.cohorts.files.WriteError: the output folder cannot be written to.
    """
    resolver = _resolver()
    config = _written(resolver)
    restored = paths_as_typed(config, _typed(sys.argv))
    resolver.resolved_content.update(restored)
    check_ids(config)
    check_numbers(config)
    check_device(device)
    for name in WRITTEN:
        folder = restored.get(name, config.get(name))
        if isinstance(folder, str) and not folder.startswith(PARSED):
            require_writable(folder)


def _resolver() -> ReferenceResolver:
    """What resolves the current part of a config.

    MONAI passes neither it nor the parser to an expression or a component: an expression sees the packages that the
    parser imports, and ``__local_refs``, the values evaluated so far, without the configuration as it is written. A
    reference to the whole configuration (``@``, ``%``) would evaluate all of it. So the resolver is found among the
    calling frames.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, ReferenceResolver):
            return found
        frame = frame.f_back
    raise RuntimeError("only a part of a config can ask for the configuration")


def _written(resolver: ReferenceResolver) -> dict[str, Any]:
    """The merged configuration as it is written, before expressions are evaluated."""
    return resolver.items[""].get_config()


def check_device(device: Any) -> None:
    """Check that PyTorch can use a device.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        torch.zeros(1, device=torch.device(device)).item()  # of the device meta, nothing can be read back
    except Exception as error:  # each back end raises its own
        why = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"device {str(device)!r} cannot be used here ({why}): give cpu, or cuda:N of a GPU that PyTorch finds "
            f"({torch.cuda.device_count()} found), or leave --device out"
        ) from error


def load_model(network: FoldEnsemble, path: str) -> None:
    """Load a checkpoint, whose settings are those of the run; called from a config.

    Args:
        network: built from the settings in the file (:func:`scripts.model.ensemble.saved_spec`).
        path: the checkpoint.

    Raises:
        scripts.model.ensemble.SettingsMismatch: a setting that was given differs from that of the checkpoint.
        scripts.model.ensemble.CheckpointError: the file cannot be used.
    """
    saved_spec(path, **given_settings(_written(_resolver()), _typed(sys.argv)))
    load_weights(network, path)


def given_settings(config: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a model that were typed (``typed``), or that are in none of the bundle's own configs."""
    own = _own_configs(config)
    return {
        name: config[name]
        for name in SETTINGS
        if name in config and (name in typed or config[name] not in [c[name] for c in own if name in c])
    }


# --- text that stays text -----------------------------------------------------------------------------------------
def paths_as_typed(config: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, str]:
    """The paths of a configuration that differ from what was typed, as they were typed.

    Args:
        config: the merged configuration.
        typed: id -> text on MONAI's command line.

    Raises:
        ConfigurationError: a path that is no text and was not typed there, or any value in which ``#`` was replaced.

    Example:
        >>> paths_as_typed({"output_dir": 202511, "ckpt_dir": "a::b"}, {"output_dir": "2025_11", "ckpt_dir": "a#b"})
        {'output_dir': '2025_11', 'ckpt_dir': 'a#b'}
    """
    restored: dict[str, str] = {}
    for name in PATHS:
        value, text = config.get(name), typed.get(name)
        several = name == TABLES and isinstance(value, list | tuple)
        if text is not None and text != IGNORED and not text.startswith(PARSED) and not several:
            restored[name] = _unquoted(text)
        elif isinstance(value, bool | int | float):
            raise ConfigurationError(f"{name} is the number {value!r}, not a path: write it as text, in quotes")
    for name, value in _leaves(config):
        if isinstance(value, str) and ID_SEP_KEY in value and not value.startswith(PARSED) and name not in restored:
            raise ConfigurationError(
                f"{_shown_id(name)} is {value!r}: MONAI's configs cannot hold the character '#', which they write as "
                "'::'; choose a name without either"
            )
    return {name: text for name, text in restored.items() if text != config.get(name)}


def _typed(argv: Sequence[str]) -> dict[str, str]:
    """Options on the command line of ``python -m monai.bundle``, as text; none of another program."""
    if Path(argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py"):
        return {}
    typed = {}
    for word, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            typed[name.replace("-", "_")] = value if equals else following
    return typed


def _unquoted(text: str) -> str:
    """Text without the quotes of Python, if it was typed in quotes."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if isinstance(value, str) else text


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dictionaries and lists, with its id; without metadata.

    Options typed with a comma, ``4,6``, are tuples; what is derived from a tuple is a caller's own, such as cases.
    """
    if not isinstance(value, dict | list) and type(value) is not tuple:
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key != ConfigParser.meta_key:
            yield from _leaves(item, f"{name}{ID_SEP_KEY}{key}" if name else str(key))


def _shown_id(name: str) -> str:
    return name.replace(ID_SEP_KEY, "#")


# --- ids that mean something --------------------------------------------------------------------------------------
def check_ids(config: Mapping[str, Any]) -> None:
    """Refuse ids without effect: those that are in none of the bundle's configs and that nothing refers to.

    A user's overlay may define ids for others to refer to, and lists of expressions to run. With a model from a
    checkpoint, its settings may be given; :func:`load_model` compares them.

    Raises:
        ConfigurationError: there is one; the message gives the most similar id.
    """
    own, (whole, above) = _own_ids(config), _referenced(config)
    spec = config.get("spec")
    saved = SETTINGS if isinstance(spec, dict) and spec.get("_target_") == SAVED_SPEC else ()
    known = {*own, *whole, *above, *saved}
    free = {name for name in whole if not isinstance(own.get(name), dict)}  # their parts are for the user to name
    copied = [json.dumps(value, default=str) for value in _containers(config)]
    for name, value in _ids(config):
        if name in known or name in {*ENTRIES, *TRACKING, *sys.argv[1:]} or _is_list_to_run(value):
            continue
        if any(name.startswith(parent + ID_SEP_KEY) for parent in free):
            continue
        if isinstance(value, dict | list) and value and copied.count(json.dumps(value, default=str)) > 1:  # a macro's
            continue
        raise ConfigurationError(unknown_id(name, known))


def all_ids(config: Mapping[str, Any]) -> Iterator[str]:
    """Every id of a configuration, also within components.

    Example:
        >>> list(all_ids({"train": {"trainer": {"_target_": "Trainer", "amp": True}}}))
        ['train', 'train#trainer', 'train#trainer#amp']
    """
    for name, value in config.items():
        if not name.startswith("_"):
            yield name
            yield from (f"{name}#{below}" for below in all_ids(value if isinstance(value, dict) else {}))


def unknown_id(name: str, known: Iterable[str]) -> str:
    """The message for an id that no config has, with the most similar one.

    Example:
        >>> unknown_id("epoch", ["epochs", "seed"])
        "no config has the id 'epoch', which would have no effect: is 'epochs' meant?"
        >>> unknown_id("trainr#amp", ["train", "validate"])
        "no config has the id 'trainr#amp', which would have no effect: is 'train' meant?"
    """
    listed = [_shown_id(other) for other in known]
    shown = _shown_id(name)
    parts = shown.split("#")
    above = ["#".join(parts[:end]) for end in range(1, len(parts) + 1)]
    near = _nearest(next((part for part in above if part not in listed), shown), listed) or _nearest(shown, listed)
    hint = f"is '{near}' meant?" if near else "see the ids in configs/"
    return f"no config has the id '{shown}', which would have no effect: {hint}"


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse other values than numbers or booleans where the bundle's configs have one, and numbers out of range.

    At the top, and in components and lists of numbers text and the wrong one of the two kinds. What belongs to the
    model is checked by :class:`.ModelSpec`.

    Args:
        config: the merged configuration; its expressions and references are not evaluated.

    Raises:
        ConfigurationError: there is one.
    """
    for name, own in _own_ids(config).items():
        value = config.get(name, own)
        if not isinstance(own, bool | int | float) or _is_parsed(value) or name in SETTINGS:
            continue
        if value is not None or name in LIMITS:
            _check_number(name, value, own)
    _check_parts(config)


def _check_parts(config: Mapping[str, Any]) -> None:
    """:func:`check_numbers` within components, and of each item of a list of numbers."""
    own = {name: value for content in _own_configs(config) for name, value in _leaves(content)}
    for name, value in _leaves(dict(config)):
        above, _, last = name.rpartition(ID_SEP_KEY)
        limits = LIMITS.get(_shown_id(name))
        like = limits[0] if limits else own.get(f"{above}{ID_SEP_KEY}0" if last.isdecimal() else name)
        if not isinstance(like, bool | int | float) or _is_parsed(value) or above in SETTINGS:
            continue
        if value is not None or limits:
            _check_number(_shown_id(name), value, like)


def _check_number(name: str, value: Any, like: bool | int | float) -> None:
    """Refuse what is no boolean or finite number, as ``like`` is, or outside the limits of its id."""
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    whole = isinstance(low, int)
    kinds = (bool,) if isinstance(like, bool) else (int,) if whole else (int, float)
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(like, bool)
    if fits and math.isfinite(value) and low <= value <= high:
        return
    what = "True or False" if isinstance(like, bool) else "a whole number" if whole else "a number"
    limits = f" from {low:g} to {high:g}" if math.isfinite(high) else f" from {low:g} on" if name in LIMITS else ""
    raise ConfigurationError(f"{name} is {_short(value)}, not {what}{limits}")


def _is_parsed(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(PARSED)


def _nearest(name: str, known: Iterable[str]) -> str:
    """The id with the most similar spelling, above all of its last part; empty if none is similar."""

    def likeness(other: str) -> tuple[float, float]:
        pairs = ((name.rsplit("#", 1)[-1], other.rsplit("#", 1)[-1]), (name, other))
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, whole

    nearest = max(sorted(known), key=likeness, default="")
    return nearest if likeness(nearest)[0] >= LEAST_LIKENESS else ""


def _own_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bundle's own configs that are part of a configuration: those of which it has every id."""
    contents = [ConfigParser.load_config_file(path) for path in sorted(CONFIGS.glob("*.json"))]
    named = [
        {ReferenceResolver.normalize_id(name.lstrip(MERGE_KEY)): value for name, value in content.items()}
        for content in contents
    ]
    return [content for content in named if all(name.split(ID_SEP_KEY)[0] in config for name in content)]


def _own_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids and values of :func:`_own_configs`."""
    found: dict[str, Any] = {}
    for content in _own_configs(config):
        found |= {name: value for name, value in _ids(content) if not isinstance(found.get(name), dict)}
    return found


def _ids(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Ids at the top and within plain dictionaries, with their values; MONAI checks the arguments of components."""
    for name, value in config.items():
        yield above + name, value
        if isinstance(value, dict) and not ConfigComponent.is_instantiable(value) and name != ConfigParser.meta_key:
            yield from _ids(value, f"{above}{name}{ID_SEP_KEY}")


def _referenced(config: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Ids that anything in a configuration refers to, and those above them."""
    found: set[str] = set()
    for _, value in _leaves(dict(config)):
        if isinstance(value, str):
            found |= set(ReferenceResolver.match_refs_pattern(value))
    above = {name.rsplit(ID_SEP_KEY, end)[0] for name in found for end in range(1, name.count(ID_SEP_KEY) + 1)}
    return found, above


def _containers(value: Any) -> Iterator[Any]:
    """Every dictionary and list within a configuration."""
    for item in value.values() if isinstance(value, Mapping) else value:
        if isinstance(item, dict | list):
            yield item
            yield from _containers(item)


def _is_list_to_run(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(ConfigExpression.is_expression, value))


# --- what defines a run -------------------------------------------------------------------------------------------
def describe_run(training: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
    """What defines the result of a training run; called from a config.

    Returns:
        ``configuration``, the merged one without :data:`FREE` and with the number of processes, as id -> value;
        ``training`` and ``validation``, the cases to train on and those that select the epoch, each as patient id ->
        fingerprint of labels, clinical values and file sizes.
    """
    config = {name: value for name, value in _written(_resolver()).items() if name not in (*FREE, *TRACKING)}
    return {
        CONFIGURATION: {
            **{_shown_id(name): _plain(value) for name, value in _leaves(_untracked(config))},
            PROCESSES: world_size(),
        },
        TRAINING: {str(case[keys.PATIENT_ID]): _fingerprint(case) for case in training},
        VALIDATION: {str(case[keys.PATIENT_ID]): _fingerprint(case) for case in validation},
    }


def run_differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two results of :func:`describe_run`, for a message.

    Example:
        >>> one = {"configuration": {"fold": 0}, "training": {"A": "1", "B": "2"}, "validation": {}}
        >>> run_differences(one, {"configuration": {"fold": 1}, "training": {"A": "3"}, "validation": {}})
        ['fold: 0 there, 1 now', '2 training cases there, 1 now: B left', 'other labels, clinical values or files: A']
    """
    if set(there) != set(now):
        return ["it was written by another version of this bundle"]
    one, other = ({PROCESSES: 1, **_compared(run.get(CONFIGURATION, {}))} for run in (there, now))
    differences = [
        f"{name}: {_short(one.get(name, '(absent)'))} there, {_short(other.get(name, '(absent)'))} now"
        for name in sorted({*one, *other})
        if one.get(name, "(absent)") != other.get(name, "(absent)")
    ]
    changed: set[str] = set()
    for part in (TRAINING, VALIDATION):
        before, after = there.get(part, {}), now.get(part, {})
        moves = [f"{', '.join(sorted(after.keys() - before.keys()))} came in"] if after.keys() - before.keys() else []
        moves += [f"{', '.join(sorted(before.keys() - after.keys()))} left"] if before.keys() - after.keys() else []
        if moves:
            listed = "; ".join(map(_cut, moves))
            differences.append(f"{len(before)} {part} cases there, {len(after)} now: {listed}")
        changed |= {patient for patient in before.keys() & after.keys() if before[patient] != after[patient]}
    if changed:
        differences.append(f"other labels, clinical values or files: {_cut(', '.join(sorted(changed)))}")
    return differences


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the folders in which components keep prepared cases."""
    return {name: value for name, value in config.items() if not name.endswith("cache_dir")}


def _untracked(value: Any) -> Any:
    """A configuration without experiment tracking."""
    if isinstance(value, dict):
        return {name: _untracked(item) for name, item in value.items()}
    if isinstance(value, list):
        tracked = [isinstance(item, dict) and item.get("_target_") in TRACKERS for item in value]
        return [_untracked(item) for item, drop in zip(value, tracked, strict=True) if not drop]
    return value


def _plain(value: Any) -> Any:
    """A value that JSON can hold; an object of a Python caller is replaced by the name of its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"a {type(value).__name__}"


def _fingerprint(case: Case) -> str:
    """Changes with labels, clinical values and file sizes, but not with paths or times."""
    files = (keys.CT, keys.PET, keys.MASK)
    sizes = [Path(case[name]).stat().st_size if case.get(name) else None for name in files]
    facts = sorted((name, value) for name, value in case.items() if name not in (*files, keys.FINGERPRINT))
    return hashlib.sha256(repr((sizes, facts)).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
