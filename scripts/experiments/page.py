"""The page about an experiment: one self-contained HTML file from ``templates/experiment.html``."""

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
from jinja2 import FileSystemLoader

from command_line import BUNDLE

from experiments.comparators import HPV_COMPARED, cohort_of
from experiments.evaluation import SHIPPED_CLINICAL
from experiments.evidence import CASES_FILE, EVALUATION_FOLDER, METRICS_FILE
from experiments.experiment import (
    FINISHED,
    TEST,
    VALIDATION,
    ExperimentError,
    bundle_command,
    evaluation_folder,
    fold_folder,
    read_experiment,
)
from scripts import keys
from scripts.cohorts.clinical import feature_named
from scripts.cohorts.cohort import Case, Cohort, CohortError
from scripts.cohorts.files import write_text
from scripts.evaluation.case_metrics import LESION_COUNTS, LESIONS, MEASURES, NOT_APART, PAPER_MEASURES
from scripts.evaluation.plots import with_interval
from scripts.evaluation.survival import DAYS_PER_YEAR
from scripts.prediction.figures import save_case_figure
from scripts.prediction.outputs import folder_name
from scripts.prediction.pages import TEMPLATES as PAGE_TEMPLATES
from scripts.prediction.pages import Words, environment
from scripts.training.sampling import COHORT, DOUBTS_FILE, EXCLUSIONS_FILE

TEMPLATES = Path(__file__).parent / "templates"
PAGE_FILE, EXAMPLES_FOLDER = "report.html", "examples"
TASK_NAMES = {keys.TASK_SEG: "segmentation", keys.TASK_HPV: "HPV", keys.TASK_SURV: "survival"}
PROTOCOL_NAMES = {
    "partial": "partial-label (every case, whatever labels it has)",
    "full": "full-label (cases with mask and HPV status)",
    "ablation": "one split: 60 % training, 30 % validation, 10 % test",
    "leave_one_centre_out": "each centre left out in turn",
}
SHOWN_SETTINGS = (
    *("epochs", "keep_epoch", "batch_size", "learning_rate", "roi_size", "spacing_mm", "ct_window", "pet_window"),
    *("seg_classes", "mask_gradient", "task_weights", "event_fraction", "seed"),
)
CENTRE_SURVIVAL = ("C-index (Uno)", "AUC at 2 years", "Brier skill", "observed minus predicted, 2 years")
COUNTED = ("patients", "events", "positive")
NO_TASK = "-"
METRIC_TITLES = ("metric", "value [95 % interval]", "of")
PAPER_TITLES = tuple(MEASURES[name].title for name in PAPER_MEASURES)

Row = list[object]


def table(titles: Sequence[str], rows: Sequence[Row], **more: object) -> dict[str, Any]:
    """A table for the template."""
    return {"titles": list(titles), "rows": list(rows), **more}


@dataclass(frozen=True)
class Experiment:
    """An experiment and its evaluation."""

    folder: Path  # of the experiment
    record: dict[str, Any]  # experiment.json
    report: dict[str, Any]  # evaluation/metrics.json

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
        raise ExperimentError(f"{path} was written by an earlier version: run `{command}` again")
    finished = sorted(int(fold) for fold, outcome in record["folds"].items() if outcome["status"] == FINISHED)
    if finished != sorted(report["folds_evaluated"]):
        raise ExperimentError(
            f"{path} is of the folds {report['folds_evaluated']}, finished are {finished}: run `{command}` again"
        )
    return Experiment(folder, record, report)


