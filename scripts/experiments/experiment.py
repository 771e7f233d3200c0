"""An experiment of several folds: its plan, its commands, and the record that it leaves in its folder.

:mod:`train_folds` runs a plan; :mod:`ensemble_folds` and other tools read what it left ::

    runs/NAME/experiment.json   what was run on what: settings, cohort, versions, metrics of each fold
    runs/NAME/out_of_fold.csv   a row for each case, from a network that has not seen it, with its fold
    runs/NAME/cache/            preprocessed cases, shared by the folds
    runs/NAME/fold_0/           the bundle's output_dir: models/model.pt, history.json, evaluation/cases.csv ...
    runs/NAME/fold_0/fold.json  how the fold ended, and its metrics
    runs/NAME/fold_0/log.txt    output of the bundle's commands

torch and MONAI are imported in functions, so that commands read their options before.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from fire.parser import DefaultParseValue

from command_line import BUNDLE, ROOT

from scripts import keys
from scripts.cohorts.cohort import Cohort, Split, load_cohort
from scripts.cohorts.files import sha256_of, write_text
from scripts.imaging.images import ImageReadError, read_grid
from scripts.keys import Case

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

EXPERIMENT_FILE, OUT_OF_FOLD_FILE, FOLD_FILE, LOG_FILE = "experiment.json", "out_of_fold.csv", "fold.json", "log.txt"
TRAIN_CONFIG, EVALUATE_CONFIG = "configs/train.json", "configs/evaluate.json"
FINISHED, FAILED, PENDING = "finished", "failed", "pending"
TRAINING, VALIDATION, TEST = "training", "validation", "test"

DEEP: dict[str, Any] = {"survival_inputs": ["deep"], "l2_weight": 0.1, "hpv_inputs": ["image"]}
"""Ids of the configs of the paper's network: survival from deep features, HPV status from the image alone."""

PROTOCOL_SETTINGS: dict[str, dict[str, Any]] = {
    "partial": {"num_folds": 3},
    "full": {"num_folds": 5},
    "ablation": {"num_folds": 1, "epochs": 100, "val_interval": 10, **DEEP},  # as in the paper's Table 1
    "leave_one_centre_out": {},  # as many folds as centres
}
"""Settings of a protocol, unless the command line or an overlay sets them."""

RECORDED = ("command", "dataset_dir", "num_folds", "held_out", "settings", "cohort", "folds")  # of what is read
TEXT_IDS = ("dataset_dir", "ehr_csv", "output_dir", "ckpt_dir", "cache_dir", "tracking", "device")
"""Ids of the configs that are names or paths, even where they look like numbers."""
SET_HERE = ("output_dir", "ckpt_dir", "bundle_root", "fold", "checkpoint", "evaluate_on", "evaluation_dir")
"""Ids of the configs that train_folds sets for each fold."""
OPTIONS = ("leave_one_centre_out", "folds", "config_file", "jobs", "devices", "ray", "ray_cores", "ray_gpus")
"""Options of train_folds that are no ids of the configs."""
NOT_SETTINGS = ("output_dir", "ckpt_dir", "cache_dir", "bundle_root", "device", "num_workers", "fold")
"""Ids of the configs that may differ when an experiment is resumed: they do not change its results."""
NESTED = {
    "ct_window": "spec#ct_window",
    "bn_eps": "spec#bn_eps",
    "seg_classes": "spec#seg_classes",
    "lesion_peak": "spec#lesion_peak",
    "bn_momentum": "network_def#network#bn_momentum",
    "mask_gradient": "network_def#network#mask_gradient",
    "tumour_prior": "network_def#network#tumour_prior",
    "task_weights": "train#loss#task_weights",
    "hpv_alpha": "train#loss#hpv_alpha",
    "hpv_gamma": "train#loss#hpv_gamma",
    "event_fraction": "train#sampler#event_fraction",
}
"""Short name in a record -> id of a setting that is nested in the configs."""


class ExperimentError(ValueError):
    """An experiment that cannot be run, resumed or read; the message says why and what to do."""


