"""PET in Bq/ml without DICOM headers: SUV by the factors of a table, as HECKTOR's ``suv_conversion_tags.csv``.

The table has one row for each patient with ``pid``, ``units`` and the factor ``bqml_to_suvbw_factor``, or
``patient_weight_kg`` and ``dose_for_suv_bq`` (the dose, decayed to the time that the values are corrected to).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.cohorts.scans import CohortError, patient_key, printable, some
from scripts.cohorts.tables import ID_COLUMNS, first_column, read_records
from scripts.dicom.suv import DOSE_BQ, WEIGHT_KG
from scripts.imaging.headers import ImageReadError, read_header
from scripts.imaging.images import image_suffix, read_image

BQML = "BQML"
SUV_UNITS = ("GML", "SUV", "SUVBW", "G/ML")
FACTOR_TOLERANCE = 1e-4  # of the stated factor against weight and dose; tables round to six digits
LEAST_HIGHEST_SUV = 0.5  # the highest SUV of a body is above; a PET that was SUV already would have less than 0.1

_COLUMNS = {
    "units": "units",
    "factor": "bqml_to_suvbw_factor",
    "weight": "patient_weight_kg",
    "dose": "dose_for_suv_bq",
}


@dataclass(frozen=True)
class ActivityScan:
    """A PET in Bq/ml that is read as SUV when needed, for :class:`scripts.imaging.transforms.LoadScansd`.

    Args:
        path: image file.
        factor: SUV by body weight (g/ml) for 1 Bq/ml.
    """

    path: Path
    factor: float

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Doubts about the position in space, from the file's header."""
        return read_header(self.path, image_suffix(self.path)).doubts

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Array (X, Y, Z) in SUV and affine.

        Raises:
            ImageReadError: the file cannot be used, or its values are too low for Bq/ml.
        """
        array, affine = read_image(self.path)
        highest = float(array.max(initial=0.0))
        if 0 < highest * self.factor < LEAST_HIGHEST_SUV:
            raise ImageReadError(
                self.path,
                f"its highest value is {highest:g}, which as Bq/ml would be SUV {highest * self.factor:.2g}",
                "is the PET in SUV already? Then it needs no table of factors",
            )
        return array * np.float32(self.factor), affine


def read_suv_factor(table: str | Path, patient: str) -> float:
    """The factor from Bq/ml to SUV by body weight of one patient of a table.

        factor = weight [g] / dose [Bq]

    Args:
        table: CSV or JSON with the columns named above; others are ignored.
        patient: its id; spellings as for :func:`scripts.cohorts.scans.patient_key`.

    Raises:
        CohortError: the table cannot be read or lacks columns; the patient is not in it, or twice; the units are SUV
            already, or others than Bq/ml; a number is missing or implausible; factor, weight and dose contradict.
    """
    path = Path(table).expanduser()
    (_, titles), *rows = read_records(path) or [(0, [])]
    column = first_column(titles, ID_COLUMNS | {"pid"})
    if column < 0 or "units" not in titles:
        wanted = f"pid, {', '.join(_COLUMNS.values())}"
        raise CohortError(f"{path}: a table of SUV factors has the columns {wanted}; it has {', '.join(titles)}")
    found = [(row, cells) for row, cells in rows if len(cells) > column and _same(cells[column], patient)]
    if len(found) != 1:
        if found:
            raise CohortError(f"{path}: patient {patient} is in rows {', '.join(str(row) for row, _ in found)}")
        ids = [cells[column] for _, cells in rows if len(cells) > column]
        raise CohortError(f"{path}: no patient {patient}, whose PET is to be converted; it has {some(ids)}")
    row, cells = found[0]
    values = dict(zip(titles, cells, strict=False))
    where = f"{path}, row {row} ({patient})"
    units = values["units"].upper()
    if units in SUV_UNITS:
        raise CohortError(f"{where}: units are {units}: the PET is in SUV already and needs no table of factors")
    if units != BQML:
        shown = printable(values["units"], 20) or "missing"
        raise CohortError(f"{where}: units are {shown}; only {BQML} can be converted to SUV")
    return _factor(values, where)


def _same(cell: str, patient: str) -> bool:
    return patient_key(cell) == patient_key(patient)


def _factor(values: Mapping[str, str], where: str) -> float:
    factor = _number(values, _COLUMNS["factor"], (0.0, math.inf), where)
    weight = _number(values, _COLUMNS["weight"], WEIGHT_KG, where)
    dose = _number(values, _COLUMNS["dose"], DOSE_BQ, where)
    if weight is None or dose is None:
        if factor is None:
            raise CohortError(f"{where}: neither {_COLUMNS['factor']} nor {_COLUMNS['weight']} and {_COLUMNS['dose']}")
        return factor
    computed = 1000.0 * weight / dose
    if factor is not None and not math.isclose(factor, computed, rel_tol=FACTOR_TOLERANCE):
        raise CohortError(
            f"{where}: {_COLUMNS['factor']} is {factor:g}, but weight and dose ({weight:g} kg, {dose:g} Bq) give "
            f"{computed:g}: correct the wrong one or leave it empty"
        )
    return computed


def _number(values: Mapping[str, str], column: str, limits: tuple[float, float], where: str) -> float | None:
    """A number of the row, None where the cell is empty; must lie between the limits, without these."""
    text = values.get(column, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not limits[0] < number < limits[1]:
        within = "above 0" if math.isinf(limits[1]) else f"between {limits[0]:g} and {limits[1]:g}"
        raise CohortError(f"{where}: {column} is {printable(text, 20)!r}; expected a number {within}")
    return number