def write_page(run: Path, others: Sequence[Experiment], examples: bool) -> Path:
    """Write ``report.html`` of an evaluated experiment.

    Args:
        run: folder of the experiment.
        others: experiments on the same cohort for the paper's Tables 1 and 2.
        examples: predict the masks of the example cases with the network of their fold, once.

    Raises:
        ExperimentError: another experiment is on another cohort.
    """
    main = read_evaluated(run)
    fingerprint = main.record["cohort"]["fingerprint"]
    if different := [str(item.folder) for item in others if item.record["cohort"]["fingerprint"] != fingerprint]:
        raise ExperimentError(
            f"{', '.join(different)} is on another cohort: its metrics cannot be compared with {run}'s"
        )
    pages = environment().overlay(loader=FileSystemLoader([TEMPLATES, PAGE_TEMPLATES]))
    path = run / PAGE_FILE
    write_text(path, pages.get_template("experiment.html").render(page_values(main, others, examples)))
    return path


def page_values(main: Experiment, others: Sequence[Experiment], examples: bool) -> dict[str, Any]:
    """What ``experiment.html`` shows."""
    record, report = main.record, main.report
    pooled, every = report["pooled"], [main, *others]
    metrics = pooled["metrics"]
    cohort, reason = read_cohort(main)
    masks = [name for name in MEASURES if name.startswith(("dice", "surface", "volume", "false", *LESIONS))]
    shown = {name: record["settings"][name] for name in SHOWN_SETTINGS if name in record["settings"]}
    settings: list[Row] = [[name, Words(json.dumps(value))] for name, value in shown.items()]
    return {
        "title": f"Head-and-neck PET/CT: {main.folder.resolve().name}",
        "sortable": False,
        "record": record,
        "report": report,
        "phantom": is_phantom(main),
        "tasks": main.tasks,
        "protocol": PROTOCOL_NAMES.get(report["protocol"], report["protocol"]),
        "short": table(METRIC_TITLES, measure_rows(metrics, PAPER_MEASURES) + comparator_rows(metrics, report)),
        "cohort": cohort_table(record["cohort"]),
        "details": {"reason": reason} if cohort is None else cohort_details(main, cohort),
        "figures": pictures(main, report["figures"]),
        "table1": ablation_table([item for item in every if item.record["protocol"] == "ablation"]),
        "table2": protocols_table([item for item in every if item.record["protocol"] in ("partial", "full")]),
        "left_out": [left_out_table(item) for item in every if item.record["protocol"] == "leave_one_centre_out"],
        "survival": survival_table(pooled["survival"]),
        "hpv": table(METRIC_TITLES, measure_rows(metrics, ("balanced_accuracy", "hpv_auc", "hpv_average_precision"))),
        "confusion": confusion_table(metrics["balanced_accuracy"]),
        "segmentation": table(METRIC_TITLES, measure_rows(metrics, masks)),
        "by_centre": centre_tables(report["centres"]),
        "comparison": comparison_table(report["comparison"]) if "comparison" in report else None,
        "external": external_values(main, report["external"]) if "external" in report else None,
        "examples": example_values(main, cohort, examples),
        "commands": "\n".join(item.record["command"] for item in every),
        "versions": ", ".join(f"{name} {text}" for name, text in record["versions"].items()),
        "settings": table(["setting", "value"], settings),
    }


# --- cells ------------------------------------------------------------------------------------------------------------


def value_cell(row: Mapping[str, Any], digits: int = 3) -> str:
    """``0.712 [0.65, 0.77]``, or the reason why there is none."""
    if row["value"] is None:
        return NO_TASK if row["reason"] == "not a task of this model" else Words(f"none: {row['reason']}")
    return with_interval(row, digits)


def counts_cell(row: Mapping[str, Any]) -> str:
    """``120 patients, 30 events`` of a metric."""
    names = ("patients", "events", "positive", "cases", "controls", *LESION_COUNTS)
    return Words(", ".join(f"{row[name]} {name.replace('_', ' ')}" for name in names if name in row))


