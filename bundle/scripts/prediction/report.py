"""A patient's report on one page: ``report.html``, which holds all it shows, and ``report.pdf`` on A4.

Both show the same sections (:mod:`scripts.prediction.findings`) and pictures (:mod:`scripts.prediction.figures`) of
one prediction and
compute nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts import keys
from scripts.cohorts.files import write_text
from scripts.evaluation.plots import draw_patient_curve
from scripts.imaging.transforms import LoadScansd, array_and_grid
from scripts.prediction.figures import (
    CT_WINDOW_HU,
    DISPLAY_MM,
    DISPLAY_VOXELS,
    PET_WINDOW_SUV,
    PLANES,
    ROWS,
    Projection,
    Scan,
    Views,
    cut_planes,
    cut_views,
    draw_influence,
    draw_projection,
    draw_view,
    project,
)
from scripts.prediction.findings import Section, explanation_section, sections_of, warnings_of
from scripts.prediction.pages import render
from scripts.prediction.sheet import INK, MARGIN_MM, PALE, WIDTH_MM, Sheet, wrapped
from scripts.prediction.summary import write_summary

if TYPE_CHECKING:
    from scripts.prediction.explain import Explanation, RiskExplainer

REPORT_HTML, REPORT_PDF = "report.html", "report.pdf"
INNER_MM = WIDTH_MM - 2 * MARGIN_MM
LABEL_MM, GAP_MM = 4.0, 1.0
CELL_MM, CELL_MM_EXPLAINED, CELL_MM_SMALL = 38.0, 31.0, 25.0  # a picture's edge
TALL = 1.45  # height to width of a field of view from which on one projection takes the whole column
CURVE_MM = 46.0
COLUMN_GAP_MM = 8.0
INFLUENCE_QUANTILE = 0.998  # of the shown voxels: the value of the deepest colours
MASK_NAME = "predicted tumour"


def write_report(
    folder: str | Path,
    prediction: Mapping[str, Any],
    ct: Scan,
    pet: Scan,
    mask: Scan | None,
    explanation: Explanation | None = None,
) -> list[Path]:
    """Write a patient's report.

    Args:
        folder: receives ``report.html`` and ``report.pdf``.
        prediction: as ``prediction.json`` has it (see ``docs/prediction.schema.json``).
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        mask: predicted tumour (X, Y, Z) and its grid, that of the CT as a rule; None without the segmentation task.
        explanation: what moved the risk, see :mod:`scripts.prediction.explain`.

    Returns:
        The files.
    """
    pictures = Pictures(ct, pet, mask, explanation)
    sections = sections_of(prediction)
    if explanation is not None:
        sections.insert(1, explanation_section(explanation.to_dict()))
    paths = [Path(folder) / REPORT_HTML, Path(folder) / REPORT_PDF]
    write_text(paths[0], _html(prediction, sections, pictures))
    try:
        _pdf(prediction, sections, pictures).save(paths[1])
    except BaseException:
        paths[0].unlink()  # a report is both
        raise
    return paths


class Pictures:
    """All pictures of a report, cut once and drawn wherever they are wanted.

    Attributes:
        cell: edge of a picture in mm, free to set.

    Args:
        ct: as for :func:`write_report`.
        pet: likewise.
        mask: likewise.
        explanation: likewise.
    """

    def __init__(self, ct: Scan, pet: Scan, mask: Scan | None, explanation: Explanation | None = None) -> None:
        shown = mask if mask is not None else (np.zeros((1, 1, 1), dtype=np.uint8), ct[1].crop((slice(0, 1),) * 3))
        self.views: Views = cut_views(ct, pet, {MASK_NAME: shown})
        self.projections: list[Projection] = project(pet, shown)
        self.found = bool(any(outline.any() for outline in self.views.outlines[MASK_NAME]))
        self.influence: list[np.ndarray] | None = None
        self.limit = 1.0
        if explanation is not None:
            self.influence = cut_planes(explanation.smooth, explanation.grid, self.views.centre_mm)
            largest = np.quantile(
                np.abs(np.concatenate([plane.ravel() for plane in self.influence])), INFLUENCE_QUANTILE
            )
            self.limit = float(largest) or 1.0
        self.cell = CELL_MM if explanation is None else CELL_MM_EXPLAINED

    @property
    def rows(self) -> int:
        """Rows of pictures."""
        return len(ROWS) + (self.influence is not None)

    @property
    def height(self) -> float:
        """Of all of them, in mm."""
        return LABEL_MM + self.rows * self.cell + (self.rows - 1) * GAP_MM

    @property
    def caption(self) -> str:
        """What is to be seen."""
        middle = "the largest lesion" if self.found else "the middle of the scan (no tumour outlined)"
        size = f"{DISPLAY_VOXELS * DISPLAY_MM:.0f} mm"
        text = (
            f"Planes of {size} through {middle}; the patient's right is on the left. Outline: {MASK_NAME} (cyan, in "
            f"the projections red). CT {CT_WINDOW_HU[0]:.0f} to {CT_WINDOW_HU[1]:.0f} HU, PET {PET_WINDOW_SUV[0]:.0f} "
            f"to {PET_WINDOW_SUV[1]:.0f} SUV. MIP: highest PET value along each ray, the whole field of view."
        )
        return text if self.influence is None else f"{text} Influence: red raised the computed risk, blue lowered it."

    def draw(self, sheet: Sheet, left: float, top: float) -> None:
        """Draw them on a sheet, :data:`INNER_MM` wide, from an upper left corner in mm."""
        cell, step = self.cell, self.cell + GAP_MM
        small = {"color": PALE}
        for column, (plane, _) in enumerate(PLANES):
            x = left + LABEL_MM + column * step
            sheet.text(x + cell / 2, top, plane, 7.5, ha="center", **small)
            for row in range(self.rows):
                panel = sheet.axes(x, top + LABEL_MM + row * step, cell, cell)
                if row < len(ROWS):
                    draw_view(panel, self.views, ROWS[row], column)
                elif self.influence is not None:
                    draw_influence(panel, self.views, column, self.influence[column], self.limit)
                panel.set_aspect("auto")  # square as it is: the picture fills its place
        for row, name in enumerate((*ROWS, "influence")[: self.rows]):
            y = top + LABEL_MM + row * step + cell / 2
            sheet.text(left, y, name, 7.5, rotation=90, rotation_mode="anchor", ha="center", **small)
        taken = LABEL_MM + len(PLANES) * step + 2
        self._draw_projections(sheet, left + taken, top, INNER_MM - taken)

    def _draw_projections(self, sheet: Sheet, left: float, top: float, width: float) -> None:
        shown = self.projections[:1] if self.projections[0].proportion > TALL else self.projections
        room = self.height / len(shown) - LABEL_MM - GAP_MM
        used = min(room, width * max(projection.proportion for projection in shown))
        for k, projection in enumerate(shown):
            y = top + k * (used + LABEL_MM + GAP_MM)
            sheet.text(left + width / 2, y, f"PET MIP, {projection.name}", 7.5, ha="center", color=PALE)
            panel = sheet.axes(left, y + LABEL_MM, width, used)
            draw_projection(panel, projection)
            panel.set_anchor("N")


def _title(prediction: Mapping[str, Any]) -> str:
    return f"PET/CT report: {prediction['patient_id'] or 'patient without a name'}"


def _html(prediction: Mapping[str, Any], sections: Sequence[Section], pictures: Pictures) -> str:
    drawn = Sheet("", INNER_MM, pictures.height)
    pictures.draw(drawn, 0, 0)
    half = (len(sections) + 1) // 2
    has_curve = (prediction.get("survival") or {}).get("curve")
    return render(
        "report.html",
        title=_title(prediction),
        warnings=warnings_of(prediction),
        pictures=drawn.png(),
        caption=pictures.caption,
        curve=(_curve_png(prediction), _curve_caption(prediction)) if has_curve else None,
        columns=(sections[:half], sections[half:]),
        sortable=False,
    )


def _curve_png(prediction: Mapping[str, Any]) -> bytes:
    sheet = Sheet("", 96, 62)
    draw_patient_curve(sheet.axes(17, 3, 76, 46), prediction["survival"])
    return sheet.png()


def _curve_caption(prediction: Mapping[str, Any]) -> str:
    survival = prediction["survival"]
    spread = "; band: spread over the folds" if len(survival.get("log_hazard_folds") or []) > 1 else ""
    return f"Predicted recurrence-free survival, risk group {survival.get('risk_group')}{spread}."


def _pdf(prediction: Mapping[str, Any], sections: Sequence[Section], pictures: Pictures) -> Sheet:
    """The page, with smaller pictures where the text needs the room."""
    sheet, left_over = _compose(prediction, sections, pictures)
    if left_over:
        pictures.cell = CELL_MM_SMALL
        sheet, _ = _compose(prediction, sections, pictures)
    return sheet


def _compose(prediction: Mapping[str, Any], sections: Sequence[Section], pictures: Pictures) -> tuple[Sheet, int]:
    """The page, and how many lines of text found no room on it."""
    title = _title(prediction)
    sheet, left = Sheet(title), MARGIN_MM
    size = next((s for s in (14, 12, 10) if len(wrapped(title, INNER_MM, s, bold=True)) == 1), 9)
    top = sheet.paragraph(left, 8.0, INNER_MM, title, size, fontweight="bold", color=INK) + 0.5
    for text in warnings_of(prediction):
        top = sheet.warning(left, top, INNER_MM, text) + 1.2
    pictures.draw(sheet, left, top + 0.8)
    top = sheet.paragraph(left, top + pictures.height + 2, INNER_MM, pictures.caption, 6.0, color=PALE) + 1.5
    width = (INNER_MM - COLUMN_GAP_MM) / 2
    below = top
    if (prediction.get("survival") or {}).get("curve"):
        draw_patient_curve(sheet.axes(left + 13, top + 1, width - 15, CURVE_MM - 13), prediction["survival"], size=7)
        below += CURVE_MM
    return sheet, sheet.columns(sections, (below, top), width, COLUMN_GAP_MM, left)


class ReportWriter:
    """Writes the report of each patient, and at the end the page of the cohort.

    It is one of the ``products`` of :class:`.PredictionWriter`, so that ``prediction.json`` names the
    files; :meth:`write_cohort` is one of its ``pages``.

    Args:
        output_dir: of the cohort.
        explainer: says what moved the risk, see :class:`.RiskExplainer`; None: nothing is said of it.
    """

    def __init__(self, output_dir: str, explainer: RiskExplainer | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.explainer = explainer

    def __call__(self, case: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
        """Write one patient's report.

        Args:
            case: of the datalist.
            result: the item after the post transforms, without a batch axis.
            folder: of the patient.

        Yields:
            Name and file of what was written.
        """
        wanted = [key for key in (keys.CT, keys.PET) if result.get(key) is None]
        loaded = LoadScansd(wanted)({key: case[key] for key in wanted}) if wanted else {}
        ct, pet = (array_and_grid(loaded[key] if key in loaded else result[key]) for key in (keys.CT, keys.PET))
        mask = None if result.get(keys.PRED) is None else array_and_grid(result[keys.PRED])
        explanation = None
        if self.explainer is not None:
            explanation = self.explainer(result)
            yield "explanation", explanation.write(folder).name
        html, pdf = write_report(folder, result[keys.PREDICTION], ct, pet, mask, explanation)
        yield from (("report", html.name), ("report_pdf", pdf.name))

    def write_cohort(self) -> None:
        """Write the page of the cohort."""
        write_summary(self.output_dir)