# --- what is to be run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """An experiment to be run."""

    folder: Path  # of the experiment
    config_files: tuple[str, ...]  # of the training, relative to the bundle's folder or absolute
    overrides: dict[str, Any]  # ids of the configs and their values, the same for every fold
    config: dict[str, Any]  # the merged configs with the overrides, as config_of gives them
    epochs: int  # maximum number of epochs of a fold
    cohort: Cohort  # the cases
    splits: list[Split]  # of every fold
    folds: list[int]  # those to run now
    command: str  # for the same experiment

    @property
    def held_out(self) -> str:
        """The part whose predictions are kept as out-of-fold: the test cases where there are any."""
        return TEST if self.splits[0].test else VALIDATION

    @property
    def parts(self) -> list[str]:
        """Parts to evaluate; the training part, last, gives mean and deviation of the network's log hazards."""
        return [VALIDATION, *([TEST] if self.splits[0].test else []), TRAINING]

    def steps(self, fold: int) -> list[tuple[str, list[str]]]:
        """Title and command of each step of a fold."""
        overrides = {**self.overrides, "output_dir": str(fold_folder(self.folder, fold)), "fold": fold}
        steps = [(TRAINING, bundle_command("training", self.config_files, overrides))]
        overrides.pop("tracking", None)
        overrides["validate#dataset#shared_cache_dir"] = overrides.get("cache_dir")
        files = (*self.config_files, EVALUATE_CONFIG)
        return steps + [
            (f"evaluating {part}", bundle_command("evaluating", files, {**overrides, "evaluate_on": part}))
            for part in self.parts
        ]


def fold_folder(run: str | Path, fold: int) -> Path:
    """Folder of one fold of an experiment."""
    return Path(run) / f"fold_{fold}"


def evaluation_folder(run: str | Path, fold: int, part: str = VALIDATION) -> Path:
    """Folder of the evaluation of one part of a fold, as ``evaluate.json`` names it."""
    return fold_folder(run, fold) / ("evaluation" if part == VALIDATION else f"evaluation_{part}")


def bundle_command(workflow: str, config_files: Sequence[str], overrides: Mapping[str, Any]) -> list[str]:
    """``python -m monai.bundle run`` with configs and overrides; MONAI passes over None, but not over ``$None``."""
    values = {name: "$None" if value is None else value for name, value in overrides.items()}
    options = [f"--{name}={typed(value)}" for name, value in values.items()]
    return [sys.executable, "-m", "monai.bundle", "run", workflow, f"--config_file={list(config_files)}", *options]


def typed(value: Any) -> str:
    """How to type a value on a command line so that Fire reads it back.

    Example:
        >>> typed(3), typed("cpu"), typed("3"), typed(("seg", "surv")), typed(None)
        ('3', 'cpu', "'3'", "['seg', 'surv']", 'None')
    """
    if isinstance(value, str) and DefaultParseValue(value) == value:
        return value
    return repr(list(value) if isinstance(value, tuple) else value)


def read_override(name: str, text: str) -> Any:
    """Value of an id of the configs from what was typed: as MONAI reads it, but names and paths stay text.

    Example:
        >>> read_override("epochs", "3"), read_override("cache_dir", "2024_001"), read_override("ehr_csv", "None")
        (3, '2024_001', None)
    """
    value = DefaultParseValue(text)
    means_itself = isinstance(value, str) or value is None or text.startswith("[")
    return value if name not in TEXT_IDS or means_itself else text