def measure_rows(metrics: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[list[object]]:
    """Rows of measures with value, interval and counts; none of classes that the model does not tell apart."""
    return [
        [MEASURES[name].title, value_cell(metrics[name], MEASURES[name].digits), counts_cell(metrics[name])]
        for name in names
        if metrics[name].get("reason") != NOT_APART
    ]


def counted_cell(row: Mapping[str, Any]) -> str:
    """``0.712 [0.65, 0.77] (120, 30)``: a metric with the counts of :data:`COUNTED`, or why there is none."""
    if row["value"] is None:
        return value_cell(row)
    return f"{value_cell(row)} ({', '.join(str(row[name]) for name in COUNTED if name in row)})"


# --- tables -----------------------------------------------------------------------------------------------------------


def is_phantom(experiment: Experiment) -> bool:
    """Whether the cohort describes itself as phantoms."""
    return "phantom" in experiment.report["data"].lower()


def comparator_rows(metrics: Mapping[str, Any], report: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of the references: clinical values alone, the paired differences, the true risk of phantoms."""
    clinical = report["clinical_only"]
    rows: list[list[Any]] = [comparator_row("C-index of clinical values alone", clinical["c_index"], clinical)]
    if "model_minus_clinical" in clinical:
        rows.append(difference_row("C-index, network minus clinical values", clinical["model_minus_clinical"]))
    if shipped := clinical.get("shipped"):
        rows.append(comparator_row(f"C-index of the {SHIPPED_CLINICAL}", shipped["c_index"], shipped))
        if "model_minus_clinical" in shipped:
            rows.append(difference_row(f"C-index, network minus {SHIPPED_CLINICAL}", shipped["model_minus_clinical"]))
    if metrics["hpv_auc"]["value"] is not None:
        hpv = clinical["hpv"]
        for name in HPV_COMPARED:
            title = MEASURES[name].title
            rows.append(comparator_row(f"{title} of clinical values alone", hpv[name], hpv))
            if "model_minus_clinical" in hpv:
                rows.append(
                    difference_row(f"{title}, network minus clinical values", hpv["model_minus_clinical"][name])
                )
    if report["oracle"]:
        truth = "the risk that the phantoms were made with: no model can do better except by chance"
        rows.append(comparator_row("C-index of the phantoms' true risk", report["oracle"], {"model": truth}))
    return rows


def comparator_row(title: str, row: Mapping[str, Any], about: Mapping[str, Any]) -> list[Any]:
    """A metric with its counts and the ``model`` that it describes."""
    return [title, value_cell(row), Words("; ".join(filter(None, [counts_cell(row), about.get("model")])))]


def difference_row(title: str, row: Mapping[str, Any]) -> list[Any]:
    """A paired difference with its interval, its counts and its p value."""
    p = f"paired, p {row['p']:.3f}" if row["value"] is not None else ""
    return [title, value_cell(row), Words("; ".join(filter(None, [counts_cell(row), p])))]


def read_cohort(main: Experiment) -> tuple[Cohort | None, str]:
    """The cohort of the experiment; None, and why, where it can no longer be read or has changed."""
    try:
        return cohort_of(main.record), ""
    except (CohortError, OSError) as error:
        return None, f"No details of the cohort are given: {str(error).splitlines()[0]}"


def cohort_table(described: Mapping[str, Any]) -> dict[str, Any]:
    """Cases and labels by centre, from the record of an experiment."""
    titles = ["centre", "cases", "with mask", "HPV known", "HPV positive", "survival known", "relapses"]
    names = ["cases", "with_mask", "with_hpv", "hpv_positive", "with_survival", "events"]
    rows = {**described["centres"], "all": described}
    return table(titles, [[centre, *(counts[name] for name in names)] for centre, counts in rows.items()])


def cohort_details(main: Experiment, cohort: Cohort) -> dict[str, Any]:
    """Clinical values, the flow from patients found to patients evaluated, and doubts of quality control."""
    reasons = Counter(exclusion.reason for exclusion in cohort.exclusions)
    pooled = main.report["pooled"]
    labels = ", ".join(
        f"{pooled['metrics'][name]['patients']} {what}"
        for name, what in (("dice", "for segmentation"), ("balanced_accuracy", "for HPV"), ("c_index", "for survival"))
        if pooled["metrics"][name]["patients"]
    )
    evaluated = f"{pooled['cases']} cases evaluated by a network that had not seen them"
    flow: list[tuple[str, list[str]]] = [
        (
            f"{len(cohort.cases) + len(cohort.exclusions)} patients in the folder or its tables",
            [f"{count} left out: {reason}" for reason, count in reasons.items()],
        ),
        (f"{len(cohort.cases)} cases, divided into the folds", unreadable_cases(main)),
        (f"{evaluated}: {labels or 'none with a label'}", []),
    ]
    doubts, said = listed(main, DOUBTS_FILE), ""
    if len(doubts):
        counts = ", ".join(f"{check} {count}" for check, count in doubts["check"].value_counts().items())
        patients = doubts["PatientID"].nunique()
        said = f"Quality control: {patients} of the evaluated cases are doubtful ({counts}): see "
        said += f"fold_*/evaluation*/{DOUBTS_FILE}."
    clinical = [clinical_row(name, cohort.cases) for name in cohort.cases[0][keys.CLINICAL]]
    titles = ["clinical value", "known", "values (patients)"]
    return {"reason": "", "clinical": table(titles, clinical), "flow": flow, "doubts": said}


def clinical_row(name: str, cases: Sequence[Case]) -> Row:
    """How often a clinical value is known, and its values."""
    known = [case[keys.CLINICAL][name] for case in cases if case[keys.CLINICAL][name] is not None]
    values = Counter(known)
    if len(values) > 8:
        low, middle, high = pd.Series(known).quantile([0.25, 0.5, 0.75])
        shown = f"median {middle:g} (quartiles {low:g} to {high:g})"
    else:
        levels = feature_named(name).levels
        words = {value: next(iter(levels.get(value) or ()), f"{value:g}") for value in values}
        shown = ", ".join(f"{words[value]}: {count}" for value, count in sorted(values.items()))
    share = f"{len(known)} ({100 * len(known) / len(cases):.0f} %)"
    return [name.replace("_", " "), share, Words(shown or "none known")]


def listed(main: Experiment, name: str) -> pd.DataFrame:
    """The rows of a table that the evaluation of each fold wrote."""
    folders = [evaluation_folder(main.folder, fold, main.report["held_out"]) for fold in main.report["folds_evaluated"]]
    tables = [pd.read_csv(folder / name, dtype=str) for folder in folders if (folder / name).is_file()]
    return pd.concat(tables) if tables else pd.DataFrame()


def unreadable_cases(main: Experiment) -> list[str]:
    """Why held-out cases were not evaluated, a line for each reason."""
    excluded = listed(main, EXCLUSIONS_FILE)
    count = int((excluded["set"] != COHORT).sum()) if len(excluded) else 0  # the table of cases counts the others
    lines = [f"{count} are left out, with the reasons: see fold_*/evaluation*/{EXCLUSIONS_FILE}"] if count else []
    missing = main.record["num_folds"] - len(main.report["folds_evaluated"])
    if missing:
        lines.append(f"the held-out cases of {missing} folds that are not finished")
    if main.report["held_out"] == TEST:
        lines.append("the training and validation cases of the one split")
    return lines


def ablation_table(experiments: Sequence[Experiment]) -> dict[str, Any] | None:
    """The paper's Table 1: two rows for each set of tasks, validation and test cases."""
    if not experiments:
        return None
    rows: list[Row] = []
    ordered = sorted(experiments, key=lambda item: len(item.record["tasks"]))
    for item, title in zip(ordered, told_apart(ordered, [item.tasks for item in ordered]), strict=True):
        validation = item.record["folds"]["0"]["metrics"][VALIDATION]
        for part, metrics in ((VALIDATION, validation), (TEST, item.report["pooled"]["metrics"])):
            cells = [counted_cell(metrics[name]) for name in PAPER_MEASURES]
            rows.append([title if part == VALIDATION else "", Words(part), *cells])
    record = experiments[0].record
    settings = record["settings"]
    cases = ", ".join(f"{record['folds']['0']['cases'][part]['cases']} {part}" for part in (VALIDATION, TEST))
    chosen = "the last epoch counts"
    if settings.get("keep_epoch", "best") == "best":
        chosen = "the best epoch was selected on the validation cases, whose metrics are therefore too good"
    caption = (
        f"One split, {settings['epochs']} epochs, validated every {settings['val_interval']}; {chosen} ({cases} cases)."
    )
    return table(["tasks", "cases", *PAPER_TITLES], rows, caption=caption)


def told_apart(experiments: Sequence[Experiment], titles: Sequence[str]) -> list[str]:
    """The titles, with the folder's name where several are alike."""
    names = [item.folder.resolve().name for item in experiments]
    return [f"{t} ({name})" if titles.count(t) > 1 else t for t, name in zip(titles, names, strict=True)]


def protocols_table(experiments: Sequence[Experiment]) -> dict[str, Any] | None:
    """The paper's Table 2: metrics of each fold, their mean, and all cases pooled; a row for each metric."""
    if not experiments:
        return None
    most = max(len(item.report["folds"]) for item in experiments)
    rows: list[Row] = []
    titles = told_apart(experiments, [f"{item.record['protocol']}: {item.tasks}" for item in experiments])
    for item, title in zip(experiments, titles, strict=True):
        for name in PAPER_MEASURES:
            values = [fold["metrics"][name]["value"] for fold in item.report["folds"].values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values] + [""] * (most - len(values))
            mean = item.report["fold_mean"][name]
            spread = "" if mean["standard_deviation"] is None else f" ± {mean['standard_deviation']:.3f}"
            average = "-" if mean["mean"] is None else f"{mean['mean']:.3f}{spread}"
            pooled = counted_cell(item.report["pooled"]["metrics"][name])
            rows.append([title if name == PAPER_MEASURES[0] else "", MEASURES[name].title, *cells, average, pooled])
    heads = ["protocol: tasks", "metric", *(f"fold {k}" for k in range(most)), "mean ± sd", "pooled [95 % interval]"]
    return table(heads, rows)


def left_out_table(item: Experiment) -> dict[str, Any]:
    """The paper's metrics of each centre, by the network trained on the others."""
    rows = [paper_row(name, fold) for name, fold in item.report["folds"].items()]
    return table(["centre left out", "cases", *PAPER_TITLES], rows, caption=f"Tasks: {item.tasks}.")


def paper_row(name: str, judged: Mapping[str, Any]) -> Row:
    """Cases and the paper's metrics of a group."""
    return [name, judged["cases"], *(counted_cell(judged["metrics"][measure]) for measure in PAPER_MEASURES)]


def centre_tables(centres: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The paper's metrics by centre, and those of survival where at least one centre has them."""
    metrics = table(["centre", "cases", *PAPER_TITLES], [paper_row(name, judged) for name, judged in centres.items()])
    rows: list[Row] = []
    for centre, judged in centres.items():
        survival = judged["survival"]
        if "about" in survival:
            found = [survival[name] for name in ("uno_c_index", "auc_2y", "brier_skill")]
            cells = [value_cell(row) for row in (*found, survival["calibration_2y"]["difference"])]
            rows.append([centre, f"{survival['about']['patients']}, {survival['about']['events']}", *cells])
        else:
            rows.append([centre, "", Words(f"none: {survival['reason']}"), *[""] * (len(CENTRE_SURVIVAL) - 1)])
    any_survival = any("about" in judged["survival"] for judged in centres.values())
    survival_rows = table(["centre", "patients, relapses", *CENTRE_SURVIVAL], rows) if any_survival else None
    return {"metrics": metrics, "survival": survival_rows}


def survival_table(survival: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of survival, or ``reason``."""
    if "about" not in survival:
        return {"reason": survival["reason"]}
    return table(METRIC_TITLES, survival_rows(survival), reason="")


def survival_rows(survival: Mapping[str, Any]) -> list[list[object]]:
    """Rows of the metrics of :func:`scripts.evaluation.survival_metrics.survival_metrics`."""
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
    for name, title in (("difference", "observed minus predicted survival, 2 years"), ("slope", "calibration slope")):
        rows.append([title, value_cell(calibration[name]), counts_cell(calibration[name])])
    return rows


def confusion_table(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Patients by true and predicted HPV status; None without."""
    if "confusion" not in row:
        return None
    found, thresholds = row["confusion"], ", ".join(f"{value:.3f}" for value in row["thresholds"])
    rows: list[Row] = [
        ["HPV positive", found["true_positive"], found["false_negative"]],
        ["HPV negative", found["false_positive"], found["true_negative"]],
    ]
    caption = f"Patients; thresholds {thresholds}, chosen on the held-out cases of the other folds."
    return table(["true status", "predicted positive", "predicted negative"], rows, caption=caption)


def comparison_table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Paired differences to another experiment."""
    rows: list[Row] = [
        [MEASURES[name].title, value_cell(row), "" if row["value"] is None else f"{row['p']:.3f}", counts_cell(row)]
        for name, row in comparison["differences"].items()
    ]
    titles = ["metric", "difference [95 % interval]", "p", "of"]
    return table(titles, rows, other=Path(comparison["other"]).name)


def external_values(main: Experiment, external: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics, pictures and centres of another cohort."""
    survival = external["survival"]
    rows = measure_rows(external["metrics"], list(MEASURES))
    rows += survival_rows(survival)[1:] if "about" in survival else []  # the first, Harrell's, is a measure too
    rows += comparator_rows(external["metrics"], external)
    figures, centres = pictures(main, external["figures"]), centre_tables(external["centres"])
    return table(METRIC_TITLES, rows, figures=figures, centres=centres)


def pictures(main: Experiment, figures: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """``png`` of each picture of the evaluation, None with a ``reason`` where it could not be drawn."""
    folder = main.folder / EVALUATION_FOLDER
    return {
        name: {"png": (folder / entry["file"]).read_bytes() if "file" in entry else None, "reason": entry.get("reason")}
        for name, entry in figures.items()
    }


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
        ExperimentError: the command failed; the message has the last line of its output.
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
        why = "none has been made (--examples False)"
        if predict:
            try:
                predict_masks(main, [scans[patient] for patient in patients], fold, folder)
            except ExperimentError as error:
                why = str(error)
        files = {patient: mask_file(folder, patient) for patient in patients}
        found |= {patient: path if path.is_file() else why for patient, path in files.items()}
    return found


def example_values(main: Experiment, cohort: Cohort | None, predict: bool) -> dict[str, Any]:
    """CT, PET and fusion of the best, median and worst case, with true and predicted outline; or ``reason``."""
    cases = pd.read_csv(main.folder / EVALUATION_FOLDER / CASES_FILE, converters={"PatientID": str})
    if cohort is None:
        return {"reason": "the cohort cannot be read"}
    if "dice" not in cases or not cases["dice"].notna().any():
        return {"reason": "no case has both a true and a predicted mask"}
    scans = {case[keys.PATIENT_ID]: case for case in cohort.cases}
    examples = choose_examples(cases)
    masks = find_masks(main, list(examples.values()), scans, predict)
    shown, missing = [], []
    for name, row in examples.items():
        patient, case = row["PatientID"], scans[row["PatientID"]]
        outlines = {"true": case[keys.MASK]}
        if isinstance(masks[patient], Path):
            outlines["predicted"] = masks[patient]
        else:
            missing.append(f"{patient} has no predicted outline: {masks[patient]}")
        picture = main.folder / EVALUATION_FOLDER / EXAMPLES_FOLDER / f"{name}.png"
        title = f"phantom {patient}" if is_phantom(main) else patient
        save_case_figure(picture, case[keys.CT], case[keys.PET], outlines, title)
        shown.append((picture.read_bytes(), f"{name.capitalize()} Dice: {title}, {row['dice']:.2f}"))
    return {"reason": "", "pictures": shown, "missing": missing}
