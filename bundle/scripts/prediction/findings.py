"""The text of a report: the sections that the HTML page and the PDF show alike.

Nothing is computed here. What the prediction leaves open (null) is said with its reason instead of a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.cohorts.clinical import FEATURES
from scripts.cohorts.scans import counted
from scripts.imaging.localise import method_words
from scripts.imaging.quality import OK, REJECT, WARN

NOT_AVAILABLE = "not available"
NO_TASK = "not a task of this model"
NOT_KNOWN = "\u2013"
FORCED = "FORCED: a quality check rejected this case and the prediction was made in spite of it. Do not rely on it."
CHECK_WORDS = {WARN: "warning", REJECT: "rejected"}
NO_TUMOUR = "No tumour found: the other results assume that there is one."
VERDICTS = {OK: "no warnings", WARN: "WARNINGS", REJECT: "REJECTED"}
ORDINARY_MM = {
    "ct_in_plane": (0.4, 2.8),
    "ct_slice": (0.5, 5.0),
    "pet_in_plane": (0.9, 5.6),
    "pet_slice": (1.0, 5.0),
}
"""Voxel sizes that clinical PET/CT scanners usually reconstruct."""
UNUSUAL = (
    "The voxel size differs from the model's training scans, but is usual for clinical scanners. The scans are "
    "resampled in any case."
)
LESION_COLUMNS = (  # title, key in lesion_list, decimals
    *(("volume ml", "volume_ml", 1), ("SUVmax", "suv_max", 1), ("SUVmean", "suv_mean", 1), ("SUVpeak", "suv_peak", 1)),
    *(("MTV ml", "mtv_ml", 1), ("TLG g", "tlg_g", 0), ("longest diameter mm", "longest_diameter_mm", 0)),
)
CLASS_NAMES = {"GTV": "tumour", "GTVp": "primary tumour", "GTVn": "lymph node"}
AS_IN_TRAINING = (
    "Recurrence, a death without one, and the day from which time is counted are defined as in the training data."
)
NOT_CAUSES = (
    "What moved the computed risk of this model: no statement about causes, nor about what a treatment would change."
)


@dataclass
class Section:
    """A part of a report."""

    title: str  # of the section
    rows: list[tuple[str, str]] = field(default_factory=list)  # names and what is said of them
    table: tuple[list[str], list[list[str]]] | None = None  # titles and rows of a table below them
    wide: bool = False  # whether the table needs the whole width of a page
    loud: list[str] = field(default_factory=list)  # sentences that must not be missed
    notes: list[str] = field(default_factory=list)  # sentences in small print


def verdict_of(prediction: Mapping[str, Any]) -> str:
    """The sentence under the title: what quality control says of the scans."""
    return f"Quality of the scans: {_verdict(prediction['quality'])}"


def warnings_of(prediction: Mapping[str, Any]) -> list[str]:
    """What a reader must know first: a forced prediction, checks that are not passed, and what is doubtful."""
    quality, flag = prediction["quality"], (prediction.get("crop") or {}).get("flag")
    loud = [FORCED] if quality.get("forced") else []
    loud += quality_problems(quality)
    if prediction.get("tumour") and not prediction["tumour"].get("volume_ml"):
        loud.append(NO_TUMOUR)
    if flag and not any(flag in text for text in loud):
        loud.append(f"The position of the region that the network reads is doubtful: {flag}")
    if (prediction.get("survival") or {}).get("doubt"):
        loud.append(f"The survival is doubtful: {prediction['survival']['doubt']}")
    return loud


def notice_of(prediction: Mapping[str, Any]) -> str:
    """The restriction of use, and what the model was trained on."""
    return f"{prediction['notice']} {trained_on_of([prediction])}"


def page_verdict(quality: Mapping[str, Any]) -> str:
    """The verdict on the scans; ordinary voxel sizes alone, which say nothing to a reader, make no warning."""
    bad, remarks = _findings(quality)
    return OK if quality["verdict"] == WARN and remarks and not bad else str(quality["verdict"])


def quality_problems(quality: Mapping[str, Any]) -> list[str]:
    """The messages of the checks that are not passed, the worst first, without ordinary voxel sizes."""
    return [f"{CHECK_WORDS[check['verdict']]}: {check['message']}" for check in _findings(quality)[0]]


def quality_remarks(quality: Mapping[str, Any]) -> list[str]:
    """The messages of ordinary voxel sizes beyond the training range."""
    return [f"remark: {check['message']}" for check in _findings(quality)[1]]


def _findings(quality: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Checks that are not passed, the worst first; and those of voxel sizes that are ordinary.

    A voxel size warns when it is beyond the range of the model's training scans; ordinary is :data:`ORDINARY_MM`.
    """
    bad = [check for check in quality.get("checks") or [] if check["verdict"] != OK]
    remarks = [check for check in bad if check["verdict"] == WARN and _is_ordinary(check)]
    return sorted((c for c in bad if c not in remarks), key=lambda check: check["verdict"] != REJECT), remarks


