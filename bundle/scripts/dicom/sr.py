"""Measurements and prediction as a DICOM structured report (TID 1500)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from scripts.dicom.seg import UTF_8, Model, code, head_and_neck, neoplasm, save_whole, source_headers
from scripts.dicom.series import Series
from scripts.dicom.tags import DicomError, lenient, needed_module

if TYPE_CHECKING:
    from pydicom import Dataset

SR_SERIES_NUMBER = 9102
# Concepts for which neither DICOM nor SNOMED has a code. The report names the scheme in its coding scheme
# identification; survival at d days has the code RFS_<d>D.
PRIVATE_SCHEME = "99HNPETCT"
PRIVATE_CODES = {
    "LOG_HAZARD": "Log hazard of recurrence relative to the training cohort",
    "RISK_PERCENTILE": "Percentile of the log hazard in the training cohort",
    "HPV_PROBABILITY": "Predicted probability of positive HPV status",
    "HPV_STATUS": "Predicted HPV status",
    "PREDICTION": "Prognosis and HPV status predicted by a model",
}


@dataclass(frozen=True)
class Findings:
    """What a report states; None is left out.

    Args:
        volume_ml: volume of the segmented tumour.
        suv_max: highest SUV (body weight) in it.
        suv_mean: mean SUV in it.
        mtv_ml: metabolic tumour volume.
        tlg_g: total lesion glycolysis, mean SUV times metabolic volume (g).
        lesions: number of separate lesions.
        log_hazard: of recurrence.
        risk_percentile: of the log hazard in the training cohort, 0 to 100.
        survival: recurrence-free survival probability (0 to 1) by days since the scan.
        hpv_probability: 0 to 1.
        hpv_positive: the class.

    Raises:
        ValueError: when a number is not finite.
    """

    volume_ml: float | None = None
    suv_max: float | None = None
    suv_mean: float | None = None
    mtv_ml: float | None = None
    tlg_g: float | None = None
    lesions: int | None = None
    log_hazard: float | None = None
    risk_percentile: float | None = None
    survival: Mapping[int, float] = field(default_factory=dict)
    hpv_probability: float | None = None
    hpv_positive: bool | None = None

    def __post_init__(self) -> None:
        numbers = {**vars(self), **{f"survival at {day} days": p for day, p in self.survival.items()}}
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and not math.isfinite(value):
                raise ValueError(f"report: {name} is {value}; leave out what is not known")


def write_sr(
    path: str | PathLike[str],
    findings: Findings,
    *,
    ct: Series,
    pet: Series,
    model: Model,
    seg: Dataset | None = None,
    notes: Sequence[str] = (),
    description: str = "PET/CT measurements and prediction (research use only)",
    series_number: int = SR_SERIES_NUMBER,
) -> Dataset:
    """Write measurements and prediction as a DICOM structured report (Comprehensive SR, template TID 1500).

    The tumour's measurements form a volumetric ROI group (TID 1411) that refers to the segmentation; the prediction is
    a measurement group of its own (TID 1501) with codes of the private scheme ``99HNPETCT`` (:data:`PRIVATE_CODES`).
    Both name the model and state what it was trained on and that they are for research use only. The report is
    unverified and preliminary.

    Args:
        path: where to; the file appears whole or not at all.
        findings: the numbers.
        ct: the CT used.
        pet: the PET used.
        model: what made the prediction.
        seg: the segmentation (:func:`write_seg`); needed when there are measurements of the tumour.
        notes: remarks for the reader, e.g. quality flags; each becomes a comment. Put nothing identifying in them.
        description: series description, 64 characters at most.
        series_number: of the new series.

    Returns:
        The dataset as written.

    Raises:
        DicomError: when there are measurements of a tumour and no segmentation, or nothing to report.
    """
    hd = needed_module("highdicom")
    with lenient():
        measured, predicted = _tumour_measurements(findings), _predictions(findings)
        if measured and seg is None:
            raise DicomError("measurements of the tumour refer to its segmentation: give seg")
        groups = [_tumour_group(measured, seg, ct, model)] if measured else []
        statuses = _hpv_status(findings)
        groups += [_prediction_group(predicted, statuses, model)] if predicted or statuses else []
        if not groups:
            raise DicomError("nothing to report")
        for text in (*model.statements, *notes):
            for group in groups:
                group[0].ContentSequence.append(_comment(text))
        report = hd.sr.MeasurementReport(
            observation_context=_observer(model),
            procedure_reported=[code("LN", "44136-0", "PET unspecified body region")],
            imaging_measurements=groups,
            title=code("DCM", "126000", "Imaging Measurement Report"),
        )
        _separate(report[0])
        evidence = [*source_headers(ct), *source_headers(pet), *([seg] if seg is not None else [])]
        document = hd.sr.ComprehensiveSR(
            evidence=evidence,
            content=report[0],
            series_instance_uid=hd.UID(),
            series_number=series_number,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            **model.equipment,
            is_complete=True,
            series_description=description,
            coding_schemes=[_private_scheme()],
            specific_character_set=UTF_8,
        )
        save_whole(document, path)
    return document


def _separate(item: Any) -> None:
    """Say that the items of each container stand on lines of their own.

    highdicom says CONTINUOUS, by which the standard has them rendered as running text, without their names.
    """
    if item.ValueType == "CONTAINER":
        item.ContinuityOfContent = "SEPARATE"
    for child in item.get("ContentSequence") or []:
        _separate(child)


def _private_code(value: str) -> Any:
    return code(PRIVATE_SCHEME, value, PRIVATE_CODES[value])


def _private_scheme() -> Any:
    return needed_module("highdicom.coding_schemes").CodingSchemeIdentificationItem(
        designator=PRIVATE_SCHEME, name="Head and neck PET/CT prediction", version="1"
    )


def _algorithm(model: Model) -> Any:
    return needed_module("highdicom").sr.AlgorithmIdentification(
        name=model.name,
        version=model.version,
        parameters=[f"{name}: {value}" for name, value in model.parameters.items()],
    )


def _observer(model: Model) -> Any:
    """The device that observes is the model; its UID is the same for the same model and weights."""
    sr = needed_module("highdicom").sr
    uid = needed_module("pydicom.uid").generate_uid(entropy_srcs=[model.name, model.version, model.weights])
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=uid,
        name=model.name,
        manufacturer_name=model.manufacturer,
        model_name=f"{model.name} {model.version}",
        serial_number=model.weights,
    )
    context = sr.ObserverContext(observer_type=code("DCM", "121007", "Device"), observer_identifying_attributes=device)
    return sr.ObservationContext(observer_device_context=context)


def _comment(text: str) -> Any:
    return needed_module("highdicom").sr.TextContentItem(
        name=code("DCM", "121106", "Comment"), value=text, relationship_type="CONTAINS"
    )


def _measurement(name: Any, value: float, unit: tuple[str, str], derivation: Any = None) -> Any:
    return needed_module("highdicom").sr.Measurement(
        name=name, value=float(value), unit=code("UCUM", *unit), derivation=derivation
    )


def _tumour_measurements(findings: Findings) -> list[Any]:
    suv, suv_unit = code("DCM", "126401", "SUVbw"), ("g/ml{SUVbw}", "Standardized Uptake Value body weight")
    volume_unit, none = ("cm3", "cubic centimeter"), ("1", "no units")
    rows = [
        (code("SCT", "118565006", "Volume"), findings.volume_ml, volume_unit, None),
        (suv, findings.suv_max, suv_unit, code("SCT", "56851009", "Maximum")),
        (suv, findings.suv_mean, suv_unit, code("SCT", "373098007", "Mean")),
        (code("DCM", "126032", "Metabolic Volume"), findings.mtv_ml, volume_unit, None),
        (code("DCM", "126033", "Total Lesion Glycolysis"), findings.tlg_g, ("g", "gram"), None),
        (code("SCT", "246206008", "Number of lesions"), findings.lesions, none, None),
    ]
    return [_measurement(name, value, unit, how) for name, value, unit, how in rows if value is not None]


def _predictions(findings: Findings) -> list[Any]:
    none, percent = ("1", "no units"), ("%", "Percent")
    rows = [
        (_private_code("LOG_HAZARD"), findings.log_hazard, none),
        (_private_code("RISK_PERCENTILE"), findings.risk_percentile, percent),
        *((_survival_code(day), p, none) for day, p in sorted(findings.survival.items())),
        (_private_code("HPV_PROBABILITY"), findings.hpv_probability, none),
    ]
    return [_measurement(name, value, unit) for name, value, unit in rows if value is not None]


def _survival_code(days: int) -> Any:
    return code(PRIVATE_SCHEME, f"RFS_{days:d}D", f"Predicted recurrence-free survival at {days:d} days")


def _hpv_status(findings: Findings) -> list[Any]:
    if findings.hpv_positive is None:
        return []
    value = ("10828004", "Positive") if findings.hpv_positive else ("260385009", "Negative")
    evaluation = needed_module("highdicom").sr.QualitativeEvaluation
    return [evaluation(name=_private_code("HPV_STATUS"), value=code("SCT", *value))]


def _tumour_group(measurements: list[Any], seg: Any, ct: Series, model: Model) -> Any:
    sr = needed_module("highdicom").sr
    segment = seg.SegmentSequence[0]
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=segment.TrackingUID, identifier=segment.TrackingID),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=1,
            source_series=sr.SourceSeriesForSegmentation(ct.uid),
        ),
        finding_type=neoplasm(),
        finding_sites=[sr.FindingSite(anatomic_location=head_and_neck())],
        algorithm_id=_algorithm(model),
        measurements=measurements,
    )


def _prediction_group(measurements: list[Any], evaluations: list[Any], model: Model) -> Any:
    hd = needed_module("highdicom")
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="Prediction"),
        finding_type=_private_code("PREDICTION"),
        algorithm_id=_algorithm(model),
        measurements=measurements,
        qualitative_evaluations=evaluations,
    )