def make_plan(
    dataset_dir: str,
    protocol: str,
    config_files: str | Sequence[str],
    folds: int | Sequence[int] | None,
    output_dir: str | None,
    overrides: Mapping[str, Any],
    command: str,
) -> Plan:
    """Read configs and cohort, and see that every fold can be split.

    Arguments as for ``train_folds.py``; ``command`` is recorded.

    Raises:
        ExperimentError: an id or file that does not exist, a number or a fold out of range.
        CohortError: the cohort cannot be used, or not be split like that.
    """
    files = (TRAIN_CONFIG, *(find_config(name) for name in as_list(config_files)))
    parser, values = merge_configs(files, protocol, overrides)
    values |= {"dataset_dir": str(Path(dataset_dir).expanduser().resolve()), "protocol": protocol}
    parser.update(values)
    # not through the parser, which would write :: for a # in a path
    cohort = load_cohort(values["dataset_dir"], parser["ehr_csv"], parser.get_parsed_content("clinical_features"))
    if protocol == "leave_one_centre_out" and "num_folds" not in overrides:
        values["num_folds"] = len(cohort.centres)
        parser.update(values)
    for name in ("epochs", "val_interval", "batch_size"):
        value = parser.get_parsed_content(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ExperimentError(f"{name} is {value!r}: give a whole number, 1 or more")
    num_folds, seed, epochs = (int(parser.get_parsed_content(name)) for name in ("num_folds", "seed", "epochs"))
    count = 1 if protocol == "ablation" else num_folds
    splits = [cohort.split(protocol, num_folds, fold, seed) for fold in range(max(1, count))]
    chosen = list(range(len(splits))) if folds is None else sorted({int(fold) for fold in as_list(folds)})
    if not set(chosen) <= set(range(len(splits))):
        raise ExperimentError(f"folds are {chosen}; this experiment has the folds 0 to {len(splits) - 1}")
    folder = Path(output_dir or ROOT / "runs" / default_name(dataset_dir, protocol, values)).expanduser().resolve()
    values.setdefault("cache_dir", str(folder / "cache"))
    config = config_of(parser)
    return Plan(folder, files, values, config, epochs, cohort, splits, chosen, command)


def merge_configs(
    files: Sequence[str], protocol: str, overrides: Mapping[str, Any]
) -> tuple[ConfigParser, dict[str, Any]]:
    """The configs in one parser, and the overrides with the settings of the protocol.

    Raises:
        ExperimentError: an override of an id that does not exist or is not the user's to set.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in files])
    check_overrides(overrides, parser)
    overlaid = {name for path in files[1:] for name in ConfigParser.load_config_file(str(BUNDLE / path))}
    brought = PROTOCOL_SETTINGS.get(protocol, {})
    values = {name: value for name, value in brought.items() if name not in overlaid} | dict(overrides)
    # The bundle runs in its own folder, where relative paths would refer to other files.
    if values.get("cache_dir") is not None:
        values["cache_dir"] = str(Path(values["cache_dir"]).expanduser().resolve())
    if isinstance(values.get("ehr_csv"), str) and Path(values["ehr_csv"]).is_file():  # else it lies in dataset_dir
        values["ehr_csv"] = str(Path(values["ehr_csv"]).resolve())
    return parser, values


def config_of(parser: ConfigParser) -> dict[str, Any]:
    """The merged configs, and the nested settings of :data:`NESTED` under their short names."""
    values = {name: parser.get(place) for name, place in NESTED.items()}
    return json.loads(json.dumps({**parser.get(), **values}, default=str))


def as_list(value: Any) -> list[Any]:
    """What may be typed as ``a,b``, ``['a','b']`` or ``a``, as a list.

    Example:
        >>> as_list("a,b"), as_list(("a", "b")), as_list(2), as_list("")
        (['a', 'b'], ['a', 'b'], [2], [])
    """
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, Sequence) else [value]


def find_config(name: str) -> str:
    """Path of a config file: relative to the bundle's folder if it is in there, else absolute.

    Raises:
        ExperimentError: there is no such file, it cannot be read as a config, or it is not for this tool.
    """
    from monai.bundle import ConfigParser

    if Path(name).name == "multi_gpu_train.json":
        raise ExperimentError(f"{name} is for torchrun: here each fold has a device of its own (--devices 0,1)")
    for folder in (BUNDLE, Path.cwd()):
        path = (folder / name).resolve()
        if path.is_file():
            try:
                content = ConfigParser.load_config_file(str(path))
            except ImportError as error:
                what = f"{path}: to read YAML, install PyYAML (pip install pyyaml), or write the config as JSON"
                raise ExperimentError(what) from error
            except Exception as error:  # of MONAI, the JSON or the YAML reader
                why = " ".join(str(error).split())
                raise ExperimentError(f"{path} cannot be read as a config (.json or .yaml): {why}") from error
            if not isinstance(content, dict):
                raise ExperimentError(f"{path} is no config: it must hold ids with their values, such as epochs: 100")
            return path.relative_to(BUNDLE).as_posix() if path.is_relative_to(BUNDLE) else str(path)
    raise ExperimentError(f"no config file {name}, neither in {BUNDLE} nor in {Path.cwd()}")


def check_overrides(overrides: Mapping[str, Any], parser: ConfigParser) -> None:
    """Refuse overrides that MONAI accepts silently: ids that no config has, or that train_folds sets."""
    from scripts.training.configuration import all_ids, unknown_id

    for name in overrides:
        if name in SET_HERE:
            raise ExperimentError(f"--{name} is set by train_folds for each fold")
        if name not in parser and name != "tracking":
            raise ExperimentError(unknown_id(name, [*all_ids(parser.get()), *OPTIONS]))


def default_name(dataset_dir: str, protocol: str, overrides: Mapping[str, Any]) -> str:
    """Name of the folder of an experiment.

    Example:
        >>> default_name("/data/hecktor2025", "partial", {"tasks": ("seg", "surv")})
        'hecktor2025_partial_seg_surv'
    """
    tasks = [str(task) for task in as_list(overrides.get("tasks", ""))]
    return "_".join([Path(dataset_dir).resolve().name, protocol, *tasks])


# --- its record ---------------------------------------------------------------------------------------------------


def new_record(plan: Plan) -> dict[str, Any]:
    """Content of ``experiment.json`` before any fold is trained."""
    return {
        "command": plan.command,
        "dataset_dir": plan.overrides["dataset_dir"],
        "protocol": plan.config["protocol"],
        "num_folds": len(plan.splits),
        "held_out": plan.held_out,
        "tasks": plan.overrides.get("tasks", plan.config["tasks"]),
        "settings": settings_of(plan.config),
        "configs": {name: sha256_of(BUNDLE / name) for name in (*plan.config_files, EVALUATE_CONFIG)},
        "cohort": describe_cohort(plan.cohort),
        "versions": versions(),
        "folds": {},
    }


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The merged configs without the ids that may differ when an experiment is resumed."""
    return {name: value for name, value in config.items() if name not in NOT_SETTINGS and not name.startswith("_")}


def versions() -> dict[str, str]:
    """Versions of the packages that affect the results."""
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return {
        "bundle": metadata["version"],
        **{name: version(name) for name in ("torch", "monai", "numpy")},
        "python": platform.python_version(),
    }


def describe_cohort(cohort: Cohort) -> dict[str, Any]:
    """Counts, statement and voxel sizes of a cohort."""
    return {
        "trained_on": cohort.statement(),
        "fingerprint": cohort.fingerprint,
        **counts(cohort.cases),
        "centres": {
            centre: counts([case for case in cohort.cases if case[keys.CENTRE] == centre]) for centre in cohort.centres
        },
        "clinical": clinical_statistics(cohort.cases),
        "excluded": len(cohort.exclusions),
        "voxel_limits": voxel_limits(cohort),
    }


def counts(cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Cases, and how many have which label."""
    return {
        "cases": len(cases),
        "with_mask": sum(case[keys.SEG_KNOWN] for case in cases),
        "with_hpv": sum(case[keys.HPV_KNOWN] for case in cases),
        "hpv_positive": sum(case[keys.HPV_KNOWN] and case[keys.HPV] > 0 for case in cases),
        "with_survival": sum(case[keys.SURV_KNOWN] for case in cases),
        "events": sum(case[keys.EVENT] for case in cases),
    }


def statement_on_part(statement: str, cases: int, number: int) -> str:
    """The statement on a cohort's ``cases``, with the ``number`` that it is used for where that is smaller.

    Example:
        >>> statement_on_part("60 phantoms", 60, 60), statement_on_part("60 phantoms", 60, 43)
        ('60 phantoms', '43 of 60 phantoms')
    """
    return statement if number >= cases else f"{number} of {statement}"


def clinical_statistics(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many cases have each clinical value, with mean and standard deviation (None if no case has it)."""
    statistics: dict[str, dict[str, Any]] = {}
    for name in cases[0][keys.CLINICAL]:
        known = [case[keys.CLINICAL][name] for case in cases if case[keys.CLINICAL][name] is not None]
        mean, deviation = (float(np.mean(known)), float(np.std(known))) if known else (None, None)
        statistics[name] = {"known": len(known), "mean": mean, "standard_deviation": deviation}
    return statistics


def voxel_limits(cohort: Cohort) -> dict[str, dict[str, float]]:
    """Range of the scans' voxel sizes for :mod:`scripts.imaging.quality`, by headers alone; empty without any."""
    from scripts.imaging.quality import fit_voxel_limits

    grids = []
    for case in cohort.cases:
        try:
            grids.append((read_grid(case[keys.CT]), read_grid(case[keys.PET])))
        except ImageReadError as error:
            print(f"{case[keys.PATIENT_ID]}: not counted in the range of voxel sizes: {error}", file=sys.stderr)
    return fit_voxel_limits(grids) if grids else {}


def claim_folder(plan: Plan) -> dict[str, Any]:
    """The record of an experiment in its folder, new or resumed.

    Raises:
        ExperimentError: the folder holds another experiment (each difference is named), or folds without a record.
    """
    from scripts.model.ensemble import settings_differences

    if not (plan.folder / EXPERIMENT_FILE).is_file():
        if list(plan.folder.glob(f"fold_*/{FOLD_FILE}")):
            raise ExperimentError(f"{plan.folder} holds folds but no {EXPERIMENT_FILE}: give another --output_dir")
        record = new_record(plan)
        write_record(plan.folder, record)
        return record
    record = read_experiment(plan.folder)
    found = settings_differences(record["settings"], settings_of(plan.config), ("there", "now"))
    differences = [text if len(text) <= 300 else f"{text[:297]}..." for text in found]
    if not differences and record["cohort"]["fingerprint"] != plan.cohort.fingerprint:
        cases = (record["cohort"]["cases"], len(plan.cohort.cases))
        number = f"{cases[0]} cases there, {cases[1]} now" if cases[0] != cases[1] else f"still {cases[0]} cases"
        differences = [f"patients, labels or clinical values have changed ({number}), so folds would mix"]
    if differences:
        raise ExperimentError(
            f"{plan.folder} holds an experiment with other settings ({'; '.join(differences)}): "
            "give another --output_dir, or delete that folder to start anew"
        )
    return record


def read_experiment(run: str | Path) -> dict[str, Any]:
    """``experiment.json`` of a folder."""
    path = Path(run) / EXPERIMENT_FILE
    if not path.is_file():
        raise ExperimentError(f"no {EXPERIMENT_FILE} in {run}: make an experiment with scripts/train_folds.py")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in RECORDED if name not in record]:
        raise ExperimentError(f"{path} has no entry '{missing[0]}': is it of scripts/train_folds.py?")
    return record


def read_fold(run: str | Path, fold: int) -> dict[str, Any]:
    """``fold.json`` of a fold; ``{"status": "pending"}`` before it has ended."""
    path = fold_folder(run, fold) / FOLD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"fold": fold, "status": PENDING}


