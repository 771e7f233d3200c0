"""A patient's report: ``report.html``, one file that holds all it shows, and ``report.pdf``, A4 pages.

Both show the same sections (:mod:`scripts.prediction.findings`) and pictures (:mod:`scripts.prediction.figures`) of
one prediction. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from scripts import keys
from scripts.cohorts.files import write_text
from scripts.evaluation.plots import draw_patient_curve, png_of
from scripts.imaging.lesions import MERGED
from scripts.imaging.transforms import LoadScansd, array_and_grid
from scripts.prediction.facts import study_facts
from scripts.prediction.figures import (
    CT,
    CT_WINDOW_HU,
    FUSION,
    INFLUENCE,
    PET,
    PET_WINDOW_SUV,
    PLANES,
    TUMOUR_COLOUR_NAMES,
    Scan,
    Views,
    cut_planes,
    cut_views,
    project,
    projection_png,
    tile,
)
from scripts.prediction.findings import (
    CLASS_NAMES,
    Section,
    explanation_section,
    key_results,
    lesion_name,
    notice_of,
    sections_of,
    verdict_of,
    warnings_of,
)
from scripts.prediction.pages import render
from scripts.prediction.pdf import write_pdf
from scripts.prediction.summary import write_summary

if TYPE_CHECKING:
    from scripts.prediction.explain import Explanation, RiskExplainer

REPORT_HTML, REPORT_PDF = "report.html", "report.pdf"
MOST_LESIONS = 4  # that have a row of planes
VIEWS_OF_LESION = ((CT, 0), (PET, 0), (FUSION, 0), (FUSION, 1), (FUSION, 2))  # row and plane of each picture
INFLUENCE_QUANTILE = 0.998  # of the shown voxels: the value of the deepest colours


@dataclass(frozen=True)
class Row:
    """Pictures side by side: a title above them, and PNG and description of each."""

    title: str
    tiles: list[tuple[bytes, str]]


@dataclass(frozen=True)
class Report:
    """All that a report shows, for both formats."""

    title: str  # of the document
    verdict: str  # on the scans, under the title
    warnings: list[str]  # below it, the worst first
    notice: str  # the restriction of use
    facts: list[tuple[str, str]]  # of the examination
    results: list[tuple[str, str, str]]  # name, value and remark of the main results
    rows: list[Row]  # pictures of the lesions, and of what moved the risk
    projections: list[tuple[bytes, str]]  # of the whole PET
    caption: str  # of all pictures
    curve: tuple[bytes, str] | None  # PNG and caption of the survival; None where it is not known
    sections: list[Section]  # all text
    viewer: str | None  # file of the viewer beside the report; None where there is none


def write_report(
    folder: str | Path,
    prediction: Mapping[str, Any],
    ct: Scan,
    pet: Scan,
    mask: Scan | None,
    explanation: Explanation | None = None,
    facts: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Write a patient's report.

    Args:
        folder: receives ``report.html`` and ``report.pdf``.
        prediction: as ``prediction.json`` has it (see ``docs/prediction.schema.json``).
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        mask: predicted tumour (X, Y, Z) and its grid, that of the CT as a rule; None without the segmentation task.
        explanation: what moved the risk, see :mod:`scripts.prediction.explain`.
        facts: of the examination, see :func:`scripts.prediction.facts.study_facts`.
    """
    report = make_report(prediction, ct, pet, mask, explanation, facts)
    paths = [Path(folder) / REPORT_HTML, Path(folder) / REPORT_PDF]
    write_text(paths[0], render("report.html", report=report, title=report.title, sortable=False))
    try:
        write_pdf(paths[1], report)
    except BaseException:
        paths[0].unlink()  # a report is both
        raise
    return paths


def make_report(
    prediction: Mapping[str, Any],
    ct: Scan,
    pet: Scan,
    mask: Scan | None,
    explanation: Explanation | None,
    facts: Sequence[tuple[str, str]],
) -> Report:
    """Collect text and pictures; arguments as for :func:`write_report`."""
    tumour = prediction.get("tumour") or {}
    masks = {} if mask is None else class_masks(mask, tumour.get("classes") or MERGED)
    lesions = tumour.get("lesion_list") or []
    rows = lesion_rows(ct, pet, masks, lesions)
    sections = sections_of(prediction)
    if explanation is not None:
        rows.append(influence_row(ct, pet, masks, lesions, explanation))
        sections.insert(len(sections) - 1, explanation_section(explanation.to_dict()))
    curve = (prediction.get("survival") or {}).get("curve")
    return Report(
        title=f"PET/CT report: {prediction['patient_id'] or 'patient without a name'}",
        verdict=verdict_of(prediction),
        warnings=warnings_of(prediction),
        notice=notice_of(prediction),
        facts=list(facts),
        results=key_results(prediction),
        rows=rows,
        projections=[(projection_png(each), f"PET MIP, {each.name}") for each in project(pet, masks)],
        caption=caption_of(masks, explanation is not None),
        curve=(curve_png(prediction["survival"]), curve_caption(prediction["survival"])) if curve else None,
        sections=sections,
        viewer=(prediction.get("files") or {}).get("viewer"),
    )


def class_masks(mask: Scan, classes: Sequence[str]) -> dict[str, Scan]:
    """The mask of each class that is in it; a mask without any has its first class, empty.

    The mask holds k for ``classes[k - 1]``.
    """
    array, grid = mask
    found = {name: (array == value, grid) for value, name in enumerate(classes, start=1) if (array == value).any()}
    return found or {classes[0]: mask}