def _is_ordinary(check: Mapping[str, Any]) -> bool:
    if check["name"] not in ORDINARY_MM or not isinstance(check["value"], int | float):
        return False
    low, high = ORDINARY_MM[check["name"]]
    return low <= check["value"] <= high


def _verdict(quality: Mapping[str, Any]) -> str:
    checks = quality.get("checks") or []
    if not checks:
        return f"{NOT_AVAILABLE}: the scans were not checked"
    passed = sum(check["verdict"] == OK for check in checks)
    forced = ", prediction FORCED" if quality.get("forced") else ""
    return f"{VERDICTS[page_verdict(quality)]}{forced} ({passed} of {len(checks)} checks passed)"


def key_results(prediction: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and remark of the results that stand first."""
    survival, hpv, tumour = (prediction.get(part) or {} for part in ("survival", "hpv", "tumour"))
    shown = []
    if survival:
        percentile = survival.get("percentile")
        remark = "" if percentile is None else f"higher than in {percentile:.0f} % of the training cases"
        shown.append(("predicted risk of recurrence", survival.get("risk_group") or NOT_AVAILABLE, remark))
    if survival.get("recurrence_free_survival"):
        last = survival["recurrence_free_survival"][-1]
        name = f"recurrence-free at {years(last['years'])}"
        shown.append((name, f"{100 * last['survival']:.0f} %", _range_of(last, survival)))
    if hpv:
        status = {True: "positive", False: "negative"}.get(hpv.get("positive"), NOT_AVAILABLE)  # type: ignore[arg-type]
        shown.append(("predicted HPV status", status, _probability_of(hpv)))
    if tumour:
        remark = f"{_lesions_of(tumour)}, SUVmax {number(tumour.get('suv_max'))}"
        volume = number(tumour.get("volume_ml"), "ml")
        shown.append(("tumour and lymph nodes", volume, remark if tumour.get("lesions") else "no lesion"))
    return shown


def trained_on_of(predictions: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on what the models of some predictions were trained on."""
    named = sorted({prediction["model"].get("trained_on") or "not recorded" for prediction in predictions})
    return f"The model was trained on: {'; '.join(named).rstrip('.')}."


def sections_of(prediction: Mapping[str, Any]) -> list[Section]:
    """All sections of a report."""
    lesions = lesion_section(prediction.get("tumour"))
    return [
        *([lesions] if lesions else []),
        survival_section(prediction.get("survival")),
        clinical_model_section(prediction.get("clinical_model")),
        hpv_section(prediction.get("hpv"), prediction.get("clinical") or []),
        tumour_section(prediction.get("tumour")),
        clinical_section(prediction.get("clinical") or []),
        model_section(prediction),
        quality_section(prediction["quality"]),  # last: it is the one that may be too long for a sheet of paper
    ]


def survival_section(survival: Mapping[str, Any] | None) -> Section:
    """Risk group, percentile, survival at the years that can be given, and the years that cannot."""
    section = Section("Recurrence-free survival")
    if survival is None:
        section.rows.append(("survival", NO_TASK))
        return section
    folds = len(survival.get("log_hazard_folds") or [])
    reason = survival.get("unavailable") or ""
    none = f"{NOT_AVAILABLE} (reason below)" if reason else NOT_AVAILABLE
    percentile = survival.get("percentile")
    section.rows += [
        ("risk group", survival.get("risk_group") or none),
        ("risk", none if percentile is None else f"higher than in {percentile:.0f} % of the training cases"),
    ]
    given = survival.get("recurrence_free_survival") or []
    if given:
        titles = ["time", "recurrence-free", *(["range of the folds"] if folds > 1 else []), "training cases at risk"]
        cells = [
            [
                years(row["years"]),
                f"{100 * row['survival']:.0f} %",
                *([_range_of(row, survival, name=False)] if folds > 1 else []),
                NOT_KNOWN if row.get("at_risk") is None else f"{row['at_risk']}",
            ]
            for row in given
        ]
        section.table = titles, cells
    else:
        section.rows.append(("at 1, 2, 3 and 5 years", none))
    section.rows += [
        (years(beyond), "not given: beyond the follow-up of the training cases")
        for beyond in survival.get("beyond_follow_up") or []
    ]
    section.rows.append(("log hazard", _with_spread(survival.get("log_hazard"), survival.get("log_hazard_std"), folds)))
    if reason:
        section.notes.append(f"Not available: {reason}.")
    if survival.get("doubt"):
        section.loud.append(f"In doubt: {survival['doubt']}")
    if given and folds > 1:
        section.notes.append(
            f"Range of the folds: lowest and highest of the model's {folds} folds. It is not a confidence interval."
        )
    elif given:
        section.notes.append("The model has a single fold: its uncertainty is not known.")
    if given:
        section.notes.append(AS_IN_TRAINING)
    return section


def clinical_model_section(part: Mapping[str, Any] | None) -> Section:
    """Recurrence-free survival by the model of clinical values alone, apart from the network's."""
    section = Section("Recurrence-free survival from clinical values alone")
    survival = (part or {}).get("survival")
    if part is None or survival is None:
        section.rows.append(("survival", f"{NOT_AVAILABLE}: {(part or {}).get('unavailable') or 'not computed'}"))
        return section
    percentile = f"higher than in {survival['percentile']:.0f} % of its training patients"
    section.rows.append(("risk", f"{survival['risk_group']}, {percentile}"))
    section.rows += [
        (years(row["years"]), f"{100 * row['survival']:.0f} %") for row in survival["recurrence_free_survival"]
    ]
    section.rows.append(("values known", f"{part['known']} of {len(part['values'])}"))
    if part["warning"]:
        section.loud.append(f"Clinical model: {part['warning']}.")
    section.notes.append(f"Another model than the network: {part['summary']}. It does not read the scans.")
    if part.get("endpoint"):
        section.notes.append(f"It predicts {part['endpoint']}.")
    return section


def hpv_section(hpv: Mapping[str, Any] | None, clinical: Sequence[Mapping[str, Any]] = ()) -> Section:
    """Probability, threshold, class, and what they are read from."""
    section = Section("HPV")
    if hpv is None:
        section.rows.append(("HPV status", NO_TASK))
        return section
    folds = len(hpv.get("probability_folds") or [])
    reason = hpv.get("unavailable") or "no threshold is stored with the weights"
    threshold, positive = hpv.get("threshold"), hpv.get("positive")
    none = f"{NOT_AVAILABLE} (reason below)"
    if threshold is None or positive is None:
        section.notes.append(f"Not available: {reason}.")
    section.rows += [
        ("probability of HPV", _with_spread(hpv.get("probability"), hpv.get("probability_std"), folds)),
        ("threshold", none if threshold is None else f"{threshold:.2f}"),
        ("class", none if positive is None else ("positive" if positive else "negative")),
    ]
    if "clinical" in hpv.get("inputs", ()):
        known = sum(not value["missing"] for value in clinical)
        section.rows.append(("read from", f"PET/CT and clinical values ({known} of {len(clinical)} known)"))
    elif "inputs" in hpv:
        section.rows.append(("read from", "PET/CT alone"))
    return section


def tumour_section(tumour: Mapping[str, Any] | None) -> Section:
    """Volume, lesions and uptake."""
    section = Section("Tumour and lymph nodes")
    if tumour is None:
        section.rows.append(("segmentation", NO_TASK))
        return section
    if not tumour.get("volume_ml"):
        section.rows.append(("segmentation", "no tumour found: nothing is measured"))
        return section
    units = (
        ("volume", "volume_ml", "ml", 1),
        ("SUVmax", "suv_max", "", 1),
        ("SUVmean", "suv_mean", "", 1),
        ("SUVpeak", "suv_peak", "", 1),
        ("MTV", "mtv_ml", "ml", 1),
        ("TLG", "tlg_g", "g", 0),
    )
    section.rows.append(("lesions", str(tumour["lesions"])))
    unseen = f"{NOT_AVAILABLE}: the PET does not reach it"
    section.rows += [
        (name, unseen if tumour[key] is None else number(tumour[key], unit, digits))
        for name, key, unit, digits in units
        if key in tumour
    ]
    return section


def lesion_section(tumour: Mapping[str, Any] | None) -> Section | None:
    """A row for each lesion; None where there is none."""
    lesions = (tumour or {}).get("lesion_list") or []
    if tumour is None or not lesions:
        return None
    titles = ["lesion", "class", *(title for title, _, _ in LESION_COLUMNS)]
    rows = [
        [
            lesion_name(lesion, number),
            CLASS_NAMES.get(lesion.get("label", ""), NOT_KNOWN),
            *(NOT_KNOWN if lesion.get(key) is None else f"{lesion[key]:.{n}f}" for _, key, n in LESION_COLUMNS),
        ]
        for number, lesion in enumerate(lesions, start=1)
    ]
    notes = [f"MTV and TLG: {tumour['mtv_rule']}."] if tumour.get("mtv_rule") else []
    return Section("Lesions", table=(titles, rows), wide=True, notes=notes)


def lesion_name(lesion: Mapping[str, Any], number: int) -> str:
    """The name of a lesion, by its place in the list where it has none."""
    return str(lesion.get("name") or f"lesion {number}")


def clinical_section(clinical: Sequence[Mapping[str, Any]]) -> Section:
    """The values that were used and those that were missing."""
    section = Section("Clinical values used")
    if not clinical:
        section.rows.append(("clinical values", "none: this model reads images alone"))
        return section
    used = [value for value in clinical if not value["missing"]]
    missing = [clinical_name(value["name"]) for value in clinical if value["missing"]]
    for value in used:
        source = f" (from: {value['source']})" if value.get("source") else ""
        section.rows.append((clinical_name(value["name"]), clinical_value(value["name"], value["value"]) + source))
    section.rows.append(("missing", ", ".join(missing) if missing else "nothing"))
    if missing:
        section.notes.append("Missing values are coded as missing (0); the model was trained with such gaps.")
    return section


def quality_section(quality: Mapping[str, Any]) -> Section:
    """The verdict and every check that is not passed, the worst first."""
    section = Section("Quality of the scans")
    bad, remarks = _findings(quality)
    section.rows.append(("verdict", _verdict(quality)))
    section.rows += [(f"{CHECK_WORDS[check['verdict']]}: {_words(check['name'])}", check["message"]) for check in bad]
    section.rows += [(f"remark: {_words(check['name'])}", check["message"]) for check in remarks]
    section.notes += [UNUSUAL] if remarks else []
    return section


def model_section(prediction: Mapping[str, Any]) -> Section:
    """What made the prediction: model, training, crop, versions."""
    model, crop = prediction["model"], prediction.get("crop") or {}
    section = Section("How it was made")
    folds, placed = model.get("folds"), method_words(crop.get("method") or NOT_AVAILABLE)
    seconds = (prediction.get("seconds") or {}).get("total")
    section.rows += [
        (
            "model",
            f"{model.get('name') or 'unnamed'} {model.get('version') or ''}, {counted(folds, 'fold')}",
        ),
        ("trained on", model.get("trained_on") or "not recorded"),
        ("SHA-256", model.get("sha256") or NOT_AVAILABLE),
        ("region read by the network", _box(placed, crop)),
        (
            "made",
            f"{prediction.get('created') or 'time not recorded'}{'' if seconds is None else f', in {seconds:.1f} s'}",
        ),
    ]
    if crop.get("flag"):
        section.loud.append(f"Position of this region in doubt: {crop['flag']}")
    return section


def explanation_section(explanation: Mapping[str, Any]) -> Section:
    """What moved the log hazard (see :mod:`scripts.prediction.explain`)."""
    image, features = explanation["image"], explanation["clinical"]["features"]
    section = Section("What moved the risk", notes=[NOT_CAUSES, explanation["method"]])
    section.rows.append(("images", f"{signed(image['sum'])} to the log hazard"))
    section.rows += [(f"images: {name.upper()}", signed(value)) for name, value in image["channels"].items()]
    if image["inside"] is None:
        section.rows.append(("images: tumour", f"{NOT_AVAILABLE}: {image['inside_unavailable']}"))
    else:
        share = f"{100 * image['inside_share']:.0f} % of all that the images moved up or down"
        section.rows.append(("images: tumour", f"{signed(image['inside'])}; {share}"))
        section.rows.append(("images: elsewhere", signed(image["outside"])))
    known = [feature for feature in features if feature["coded"] != 0]
    missing = [clinical_name(feature["name"]) for feature in features if feature["coded"] == 0]
    by_size = sorted(known, key=lambda feature: -abs(feature["contribution"]))
    section.rows += [(clinical_name(feature["name"]), signed(feature["contribution"])) for feature in by_size]
    section.rows += [("missing values", f"0 ({', '.join(missing)})")] if missing else []
    total = f"{signed(explanation['sum'])} of {signed(explanation['expected'])} between this patient and an empty scan"
    error = f"error {100 * explanation['relative_error']:.0f} % of what was moved"
    section.rows.append(("sum", f"{total} without clinical values ({error})"))
    if not explanation["complete"]:
        section.loud.append("The contributions do not add up to the risk well: read them as rough.")
    return section


def years(count: float) -> str:
    """A number of years.

    Example:
        >>> years(1.0), years(2.0), years(0.5)
        ('1 year', '2 years', '0.5 years')
    """
    return f"{count:g} year{'' if count == 1 else 's'}"


def number(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A rounded number with its unit, or that there is none."""
    return NOT_AVAILABLE if value is None else f"{value:.{digits}f} {unit}".strip()


def signed(value: float) -> str:
    """A contribution to the log hazard, with its sign."""
    return f"{round(value, 3) + 0.0:+.3f}"


def clinical_name(name: str) -> str:
    """A feature's name for people."""
    return FEATURES[name].column if name in FEATURES else _words(name)


def clinical_value(name: str, value: float | None) -> str:
    """A clinical value in words where its level has one.

    Example:
        >>> clinical_value("gender", 1.0), clinical_value("age", 61.0), clinical_value("performance_status", 1.0)
        ('male', '61 years', '1')
    """
    if value is None:
        return "missing"
    known = FEATURES.get(name)
    words = known.levels.get(int(value), ()) if known else ()
    if words:
        return words[0]
    return f"{value:g} {known.unit if known else ''}".strip()


def _range_of(row: Mapping[str, Any], survival: Mapping[str, Any], name: bool = True) -> str:
    """Lowest and highest survival of the folds; empty for a single fold."""
    low, high = row.get("low"), row.get("high")
    if len(survival.get("log_hazard_folds") or []) < 2 or low is None or high is None:
        return ""
    said = f"{100 * low:.0f} to {100 * high:.0f} %"
    return f"range of the folds, no confidence interval: {said}" if name else said


def _probability_of(hpv: Mapping[str, Any]) -> str:
    """Probability of HPV, its spread over the folds, and from where on it counts as positive."""
    probability = _with_spread(
        hpv.get("probability"), hpv.get("probability_std"), len(hpv.get("probability_folds") or [])
    )
    threshold = hpv.get("threshold")
    return f"probability {probability}" + ("" if threshold is None else f"; positive above {threshold:.2f}")


def _lesions_of(tumour: Mapping[str, Any]) -> str:
    """How many lesions there are of each class, in words."""
    counts = Counter(CLASS_NAMES.get(lesion.get("label", "")) for lesion in tumour.get("lesion_list") or [])
    if set(counts) <= {"primary tumour", "lymph node"} and counts:
        return ", ".join(_counted(counts[name], name) for name in ("primary tumour", "lymph node"))
    return _counted(tumour.get("lesions") or 0, "lesion")


def _counted(count: int, name: str) -> str:
    return counted(count, name) if count else f"no {name}"


def _with_spread(value: float | None, spread: float | None, folds: int) -> str:
    if value is None:
        return NOT_AVAILABLE
    return f"{value:.2f}" if spread is None or folds < 2 else f"{value:.2f} \u00b1 {spread:.2f} over {folds} folds"


def _box(method: str, crop: Mapping[str, Any]) -> str:
    size, centre = crop.get("size_mm"), crop.get("centre_mm")
    parts = [method]
    parts += [f"{' x '.join(f'{edge:.0f}' for edge in size)} mm"] if size else []
    parts += [f"centre ({', '.join(f'{place:.0f}' for place in centre)}) mm"] if centre else []
    return ", ".join(parts)


def _words(name: str) -> str:
    return name.replace("_", " ")
