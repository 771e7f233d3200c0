"""The variants of the training that the study of learning compares, and the runs of a study.

A run is one variant with one seed, made by ``train_folds.py``; :func:`check_run` checks its settings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import BUNDLE, ROOT

from experiments.evidence import CASES_FILE
from experiments.experiment import (
    DEEP,
    EVALUATE_CONFIG,
    EXPERIMENT_FILE,
    FINISHED,
    NESTED,
    TRAIN_CONFIG,
    TRAINING,
    ExperimentError,
    bundle_command,
    config_of,
    evaluation_folder,
    find_config,
    fold_folder,
    merge_configs,
    read_experiment,
    read_fold,
    settings_of,
    typed,
)
from scripts.model.ensemble import complete

OTHERS = "others"  # the part that the cases of another cohort are, in the names of folders
TRAIN_TOOL = ROOT / "scripts" / "train_folds.py"
NOT_COMPARED = ("dataset_dir", "ehr_csv")


BASE, BURDEN, CLINICAL_HPV = "base", "burden", "clinical_hpv"  # variants that others are compared with
DEMO, PAPER = "configs/demo.json", "configs/paper.json"
RATE = ("learning_rate", "lr_milestones", "lr_factors")


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        what: description of the difference.
        overrides: ids of the configs and their values.
        config_files: overlays on ``configs/train.json`` and that of the study.
        against: the variant that it is compared with.
        own_rate: whether the learning rate is that of ``config_files``, not that of the study's overlay.
    """

    what: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config_files: tuple[str, ...] = ()
    against: str = BASE
    own_rate: bool = True

    def __post_init__(self) -> None:
        """Ids of the configs for the short names of settings."""
        ids = {NESTED.get(name, name): value for name, value in self.overrides.items()}
        object.__setattr__(self, "overrides", ids)


TABLE_1: dict[str, Any] = {"protocol": "ablation", "epochs": 100, "val_interval": 10}


def deep(what: str, **overrides: Any) -> Variant:
    """A variant of the base."""
    return Variant(what, {**DEEP, **overrides})


def paper(what: str, against: str = BASE, own_rate: bool = True, **overrides: Any) -> Variant:
    """A variant of ``paper.json``."""
    return Variant(what, overrides, (PAPER,), against, own_rate)


def burden(what: str, against: str = BURDEN, **overrides: Any) -> Variant:
    """A variant of ``burden``: HPV status from the image alone."""
    return Variant(what, {"hpv_inputs": ["image"], **overrides}, against=against)


VARIANTS = {
    BASE: deep(
        "partial labels; segmentation, HPV and survival from deep features; gradient through the map stopped; HPV "
        "weight 10"
    ),
    BURDEN: burden("survival from burden, HPV probability and clinical values; HPV from the image", BASE),
    CLINICAL_HPV: Variant("as burden, HPV from image and clinical values, the default of the configs", against=BURDEN),
    "surv": deep("survival alone", tasks=["surv"]),
    "seg_surv": deep("segmentation and survival", tasks=["seg", "surv"]),
    "flow": deep("gradient flows through the probability map", mask_gradient="flow"),
    "equal": deep("equal task weights", task_weights=None),
    "uncertainty": deep("task weights learned by uncertainty", task_weights="uncertainty"),
    "full": deep("trained on cases with every label only (5 folds)", protocol="full"),
    "min_max": deep("PET by its own minimum and maximum", pet_window=None),
    "burden_uncertainty": burden("as burden, task weights learned by uncertainty", task_weights="uncertainty"),
    "burden_min_max": burden("as burden, with PET by its own minimum and maximum", pet_window=None),
    "paper": paper("paper.json on top: every choice of the paper, its learning rate too"),
    "paper_rate": paper("paper.json on top, with the base's learning rate", CLINICAL_HPV, own_rate=False),
    "paper_start": paper(
        "as paper_rate, starting from a tumour probability of 0.05 everywhere",
        "paper_rate",
        own_rate=False,
        tumour_prior=0.05,
    ),
    "table1": paper("paper.json on top, the split and the 100 epochs of the paper's Table 1", **TABLE_1),
    "table1_stop": paper("the same, gradient through the map stopped", "table1", **TABLE_1, mask_gradient="stop"),
    "table1_surv": paper("the same, survival alone", "table1", **TABLE_1, tasks=["surv"]),
    "table1_seg_surv": paper("the same, segmentation and survival", "table1", **TABLE_1, tasks=["seg", "surv"]),
    "balanced_hpv": deep("focal weight 0.5 for HPV instead of 0.25", hpv_alpha=0.5),
    "low_l2": deep("weight of the L2 term 0.001 instead of 0.1", l2_weight=0.001),
    "long": deep("three times as many epochs", epochs=72, val_interval=12, lr_milestones=[48, 63]),
}
"""The variants, in the order in which they are run by default."""