def lesion_rows(
    ct: Scan,
    pet: Scan,
    masks: Mapping[str, Scan],
    lesions: Sequence[Mapping[str, Any]],
    shown: Sequence[tuple[str, int]] = VIEWS_OF_LESION,
) -> list[Row]:
    """A row of pictures for each of the largest lesions; one through the middle of the CT where there is none.

    ``shown`` are row (CT, PET, fusion) and plane of each picture.
    """
    rows = []
    for number, lesion in enumerate(lesions[:MOST_LESIONS], start=1):
        views = cut_views(ct, pet, masks, np.array(lesion["centre_mm"], dtype=float))
        uptake = "" if lesion.get("suv_max") is None else f", SUVmax {lesion['suv_max']:.1f}"
        kind = f" ({CLASS_NAMES[lesion['label']]})" if lesion.get("label") in CLASS_NAMES else ""
        rows.append(_row(f"{lesion_name(lesion, number)}{kind}: {lesion['volume_ml']:.1f} ml{uptake}", views, shown))
    if not rows:
        rows.append(_row("Middle of the CT: no tumour outlined", cut_views(ct, pet, masks, ct[1].centre), shown))
    if len(lesions) > MOST_LESIONS:
        more = f"no pictures of {len(lesions) - MOST_LESIONS} more: see the table of lesions"
        rows[-1] = replace(rows[-1], title=f"{rows[-1].title} ({more})")
    return rows


def _row(title: str, views: Views, shown: Sequence[tuple[str, int]]) -> Row:
    return Row(title, [(tile(views, row, plane), f"{row}, {PLANES[plane][0]}") for row, plane in shown])


def influence_row(
    ct: Scan,
    pet: Scan,
    masks: Mapping[str, Scan],
    lesions: Sequence[Mapping[str, Any]],
    explanation: Explanation,
) -> Row:
    """What moved the risk, in three planes through the largest lesion, or the middle of the CT where there is none."""
    point = np.array(lesions[0]["centre_mm"], dtype=float) if lesions else ct[1].centre
    views = cut_views(ct, pet, masks, point)
    planes = cut_planes(explanation.smooth, explanation.grid, point, views.frame)
    largest = float(np.quantile(np.abs(np.concatenate([plane.ravel() for plane in planes])), INFLUENCE_QUANTILE))
    drawn = planes, largest or 1.0
    tiles = [(tile(views, INFLUENCE, plane, drawn), f"influence, {name}") for plane, (name, _) in enumerate(PLANES)]
    return Row("What moved the risk: red raised the computed risk, blue lowered it", tiles)


def caption_of(masks: Mapping[str, Scan], explained: bool) -> str:
    """How to read the pictures."""
    names = [f"{CLASS_NAMES[name]} ({TUMOUR_COLOUR_NAMES[name]})" for name in masks]
    outlines = f"Outlines (with white rims): predicted {' and '.join(names)}. " if names else "No tumour outlined. "
    return (
        f"{outlines}The patient's right is on the left. Positions are distances from the scanner's origin. "
        f"CT window {CT_WINDOW_HU[0]:.0f} to {CT_WINDOW_HU[1]:.0f} HU; PET window {PET_WINDOW_SUV[0]:.0f} to "
        f"{PET_WINDOW_SUV[1]:.0f} SUV; in the fusion, low uptake is red, too. MIP: the highest PET value along "
        "each ray." + (" Influence: part of the computed risk that each place accounts for." if explained else "")
    )


def curve_png(survival: Mapping[str, Any]) -> bytes:
    """The predicted survival as a picture."""
    figure = Figure(figsize=(3.6, 2.4), facecolor="white", layout="constrained")
    draw_patient_curve(figure.subplots(), survival)
    return png_of(figure, 170)


def curve_caption(survival: Mapping[str, Any]) -> str:
    """What the curve shows."""
    spread = (
        "; band: range of the folds, no confidence interval" if len(survival.get("log_hazard_folds") or []) > 1 else ""
    )
    return f"Predicted recurrence-free survival, risk group {survival.get('risk_group')}{spread}."


def scans_of(case: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[Scan, Scan, Scan | None]:
    """CT, PET and predicted mask of a case; scans that the result lacks are loaded again."""
    wanted = [key for key in (keys.CT, keys.PET) if result.get(key) is None]
    loaded = LoadScansd(wanted)({key: case[key] for key in wanted}) if wanted else {}
    ct, pet = (array_and_grid(loaded[key] if key in loaded else result[key]) for key in (keys.CT, keys.PET))
    return ct, pet, None if result.get(keys.PRED) is None else array_and_grid(result[keys.PRED])


class ReportWriter:
    """Writes the report of each patient, with an explainer also of what moved the risk, and the cohort's page.

    It is one of the ``products`` of :class:`.PredictionWriter`, so that ``prediction.json`` names the
    files; :meth:`write_cohort` is one of its ``pages``.
    """

    def __init__(self, output_dir: str, explainer: RiskExplainer | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.explainer = explainer

    def __call__(self, case: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
        """Write one patient's report.

        Yields:
            Name and file of what was written.
        """
        ct, pet, mask = scans_of(case, result)
        explanation = None
        if self.explainer is not None:
            explanation = self.explainer(result)
            yield "explanation", explanation.write(folder).name
        facts = study_facts(case, ct[1], pet[1])
        html, pdf = write_report(folder, result[keys.PREDICTION], ct, pet, mask, explanation, facts)
        yield from (("report", html.name), ("report_pdf", pdf.name))

    def write_cohort(self) -> None:
        """Write the page of the cohort."""
        write_summary(self.output_dir)
