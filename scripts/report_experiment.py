"""One HTML page about an experiment, to be understood without the code: data, training, figures, example cases.

``python scripts/report_experiment.py --run runs/NAME`` takes what ``scripts/evaluate_folds.py`` wrote. With ``--runs``
other experiments on the same cohort stand beside it in the paper's Table 1 (tasks) and Table 2 (protocols).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from command_line import BUNDLE, run_tool

from evaluate_folds import EVALUATION_FOLDER
from experiments.comparators import HPV_COMPARED
from experiments.evidence import CASES_FILE, METRICS_FILE
from experiments.experiment import (
    FINISHED,
    TEST,
    VALIDATION,
    ExperimentError,
    as_list,
    bundle_command,
    evaluation_folder,
    fold_folder,
    read_experiment,
)
from scripts import keys
from scripts.cohorts.clinical import feature_named
from scripts.cohorts.cohort import Case, Cohort, CohortError, load_cohort
from scripts.evaluation.case_metrics import LESIONS, MEASURES, PAPER_MEASURES
from scripts.evaluation.survival import DAYS_PER_YEAR
from scripts.prediction.figures import save_case_figure
from scripts.prediction.outputs import folder_name
from scripts.prediction.pages import Page, Words
from scripts.training.sampling import DOUBTS_FILE, EXCLUSIONS_FILE

EXAMPLES_FOLDER = "examples"
TASK_NAMES = {keys.TASK_SEG: "segmentation", keys.TASK_HPV: "HPV", keys.TASK_SURV: "survival"}
PROTOCOL_NAMES = {
    "partial": "partial-label (every case, whatever labels it has)",
    "full": "full-label (cases with mask and HPV status)",
    "ablation": "one split: 60 % training, 30 % validation, 10 % test",
    "leave_one_centre_out": "each centre left out in turn",
}
GLOSSARY = [
    (
        "C-index (Harrell)",
        "How often, of two patients, the one with the higher predicted risk has the relapse first. 0.5 is chance, 1 is "
        "perfect. Uno's C weights patients for those lost to follow-up.",
    ),
    ("Dice", "Overlap of the predicted with the true tumour outline: 0 none, 1 perfect. Aggregated: of all voxels."),
    ("HPV balanced accuracy", "Mean of sensitivity and specificity for a positive HPV status. 0.5 is chance."),
    ("dynamic AUC", "How well the risk tells who relapses up to a time from who is followed beyond it. 0.5 is chance."),
    ("Brier score", "Mean squared error of the predicted probability, up to tau. 0 is perfect."),
    ("Brier skill", "Above 0: better than giving everybody the average survival curve (Kaplan-Meier)."),
    (
        "calibration",
        "Whether of patients given 80 %, 80 % stay without relapse. Slope 1 is right, below 1 too extreme.",
    ),
    (
        "[..., ...]",
        "95 % interval by bootstrap over patients, networks held fixed. Intervals that overlap widely are no "
        "difference.",
    ),
    ("(120, 30)", "Behind a figure: 120 patients, 30 of them with a relapse or, for HPV, with a positive status."),
    ("out-of-fold", "Predicted by the network that was trained without that patient."),
]
PICTURES = {
    "training": "Training losses and validation metrics by epoch, a line a fold.",
    "c_index": "C-index of all held-out cases, of folds and centres, and what it stands against.",
    "kaplan_meier_median": "Recurrence-free survival of the halves with lower and higher predicted risk.",
    "kaplan_meier_tertiles": "The same in thirds. Ticks: patients whose follow-up ended.",
    "calibration_2y": "Observed against predicted survival at two years, by thirds of the risk.",
    "roc": "ROC of HPV status; the dots are the thresholds in use.",
    "dice": "Dice of each case; red: median and quartiles.",
}

WIDE = ("training", "dice")
SHOWN_SETTINGS = (
    *("epochs", "batch_size", "learning_rate", "roi_size", "spacing_mm", "ct_window", "pet_window"),
    *("mask_gradient", "task_weights", "event_fraction", "seed"),
)
CENTRE_SURVIVAL = ("C-index (Uno)", "AUC at 2 years", "Brier skill", "observed less predicted, 2 years")
COUNTED = ("patients", "events", "positive")
NO_TASK = "-"


@dataclass(frozen=True)
class Experiment:
    """An experiment and its evaluation.

    Attributes:
        folder: of the experiment.
        record: ``experiment.json``.
        report: ``evaluation/metrics.json``.
    """

    folder: Path
    record: dict[str, Any]
    report: dict[str, Any]

    @property
    def tasks(self) -> str:
        """Its tasks in words."""
        return ", ".join(TASK_NAMES.get(task, task) for task in self.record["tasks"])


def read_evaluated(run: str | Path) -> Experiment:
    """An experiment that ``evaluate_folds.py`` has judged.

    Raises:
        ExperimentError: it has not, or before the last fold was finished.
    """
    folder = Path(run)
    record = read_experiment(folder)
    path = folder / EVALUATION_FOLDER / METRICS_FILE
    command = f"python scripts/evaluate_folds.py --run {run}"
    if not path.is_file():
        raise ExperimentError(f"{folder} is not evaluated: run `{command}` first")
    report = json.loads(path.read_text(encoding="utf-8"))
    if any("metrics" not in centre for centre in report["centres"].values()):
        raise ExperimentError(f"{path} is of an earlier version, which said less of each centre: run `{command}` again")
    finished = sorted(int(fold) for fold, outcome in record["folds"].items() if outcome["status"] == FINISHED)
    if finished != sorted(report["folds_evaluated"]):
        raise ExperimentError(
            f"{path} is of the folds {report['folds_evaluated']}, finished are {finished}: run `{command}` again"
        )
    return Experiment(folder, record, report)


# --- cells ------------------------------------------------------------------------------------------------------------


def value_cell(row: Mapping[str, Any], digits: int = 3) -> str:
    """``0.712 [0.65, 0.77]``, or the reason why there is none."""
    if row["value"] is None:
        return NO_TASK if row["reason"] == "not a task of this model" else Words(f"none: {row['reason']}")
    if row.get("low") is None or row.get("high") is None:
        return decimals(row["value"], digits)
    return f"{decimals(row['value'], digits)} [{decimals(row['low'], digits)}, {decimals(row['high'], digits)}]"


def decimals(value: float, digits: int) -> str:
    """A rounded number, without the sign of a zero.

    Example:
        >>> decimals(-0.0001, 3), decimals(-0.51, 1)
        ('0.000', '-0.5')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def counts_cell(row: Mapping[str, Any]) -> str:
    """``120 patients, 30 events`` of a figure."""
    names = ("patients", "events", "positive", "cases", "controls", *LESIONS.values(), "missed", "both_empty")
    return Words(", ".join(f"{row[name]} {name.replace('_', ' ')}" for name in names if name in row))