@dataclass(frozen=True)
class Study:
    """Runs to make or to report.

    Attributes:
        folder: of all runs.
        dataset_dir: folder of the cohort.
        fingerprint: of the cohort.
        variants: names, the most important first.
        seeds: of folds, initial weights and batches.
        folds: of each run.
        overrides: ids of the configs for every run.
        test_dir: folder of another cohort to evaluate the networks on; None: the held-out cases of each network.
        overlay: config of grid, epochs and learning rate on ``configs/train.json``.
    """

    folder: Path
    dataset_dir: str
    fingerprint: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    folds: tuple[int, ...]
    overrides: Mapping[str, Any]
    test_dir: str | None = None
    overlay: str = DEMO

    @property
    def cache(self) -> str:
        """Folder of the preprocessed cases, shared by the runs."""
        return str(self.folder / "cache")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(variant, seed) in the order to run: every variant once before any has a second seed."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    def run_folder(self, variant: str, seed: int) -> Path:
        """Folder of a run."""
        return self.folder / run_name(variant, seed)

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """Ids of the configs of a run and their values; those for every run go before the variant's."""
        rate = {}
        if not VARIANTS[variant].own_rate:
            values = json.loads((BUNDLE / find_config(self.overlay)).read_text(encoding="utf-8"))
            rate = {name: values[name] for name in RATE if name in values}
        return {**rate, **self.overrides, **VARIANTS[variant].overrides, "seed": seed}

    def config_files(self, variant: str) -> list[str]:
        """Overlays of a run on ``configs/train.json``."""
        return [self.overlay, *VARIANTS[variant].config_files]

    def commands(self, variant: str, seed: int) -> list[list[str]]:
        """``train_folds.py`` for a run, and with ``test_dir`` the bundle's ``evaluating`` for each fold."""
        folds = self.folds if self.test_dir else ()
        return [self.training(variant, seed), *(self.evaluating(variant, seed, fold) for fold in folds)]

    def evaluating(self, variant: str, seed: int, fold: int) -> list[str]:
        """The bundle's ``evaluating`` of a network on the other cohort."""
        folder = self.run_folder(variant, seed)
        options = {
            "dataset_dir": self.test_dir,
            "output_dir": str(fold_folder(folder, fold)),
            "ckpt_dir": str(fold_folder(folder, fold) / "models"),
            "evaluation_dir": str(evaluation_folder(folder, fold, OTHERS)),
            "evaluate_on": "all",
            "validate#dataset#shared_cache_dir": self.cache,
        }
        files = [TRAIN_CONFIG, *(find_config(name) for name in self.config_files(variant)), EVALUATE_CONFIG]
        return bundle_command("evaluating", files, options)

    def cases_files(self, variant: str, seed: int, fold: int) -> tuple[Path, Path]:
        """Of one network: the cases that judge it, and its training cases, which its HPV threshold is chosen on."""
        folder = self.run_folder(variant, seed)
        judged = OTHERS if self.test_dir else read_experiment(folder)["held_out"]
        paths = (evaluation_folder(folder, fold, part) / CASES_FILE for part in (judged, TRAINING))
        return next(paths), next(paths)

    def is_complete(self, variant: str, seed: int, folds: Sequence[int]) -> bool:
        """Whether these folds of a run are trained and evaluated."""
        folder = self.run_folder(variant, seed)
        return (folder / EXPERIMENT_FILE).is_file() and all(
            read_fold(folder, fold)["status"] == FINISHED
            and all(path.is_file() for path in self.cases_files(variant, seed, fold))
            for fold in folds
        )

    def training(self, variant: str, seed: int) -> list[str]:
        """``train_folds.py`` for a run."""
        options = {
            "dataset_dir": self.dataset_dir,
            "output_dir": str(self.run_folder(variant, seed)),
            "config_file": self.config_files(variant),
            "folds": list(self.folds),
            "cache_dir": self.cache,
            **self.settings(variant, seed),
        }
        return [sys.executable, str(TRAIN_TOOL), *(f"--{name}={typed(value)}" for name, value in options.items())]


def run_name(variant: str, seed: int) -> str:
    """Name of the folder of a run.

    Example:
        >>> run_name("flow", 1)
        'flow_s1'
    """
    return f"{variant}_s{seed}"


def check_variants(names: Sequence[str]) -> tuple[str, ...]:
    """The names, or all.

    Raises:
        ExperimentError: for one that there is not.
    """
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        raise ExperimentError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    return tuple(names) or tuple(VARIANTS)


def check_run(study: Study, variant: str, seed: int) -> None:
    """Check that a run on disk has the settings of its variant.

    A run may lack an id that came later: it was run with what was done then (:func:`.complete`), else
    with the default of ``configs/train.json``. Before ``tumour_prior`` the layer of the logits had random weights.
    Ids of another kind than plain numbers, texts and lists (objects, expressions) follow from the others.

    Raises:
        ExperimentError: it has other settings or another cohort; each difference is named.
    """
    folder = study.run_folder(variant, seed)
    record = read_experiment(folder)
    settings = study.settings(variant, seed)
    files = (TRAIN_CONFIG, *(find_config(name) for name in study.config_files(variant)))
    parser, values = merge_configs(files, settings.get("protocol", "partial"), settings)
    parser.update(values)
    expected = settings_of(config_of(parser))
    defaults, found = config_of(merge_configs((TRAIN_CONFIG,), "partial", {})[0]), record["settings"]
    there = {**defaults, "tumour_prior": None, **complete(found)}
    differences = [
        f"{name} {value!r} instead of {expected[name]!r}"
        for name, value in ((name, there.get(name)) for name in expected if name not in NOT_COMPARED)
        if is_plain(value) and is_plain(expected[name]) and value != expected[name]
    ]
    if record["cohort"]["fingerprint"] != study.fingerprint:
        differences.append(f"another cohort ({record['dataset_dir']})")
    if differences:
        raise ExperimentError(f"{folder} is not the run that its name says: {'; '.join(differences)}")


def is_plain(value: Any) -> bool:
    """Whether a value of a config stands for itself.

    Example:
        >>> is_plain([0, 25]), is_plain({"hpv": 10.0}), is_plain("$@a + 1"), is_plain("%run")
        (True, True, False, False)
    """
    text = json.dumps(value)
    return not any(mark in text for mark in ("$", "@", "%", "_target_"))