def is_finished(plan: Plan, fold: int) -> bool:
    """Whether a fold is trained and evaluated and its files are still there."""
    files = [evaluation_folder(plan.folder, fold, part) / "cases.csv" for part in plan.parts]
    files.append(fold_folder(plan.folder, fold) / "models" / "model.pt")
    return read_fold(plan.folder, fold)["status"] == FINISHED and all(path.is_file() for path in files)


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    """Write ``experiment.json``."""
    write_text(run / EXPERIMENT_FILE, json.dumps(record, indent=1))


def write_fold(plan: Plan, fold: int, failure: Mapping[str, Any] | None) -> None:
    """Write ``fold.json``: how a fold ended, its metrics, and counts of its cases, once finished of those evaluated."""
    import torch

    parts = {part: plan.splits[fold].part(part) for part in plan.parts}
    if failure is None:
        parts = {part: evaluated(plan, fold, part, cases) for part, cases in parts.items()}
    outcome: dict[str, Any] = {
        "fold": fold,
        "status": FINISHED if failure is None else FAILED,
        "cases": {part: counts(cases) for part, cases in parts.items()},
        "versions": versions(),  # those of the folds differ where an experiment is resumed after an update
    }
    if plan.config["protocol"] == "leave_one_centre_out":
        outcome["centre"] = plan.cohort.centres[fold]
    folder = fold_folder(plan.folder, fold)
    if failure is None:
        state = torch.load(folder / "models" / "resume" / "last.pt", weights_only=True, mmap=True)
        outcome |= {name: state[name] for name in ("epoch", "best_epoch", "best", "stopped_early")}
        reports = {part: evaluation_folder(plan.folder, fold, part) / "metrics.json" for part in plan.parts}
        outcome["metrics"] = {part: json.loads(path.read_text())["metrics"] for part, path in reports.items()}
    else:
        outcome["failure"] = dict(failure)
    write_text(folder / FOLD_FILE, json.dumps(outcome, indent=1))


def evaluated(plan: Plan, fold: int, part: str, cases: Sequence[Case]) -> list[Case]:
    """Those of the cases that are in the table of an evaluation; quality control may have left out some."""
    table = pd.read_csv(evaluation_folder(plan.folder, fold, part) / "cases.csv", converters={"PatientID": str})
    return [case for case in cases if case[keys.PATIENT_ID] in set(table["PatientID"])]


def gather(plan: Plan, record: dict[str, Any]) -> pd.DataFrame:
    """Pool the held-out cases of the finished folds in ``out_of_fold.csv``, and update the record."""
    record["folds"] = {str(fold): read_fold(plan.folder, fold) for fold in range(len(plan.splits))}
    write_record(plan.folder, record)
    tables = []
    for fold in range(len(plan.splits)):
        if is_finished(plan, fold):
            path = evaluation_folder(plan.folder, fold, plan.held_out) / "cases.csv"
            table = pd.read_csv(path, converters={"PatientID": str})
            table.insert(1, "fold", fold)
            tables.append(table)
    pooled = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if tables:
        write_text(plan.folder / OUT_OF_FOLD_FILE, pooled.to_csv(index=False))
    return pooled