def measure_rows(metrics: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[list[object]]:
    """Rows of measures with value, interval and counts."""
    return [
        [MEASURES[name].title, value_cell(metrics[name], MEASURES[name].digits), counts_cell(metrics[name])]
        for name in names
    ]


# --- sections ---------------------------------------------------------------------------------------------------------


def is_phantom(experiment: Experiment) -> bool:
    """Whether the cohort says of itself that it holds phantoms."""
    return "phantom" in experiment.report["data"].lower()


def write_head(page: Page, main: Experiment) -> None:
    """What this is, on which data, and the figures that matter most."""
    report = main.report
    if is_phantom(main):
        page.paragraph(
            "These are digital PHANTOMS: computer-made scans and outcomes, no patients. The page shows that the "
            "software works; it says nothing about cancer.",
            "warning",
        )
    page.paragraph("For research only. Not a medical device; not for decisions about patients.", "warning")
    page.paragraph(
        "A network reads a PET/CT scan of the head and neck and clinical values. Its tasks here: "
        f"{main.tasks}. It was trained on a part of the cases and judged on those it had not seen. "
        f"Data: {report['data']}. Protocol: {PROTOCOL_NAMES.get(report['protocol'], report['protocol'])}; "
        f"{len(report['folds_evaluated'])} of {main.record['num_folds']} networks trained and judged on their "
        f"{report['held_out']} cases."
    )
    for note in report["notes"]:
        page.paragraph(f"Note: {note}.", "note")
    page.heading("In short")
    rows = measure_rows(report["pooled"]["metrics"], PAPER_MEASURES)
    rows += comparator_rows(report["pooled"]["metrics"], report)
    page.table(["figure", "value [95 % interval]", ""], rows, "All held-out cases together.")
    page.heading("What the figures mean", 3)
    page.definitions(GLOSSARY)


def comparator_rows(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> list[list[Any]]:
    """What clinical values alone tell of the same cases, the paired differences, and the phantoms' truth."""
    clinical = report["clinical_only"]
    rows: list[list[Any]] = [comparator_row("C-index of clinical values alone", clinical["c_index"], clinical)]
    if "model_minus_clinical" in clinical:
        rows.append(difference_row("C-index, network less clinical values", clinical["model_minus_clinical"]))
    if metrics["hpv_auc"]["value"] is not None:
        hpv = clinical["hpv"]
        for name in HPV_COMPARED:
            title = MEASURES[name].title
            rows.append(comparator_row(f"{title} of clinical values alone", hpv[name], hpv))
            if "model_minus_clinical" in hpv:
                rows.append(difference_row(f"{title}, network less clinical values", hpv["model_minus_clinical"][name]))
    if report["oracle"]:
        truth = "the risk that the phantoms were made with: no model can do better but by luck"
        rows.append(comparator_row("C-index of the phantoms' true risk", report["oracle"], {"model": truth}))
    return rows


def comparator_row(title: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> list[Any]:
    """A figure with its counts and the ``model`` that it is of."""
    return [title, value_cell(row), Words("; ".join(filter(None, [counts_cell(row), about.get("model")])))]


def difference_row(title: str, row: Mapping[str, Any]) -> list[Any]:
    """A paired difference with its interval, its counts and its p value."""
    p = f"paired, p {row['p']:.3f}" if row["value"] is not None else ""
    return [title, value_cell(row), Words("; ".join(filter(None, [counts_cell(row), p])))]


def write_data(page: Page, main: Experiment) -> Cohort | None:
    """Cohort table, clinical values and the flow of exclusions; the cohort where it can still be read."""
    page.heading("The data")
    described = main.record["cohort"]
    titles = ["centre", "cases", "with mask", "HPV known", "HPV positive", "survival known", "relapses"]
    names = ["cases", "with_mask", "with_hpv", "hpv_positive", "with_survival", "events"]
    rows = [[centre, *(counts[name] for name in names)] for centre, counts in described["centres"].items()]
    rows.append(["all", *(described[name] for name in names)])
    page.table(titles, rows, "Cases that were used, by centre.")
    settings = main.record["settings"]
    try:
        cohort = load_cohort(main.record["dataset_dir"], settings.get("ehr_csv"), settings["clinical_features"])
    except (CohortError, OSError) as error:
        page.paragraph(f"The cohort can no longer be read, so no details of it: {str(error).splitlines()[0]}", "note")
        return None
    if cohort.fingerprint != described["fingerprint"]:
        page.paragraph("The cohort has changed since the folds were trained, so no details of it.", "note")
        return None
    write_clinical(page, cohort)
    write_flow(page, main, cohort)
    return cohort


def write_clinical(page: Page, cohort: Cohort) -> None:
    """How often each clinical value is known and what it is."""
    rows = []
    for name in cohort.cases[0][keys.CLINICAL]:
        known = [case[keys.CLINICAL][name] for case in cohort.cases if case[keys.CLINICAL][name] is not None]
        share = f"{len(known)} ({100 * len(known) / len(cohort.cases):.0f} %)"
        values = Counter(known)
        if len(values) > 8:
            low, middle, high = pd.Series(known).quantile([0.25, 0.5, 0.75])
            shown = f"median {middle:g} (quartiles {low:g} to {high:g})"
        else:
            levels = feature_named(name).levels
            words = {value: next(iter(levels.get(value) or ()), f"{value:g}") for value in values}
            shown = ", ".join(f"{words[value]}: {count}" for value, count in sorted(values.items()))
        rows.append([name.replace("_", " "), share, Words(shown or "none known")])
    page.table(["clinical value", "known", "values (patients)"], rows, "Clinical values that the network reads.")


def write_flow(page: Page, main: Experiment, cohort: Cohort) -> None:
    """From the patients found to those judged, and why the others left."""
    reasons = Counter(exclusion.reason for exclusion in cohort.exclusions)
    leaving = [f"{count} left out: {reason}" for reason, count in reasons.items()]
    unreadable = unreadable_cases(main)
    judged = main.report["pooled"]
    metrics = judged["metrics"]
    labels = ", ".join(
        f"{metrics[name]['patients']} {what}"
        for name, what in (("dice", "for segmentation"), ("balanced_accuracy", "for HPV"), ("c_index", "for survival"))
        if metrics[name]["patients"]
    )
    page.heading("From patients found to patients judged", 3)
    page.flow(
        [
            (f"{len(cohort.cases) + len(cohort.exclusions)} patients in the folder or its tables", leaving),
            (f"{len(cohort.cases)} cases, dealt over the folds", unreadable),
            (
                f"{judged['cases']} cases judged by a network that had not seen them: {labels or 'none with a label'}",
                [],
            ),
        ]
    )
    doubts = listed(main, DOUBTS_FILE)
    if len(doubts):
        counts = ", ".join(f"{check} {count}" for check, count in doubts["check"].value_counts().items())
        page.paragraph(
            f"Quality control doubts {doubts['PatientID'].nunique()} of the cases judged ({counts}): see "
            f"fold_*/evaluation*/{DOUBTS_FILE}.",
            "note",
        )


def listed(main: Experiment, name: str) -> pd.DataFrame:
    """The rows of a list that the evaluation of each fold left beside its figures."""
    folders = [evaluation_folder(main.folder, fold, main.report["held_out"]) for fold in main.report["folds_evaluated"]]
    tables = [pd.read_csv(folder / name, dtype=str) for folder in folders if (folder / name).is_file()]
    return pd.concat(tables) if tables else pd.DataFrame()


def unreadable_cases(main: Experiment) -> list[str]:
    """What kept held-out cases from being judged, one line a reason."""
    count = len(listed(main, EXCLUSIONS_FILE))
    lines = [f"{count} could not be read: see fold_*/evaluation*/{EXCLUSIONS_FILE}"] if count else []
    missing = main.record["num_folds"] - len(main.report["folds_evaluated"])
    if missing:
        lines.append(f"the held-out cases of {missing} folds that are not finished")
    if main.report["held_out"] == TEST:
        lines.append("the training and validation cases of the one split")
    return lines


def write_tables(page: Page, experiments: Sequence[Experiment]) -> None:
    """The paper's Table 1 and Table 2 for this data, and each centre left out."""
    page.heading("The paper's tables, on this data")
    page.paragraph(
        "Figures of different cohorts must not be compared: those of the paper (C-index 0.682 partial-label, 0.666 "
        "full-label, in cross-validation on HECKTOR 2025) belong to other patients."
    )
    ablation = [item for item in experiments if item.record["protocol"] == "ablation"]
    folds = [item for item in experiments if item.record["protocol"] in ("partial", "full")]
    centres = [item for item in experiments if item.record["protocol"] == "leave_one_centre_out"]
    page.heading("Table 1: which tasks help", 3)
    if ablation:
        write_ablation(page, ablation)
    else:
        page.paragraph(
            "No ablation was given. Train it with scripts/train_folds.py --protocol ablation --tasks surv (then "
            "seg,surv and seg,hpv,surv), evaluate each, and name their folders with --runs.",
            "note",
        )
    page.heading("Table 2: protocols and folds", 3)
    if folds:
        write_protocols(page, folds)
    else:
        page.paragraph("No cross-validation (protocol partial or full) was given with --runs.", "note")
    if centres:
        page.heading("Each centre left out", 3)
        write_left_out(page, centres)


def write_ablation(page: Page, experiments: Sequence[Experiment]) -> None:
    """Two rows a set of tasks: the validation cases and the test cases, and how the epoch was chosen."""
    rows: list[list[object]] = []
    ordered = sorted(experiments, key=lambda item: len(item.record["tasks"]))
    for item, title in zip(ordered, told_apart(ordered, [item.tasks for item in ordered]), strict=True):
        parts = {
            VALIDATION: item.record["folds"]["0"]["metrics"][VALIDATION],
            TEST: item.report["pooled"]["metrics"],
        }
        for part, metrics in parts.items():
            cells = [counted_cell(metrics[name]) for name in PAPER_MEASURES]
            rows.append([title if part == VALIDATION else "", Words(part), *cells])
    record = experiments[0].record
    cases = ", ".join(f"{record['folds']['0']['cases'][part]['cases']} {part}" for part in (VALIDATION, TEST))
    chosen = "the last epoch counts"
    if record["settings"].get("keep_epoch", "best") == "best":
        chosen = "the best epoch was chosen on the validation cases, which flatters them"
    page.table(
        ["tasks", "cases", *(MEASURES[name].title for name in PAPER_MEASURES)],
        rows,
        f"One split, {record['settings']['epochs']} epochs, validated every {record['settings']['val_interval']}; "
        f"{chosen} ({cases} cases).",
    )


def told_apart(experiments: Sequence[Experiment], titles: Sequence[str]) -> list[str]:
    """The titles, with the folder's name where several are alike."""
    names = [item.folder.resolve().name for item in experiments]
    return [f"{t} ({name})" if titles.count(t) > 1 else t for t, name in zip(titles, names, strict=True)]


def write_protocols(page: Page, experiments: Sequence[Experiment]) -> None:
    """The paper's metrics by fold, their mean and all cases pooled; three rows an experiment."""
    most = max(len(item.report["folds"]) for item in experiments)
    rows: list[list[object]] = []
    titles = told_apart(experiments, [f"{item.record['protocol']}: {item.tasks}" for item in experiments])
    for item, title in zip(experiments, titles, strict=True):
        for name in PAPER_MEASURES:
            values = [fold["metrics"][name]["value"] for fold in item.report["folds"].values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values] + [""] * (most - len(values))
            mean = item.report["fold_mean"][name]
            spread = "" if mean["standard_deviation"] is None else f" ± {mean['standard_deviation']:.3f}"
            average = "-" if mean["mean"] is None else f"{mean['mean']:.3f}{spread}"
            label = title if name == PAPER_MEASURES[0] else ""
            rows.append(
                [label, MEASURES[name].title, *cells, average, counted_cell(item.report["pooled"]["metrics"][name])]
            )
    heads = ["protocol: tasks", "figure", *(f"fold {k}" for k in range(most)), "mean ± sd", "pooled [95 % interval]"]
    page.table(heads, rows, "Validation cases of each fold, mean over folds as in the paper, and all pooled.")


def write_left_out(page: Page, experiments: Sequence[Experiment]) -> None:
    """The paper's metrics on each centre by the network trained on the others."""
    for item in experiments:
        rows = [
            [name, fold["cases"], *(counted_cell(fold["metrics"][measure]) for measure in PAPER_MEASURES)]
            for name, fold in item.report["folds"].items()
        ]
        titles = ["centre left out", "cases", *(MEASURES[name].title for name in PAPER_MEASURES)]
        page.table(titles, rows, f"Tasks: {item.tasks}.")


def pictures_of(
    main: Experiment, names: Sequence[str], figures: Mapping[str, Mapping[str, str]]
) -> tuple[list[tuple[bytes, str]], list[str]]:
    """Pictures of the evaluation with captions, and in words those that could not be drawn."""
    shown, missing = [], []
    for name in names:
        entry = figures[name]
        if "file" in entry:
            shown.append(((main.folder / EVALUATION_FOLDER / entry["file"]).read_bytes(), PICTURES[name]))
        else:
            missing.append(f"{PICTURES[name]} Not drawn: {entry['reason']}.")
    return shown, missing


def write_pictures(
    page: Page, main: Experiment, *names: str, figures: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Pictures side by side (of the pooled cases unless others are given), then a note for each that is missing."""
    shown, missing = pictures_of(main, names, figures or main.report["figures"])
    if shown:
        page.figures(shown, wide=len(names) == 1 and names[0] in WIDE)
    for text in missing:
        page.paragraph(text, "note")


def write_survival(page: Page, main: Experiment) -> None:
    """Rank, probability and risk groups."""
    page.heading("Survival without relapse")
    survival = main.report["pooled"]["survival"]
    if "about" not in survival:
        page.paragraph(f"No figures: {survival['reason']}.")
        return
    write_pictures(page, main, "c_index", "kaplan_meier_median", "kaplan_meier_tertiles", "calibration_2y")
    page.table(["figure", "value [95 % interval]", "of"], survival_rows(survival), "All held-out cases together.")
    page.paragraph(f"Risks: {main.report['normalisation']}. Risk groups: {main.report['risk_groups']}.", "note")


def survival_rows(survival: Mapping[str, Any]) -> list[list[object]]:
    """Rows of the figures of :func:`scripts.evaluation.survival_metrics.survival_metrics`."""
    tau = f"tau = {survival['about']['tau_days'] / DAYS_PER_YEAR:.1f} years"
    titles = {"c_index": "C-index (Harrell)", "uno_c_index": f"C-index (Uno, up to {tau})"}
    years = {name: name[4:-1] for name in survival if name.startswith("auc_")}
    titles |= {name: f"dynamic AUC at {count} year{'s' * (count != '1')}" for name, count in years.items()}
    titles |= {
        "integrated_brier": f"Brier score up to {tau}",
        "integrated_brier_null": "the same for the average curve",
        "brier_skill": "Brier skill",
    }
    rows: list[list[object]] = [
        [title, value_cell(survival[name]), counts_cell(survival[name])] for name, title in titles.items()
    ]
    calibration = survival["calibration_2y"]
    for name, title in (("difference", "observed less predicted survival, 2 years"), ("slope", "calibration slope")):
        rows.append([title, value_cell(calibration[name]), counts_cell(calibration[name])])
    return rows


def write_hpv(page: Page, main: Experiment) -> None:
    """ROC, confusion matrix, figures."""
    page.heading("HPV status")
    metrics = main.report["pooled"]["metrics"]
    write_pictures(page, main, "roc")
    names = ("balanced_accuracy", "hpv_auc", "hpv_average_precision")
    page.table(["figure", "value [95 % interval]", "of"], measure_rows(metrics, names))
    row = metrics["balanced_accuracy"]
    if "confusion" in row:
        found = row["confusion"]
        page.table(
            ["true status", "called positive", "called negative"],
            [
                ["HPV positive", found["true_positive"], found["false_negative"]],
                ["HPV negative", found["false_positive"], found["true_negative"]],
            ],
            "Patients by true status and call; thresholds "
            + ", ".join(f"{value:.3f}" for value in row["thresholds"])
            + ", chosen on the held-out cases of the other folds.",
        )


def write_segmentation(page: Page, main: Experiment) -> None:
    """Overlap, surface, volume, lesions."""
    page.heading("Tumour outline")
    write_pictures(page, main, "dice")
    names = [name for name in MEASURES if name.startswith(("dice", "surface", "volume", "false", *LESIONS))]
    metrics = main.report["pooled"]["metrics"]
    page.table(["figure", "value [95 % interval]", "of"], measure_rows(metrics, names))
    page.paragraph(
        "Dice and the other figures are taken within the network's box and on its grid. Surface distance: median over "
        "cases of the 95 % Hausdorff distance, without those in which one of the masks is empty (missed) or both. "
        "Volume error: mean absolute difference; relative: median. Sensitivity: share of all true lesions, primaries "
        "or nodes of which at least 30 % is covered. A predicted lesion is false where it touches no true one; the "
        "network does not say which of them are nodes.",
        "note",
    )


def counted_cell(row: Mapping[str, Any]) -> str:
    """``0.712 [0.65, 0.77] (120, 30)``: a figure with the numbers of :data:`COUNTED`, or the reason for none."""
    if row["value"] is None:
        return value_cell(row)
    return f"{value_cell(row)} ({', '.join(str(row[name]) for name in COUNTED if name in row)})"


def write_centres(page: Page, centres: Mapping[str, Mapping[str, Any]], caption: str) -> None:
    """The paper's metrics by centre, then what else can be said about survival."""
    rows = [
        [centre, judged["cases"], *(counted_cell(judged["metrics"][name]) for name in PAPER_MEASURES)]
        for centre, judged in centres.items()
    ]
    titles = ["centre", "cases", *(MEASURES[name].title for name in PAPER_MEASURES)]
    page.table(titles, rows, caption)
    if not any("about" in judged["survival"] for judged in centres.values()):
        return
    rows = []
    for centre, judged in centres.items():
        survival = judged["survival"]
        if "about" in survival:
            figures = [survival[name] for name in ("uno_c_index", "auc_2y", "brier_skill")]
            cells = [value_cell(figure) for figure in (*figures, survival["calibration_2y"]["difference"])]
            rows.append([centre, f"{survival['about']['patients']}, {survival['about']['events']}", *cells])
        else:
            rows.append([centre, "", Words(f"none: {survival['reason']}"), *[""] * (len(CENTRE_SURVIVAL) - 1)])
    page.table(["centre", "patients, relapses", *CENTRE_SURVIVAL], rows, "Survival by centre.")


def write_comparisons(page: Page, main: Experiment) -> None:
    """Another experiment and another cohort, where the evaluation had them."""
    comparison, external = main.report.get("comparison"), main.report.get("external")
    if comparison:
        page.heading("Against another experiment")
        rows = [
            [
                MEASURES[name].title,
                value_cell(row),
                f"{row['p']:.3f}" if row["value"] is not None else "",
                counts_cell(row),
            ]
            for name, row in comparison["differences"].items()
        ]
        caption = f"This experiment less {Path(comparison['other']).name} on the same patients (paired bootstrap)."
        page.table(["figure", "difference [95 % interval]", "p", "of"], rows, caption)
        page.preformatted(comparison["other_command"])
    if external:
        write_external(page, main, external)


def write_external(page: Page, main: Experiment, external: Mapping[str, Any]) -> None:
    """The ensemble on another cohort."""
    page.heading("Another cohort")
    page.paragraph(
        f"All folds together on {external['cases']} cases, none of them in the experiment. Data: {external['data']}. "
        "HPV threshold, calibration and cut points are those that the ensemble carries."
    )
    survival = external["survival"]
    rows = measure_rows(external["metrics"], list(MEASURES))
    rows += survival_rows(survival)[1:] if "about" in survival else []  # the first, Harrell's, is a measure too
    rows += comparator_rows(external["metrics"], external)
    page.table(["figure", "value [95 % interval]", "of"], rows)
    figures = external["figures"]
    write_pictures(page, main, *(name for name in PICTURES if name in figures), figures=figures)
    write_centres(page, external["centres"], "By centre.")


# --- example cases ----------------------------------------------------------------------------------------------------


def choose_examples(cases: pd.DataFrame) -> dict[str, pd.Series]:
    """The held-out cases of best, median and worst Dice, as rows of the evaluation's ``cases.csv``."""
    ranked = cases.dropna(subset=["dice"]).sort_values(["dice", "PatientID"], ascending=False).reset_index(drop=True)
    places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1} if len(ranked) else {}
    first = {place: name for name, place in reversed(places.items())}  # few cases: a place has its first name only
    return {name: ranked.loc[place] for name, place in places.items() if first[place] == name}


def predict_masks(main: Experiment, cases: Sequence[Case], fold: int, output: Path) -> None:
    """Masks by the network of one fold, with the bundle's own ``inference``; those that are there are kept.

    Only the scans are given to it: clinical values have no part in the outline.

    Args:
        main: the experiment.
        cases: to predict.
        fold: whose network.
        output: receives ``<PatientID>/<PatientID>__tumour.nii.gz``.

    Raises:
        ExperimentError: the command failed; the message has the end of what it said.
    """
    wanted = [case for case in cases if not mask_file(output, case[keys.PATIENT_ID]).is_file()]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        for case in wanted:
            for kind, suffix in ((keys.CT, "CT"), (keys.PET, "PT")):
                source = Path(case[kind]).resolve()
                ending = ".nii.gz" if source.name.endswith(".nii.gz") else source.suffix
                name = folder_name(case[keys.PATIENT_ID])
                link = Path(folder) / name / f"{name}__{suffix}{ending}"
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(source)
        options = {"dataset_dir": folder, "ckpt_dir": str(fold_folder(main.folder, fold).resolve() / "models")}
        options["output_dir"] = str(output.resolve())
        command = bundle_command("inference", ["configs/inference.json"], options)
        result = subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stdout + result.stderr).strip().splitlines()[-1:]
        raise ExperimentError(f"inference of fold {fold} ended with exit code {result.returncode}: {' '.join(said)}")


def mask_file(folder: Path, patient: str) -> Path:
    """Where ``inference`` puts a patient's mask."""
    name = folder_name(patient)
    return folder / name / f"{name}__tumour.nii.gz"


def find_masks(main: Experiment, rows: Sequence[pd.Series], scans: Mapping[str, Case], predict: bool) -> dict[str, Any]:
    """Predicted mask of each example by patient: a path, or in words why there is none."""
    folds: dict[int, list[str]] = {}
    for row in rows:  # fold -1: no network has seen the patient, nor has the first
        folds.setdefault(max(0, int(row["fold"])), []).append(row["PatientID"])
    found: dict[str, Any] = {}
    for fold, patients in folds.items():
        folder = main.folder / EVALUATION_FOLDER / EXAMPLES_FOLDER / f"fold_{fold}"
        why = "none has been made (--predict False)"
        if predict:
            try:
                predict_masks(main, [scans[patient] for patient in patients], fold, folder)
            except ExperimentError as error:
                why = str(error)
        files = {patient: mask_file(folder, patient) for patient in patients}
        found |= {patient: path if path.is_file() else why for patient, path in files.items()}
    return found


def write_examples(page: Page, main: Experiment, cohort: Cohort | None, predict: bool) -> None:
    """CT, PET and fusion of the best, median and worst case, with true and predicted outline."""
    page.heading("Example cases")
    cases = pd.read_csv(main.folder / EVALUATION_FOLDER / CASES_FILE, converters={"PatientID": str})
    if cohort is None or "dice" not in cases or not cases["dice"].notna().any():
        why = "the cohort cannot be read" if cohort is None else "no case has both a true and a predicted mask"
        page.paragraph(f"None: {why}.")
        return
    page.paragraph(
        "Held-out cases in three planes through the largest lesion; the patient's left is on the right. Cyan: true "
        "outline; red: that of the network that had not seen the case."
    )
    scans = {case[keys.PATIENT_ID]: case for case in cohort.cases}
    examples = choose_examples(cases)
    masks = find_masks(main, list(examples.values()), scans, predict)
    pictures = []
    for name, row in examples.items():
        patient, case = row["PatientID"], scans[row["PatientID"]]
        outlines = {"true": case[keys.MASK]}
        if isinstance(masks[patient], Path):
            outlines["predicted"] = masks[patient]
        else:
            page.paragraph(f"{patient} has no predicted outline: {masks[patient]}", "note")
        picture = main.folder / EVALUATION_FOLDER / EXAMPLES_FOLDER / f"{name}.png"
        title = f"phantom {patient}" if is_phantom(main) else patient
        save_case_figure(picture, case[keys.CT], case[keys.PET], outlines, title)
        pictures.append((picture.read_bytes(), f"{name.capitalize()} Dice: {title}, {row['dice']:.2f}"))
    page.figures(pictures)


def write_origin(page: Page, experiments: Sequence[Experiment]) -> None:
    """Commands, versions, settings."""
    page.heading("How this was made")
    main = experiments[0]
    lines = [item.record["command"] for item in experiments]
    page.preformatted("\n".join(lines))
    page.paragraph(f"Versions: {', '.join(f'{name} {text}' for name, text in main.record['versions'].items())}.")
    page.paragraph(
        f"Intervals: {main.report['interval']}. Weights of Uno's C, AUC and Brier: {main.report['censoring']}."
    )
    settings = main.record["settings"]
    rows = [[name, Words(json.dumps(settings[name]))] for name in SHOWN_SETTINGS if name in settings]
    page.table(["setting", "value"], rows, "Settings that define the training.")


def report_experiment(run: str, runs: str | Sequence[str] = (), out: str | None = None, predict: bool = True) -> None:
    """Write one HTML page about an experiment.

    Args:
        run: folder of the experiment, judged by ``evaluate_folds.py``.
        runs: other experiments on the same cohort for Tables 1 and 2, such as ``runs/a,runs/b``.
        out: the page; ``RUN/report.html`` if not given.
        predict: predict the masks of the example cases with the network of their fold, once.
    """
    main = read_evaluated(run)
    others = [read_evaluated(name) for name in as_list(runs) if Path(name).resolve() != Path(run).resolve()]
    different = [
        str(item.folder)
        for item in others
        if item.record["cohort"]["fingerprint"] != main.record["cohort"]["fingerprint"]
    ]
    if different:
        raise ExperimentError(f"{', '.join(different)} is on another cohort: its figures cannot stand beside {run}'s")
    page = Page(f"Head-and-neck PET/CT: {main.folder.resolve().name}")
    write_head(page, main)
    cohort = write_data(page, main)
    page.heading("Training")
    write_pictures(page, main, "training")
    write_tables(page, [main, *others])
    write_survival(page, main)
    write_hpv(page, main)
    write_segmentation(page, main)
    page.heading("By centre")
    write_centres(page, main.report["centres"], "Held-out cases of each centre.")
    write_comparisons(page, main)
    write_examples(page, main, cohort, predict)
    write_origin(page, [main, *others])
    path = Path(out) if out else main.folder / "report.html"
    page.write(path)
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_tool(report_experiment, ExperimentError, CohortError, OSError)
