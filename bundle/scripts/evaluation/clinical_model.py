"""The clinical model that is shipped: recurrence-free survival from clinical values alone, trained on patients.

``models/clinical_rfs.json`` holds a ridge Cox model. ``scripts/fit_clinical.py`` of the repository makes it;
``docs/clinical.md`` says from what, and how good it is. It has nothing to do with the network and its training data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scripts.cohorts.clinical import code_indicators, indicator_names
from scripts.evaluation.survival import Calibration, CalibrationError

MODEL_FILE = Path(__file__).resolve().parents[2] / "models" / "clinical_rfs.json"
FORMAT = 1
FEW = 0.75
"""Share of the values up to which they count as few: without T and N the C-index falls from 0.70 to 0.61."""


class ClinicalModelError(ValueError):
    """A file of a clinical model that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class ClinicalModel:
    r"""A Cox model of clinical values alone.

    .. math:: h(x) = \sum_j \beta_j x_j, \quad S(t | x) = \exp(-H_0(t) \exp(\gamma (h(x) - c) / s))

    with x as :func:`.code_indicators` codes the values (a missing category is 0 in all its columns) and missing numbers
    and stages filled in.

    Attributes:
        format: of the file.
        endpoint: what is predicted.
        features: names of the clinical values.
        fill: number or stage that stands for a missing one.
        coefficients: beta by column of :func:`.indicator_names`.
        calibration: H_0, gamma, c and s, percentiles and risk groups of the training patients; see
            :class:`.Calibration`.
        about: ``source``, ``licence``, ``attribution``; ``patients``, ``events``, ``hospitals``, ``years``; ``method``.
        evidence: C-index with interval and counts: ``temporal`` and, with a cohort of other hospitals, ``external``.
    """

    format: int
    endpoint: str
    features: list[str]
    fill: dict[str, float]
    coefficients: dict[str, float]
    calibration: Calibration
    about: dict[str, Any]
    evidence: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path = MODEL_FILE) -> ClinicalModel:
        """The model in a file.

        Raises:
            ClinicalModelError: the file does not exist or is no such model.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            names = {item.name for item in fields(cls)}
            if not isinstance(content, dict) or set(content) != names or content["format"] != FORMAT:
                raise ClinicalModelError(f"expected the names {', '.join(sorted(names))} and the format {FORMAT}")
            model = cls(**{**content, "calibration": Calibration.from_dict(content["calibration"])})
            columns = indicator_names(model.features)
        except OSError as error:
            raise ClinicalModelError(f"the clinical model {path} cannot be read: {error.strerror or error}") from error
        except (ValueError, CalibrationError) as error:  # JSON that is none, an unknown feature
            raise ClinicalModelError(f"{path} is no clinical model of this version: {error}") from error
        if list(model.coefficients) != columns or not all(map(math.isfinite, model.coefficients.values())):
            raise ClinicalModelError(f"{path}: its coefficients do not belong to {', '.join(columns)}")
        return model

    def log_hazard(self, patients: Sequence[Mapping[str, object]]) -> np.ndarray:
        """Log hazards h(x), (N,).

        Args:
            patients: clinical values by feature name, raw or parsed, of N patients.

        Raises:
            scripts.cohorts.clinical.ClinicalValueError: a value cannot be read.
        """
        columns = indicator_names(self.features)
        rows = [code_indicators(values, self.features, missing_number=np.nan) for values in patients]
        table = np.asarray(rows, dtype=float).reshape(len(patients), len(columns))
        filling = np.array([self.fill.get(name, 0.0) for name in columns])
        table = np.where(np.isnan(table), filling, table)
        return table @ np.array([self.coefficients[name] for name in columns])

    def normalised(self, patients: Sequence[Mapping[str, object]]) -> np.ndarray:
        """Log hazards as :attr:`calibration` takes them, (N,); arguments as :meth:`log_hazard`."""
        return self.calibration.normalise(self.log_hazard(patients)[:, None])[:, 0]

    @property
    def summary(self) -> str:
        """What has to be said wherever a result of it is shown."""
        external = self.evidence.get("external")
        hospitals = {1: "one hospital"}.get(self.about["hospitals"], f"{self.about['hospitals']} hospitals")
        text = f"from clinical values alone; trained on {self.about['patients']:,} patients of {hospitals}"
        if not external:
            return f"{text}, not tested on another one"
        return (
            f"{text}, externally C-index {external['value']:.3f} [{external['low']:.3f}, {external['high']:.3f}] "
            f"({external['patients']} patients, {external['events']} events, {external['hospitals']} hospitals)"
        )


@cache
def shipped() -> ClinicalModel:
    """The model in :data:`MODEL_FILE`, read once."""
    return ClinicalModel.read()


def shipped_features() -> list[str]:
    """Clinical values that the shipped model reads; none where there is no such model."""
    try:
        return shipped().features
    except ClinicalModelError:
        return []


def few_known(known: int, total: int) -> bool:
    """Whether so few of the values are known that the result says little.

    Example:
        >>> few_known(7, 8), few_known(6, 8)
        (False, True)
    """
    return known <= FEW * total
