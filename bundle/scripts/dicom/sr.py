"""Measurements and prediction as a DICOM structured report (TID 1500)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from scripts.dicom.seg import CODES, UTF_8, Model, code, save_whole, source_headers
from scripts.dicom.series import Series
from scripts.dicom.tags import DicomError, lenient, needed_module

if TYPE_CHECKING:
    from pydicom import Dataset

SR_SERIES_NUMBER = 9102
TUMOUR, PREDICTION = "Tumour", "Prediction"  # groups of the report
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


_SUV, _SUV_UNIT = ("DCM", "126401", "SUVbw"), ("g/ml{SUVbw}", "Standardized Uptake Value body weight")
_ML, _NONE = ("cm3", "cubic centimeter"), ("1", "no units")
# Of a lesion or of the whole tumour: concept, unit, derivation, decimals.
MEASUREMENTS: Mapping[str, tuple[Any, tuple[str, str], Any, int]] = {
    "volume_ml": (("SCT", "118565006", "Volume"), _ML, None, 2),
    "suv_max": (_SUV, _SUV_UNIT, ("SCT", "56851009", "Maximum"), 2),
    "suv_mean": (_SUV, _SUV_UNIT, ("SCT", "373098007", "Mean"), 2),
    "suv_peak": (_SUV, _SUV_UNIT, ("DCM", "126031", "Peak Value Within ROI"), 2),
    "mtv_ml": (("DCM", "126032", "Metabolic Volume"), _ML, None, 2),
    "tlg_g": (("DCM", "126033", "Total Lesion Glycolysis"), ("g", "gram"), None, 1),
    "longest_diameter_mm": (("IBSI", "L0JK", "Maximum 3D Diameter of a Mesh"), ("mm", "millimeter"), None, 1),
    "lesions": (("SCT", "246206008", "Number of lesions"), _NONE, None, 0),
}


@dataclass(frozen=True)
class Findings:
    """Content of a report; None is left out.

    Args:
        tumour: of :data:`MEASUREMENTS`, those of the whole tumour: volumes in ml, SUV by body weight, total lesion
            glycolysis in g, number of lesions.
        lesions: of :data:`MEASUREMENTS`, those of each lesion, in the order of the segments; diameters in mm.
        log_hazard: of recurrence.
        risk_percentile: of the log hazard in the training cohort, 0 to 100.
        survival: recurrence-free survival probability (0 to 1) by days, counted as in the training data.
        hpv_probability: 0 to 1.
        hpv_positive: the class.

    Raises:
        ValueError: when a number is not finite.
    """

    tumour: Mapping[str, float | None] = field(default_factory=dict)
    lesions: Sequence[Mapping[str, float | None]] = ()
    log_hazard: float | None = None
    risk_percentile: float | None = None
    survival: Mapping[int, float] = field(default_factory=dict)
    hpv_probability: float | None = None
    hpv_positive: bool | None = None

    def __post_init__(self) -> None:
        numbers = [*vars(self).items(), *((f"survival at {day} days", p) for day, p in self.survival.items())]
        numbers += [item for measured in (self.tumour, *self.lesions) for item in measured.items()]
        for name, value in numbers:
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
    remarks: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Dataset:
    """Write measurements and prediction as a DICOM structured report (Comprehensive SR, template TID 1500).

    Each lesion has a volumetric ROI group (TID 1411) that refers to its segment and shares its tracking id and UID. The
    whole tumour and the prediction have a measurement group each (TID 1501), the latter with codes of the private
    scheme ``99HNPETCT`` (:data:`PRIVATE_CODES`). Numbers are rounded. All groups name the model and state that they are
    for research use only. The report is unverified and preliminary.

    Args:
        path: the file; it appears under this name only when complete.
        findings: the numbers.
        ct: the CT used.
        pet: the PET used.
        model: what made the prediction.
        seg: the segmentation (:func:`write_seg`); needed when there are lesions.
        notes: for the reader, e.g. quality flags; each becomes a comment of tumour and prediction. They must not
            identify the patient.
        remarks: the same for one of the two, by its name ``Tumour`` or ``Prediction``.

    Raises:
        DicomError: when the lesions are not those of the segmentation, or there is nothing to report.
    """
    hd = needed_module("highdicom")
    with lenient():
        if findings.lesions and (seg is None or len(seg.SegmentSequence) != len(findings.lesions)):
            raise DicomError("measurements of lesions refer to their segmentation: give seg, with one segment for each")
        lesions = [_lesion_group(k, lesion, seg, ct, model) for k, lesion in enumerate(findings.lesions)]
        groups = {TUMOUR: _tumour_group(findings, model), PREDICTION: _prediction_group(findings, model)}
        summaries = [group for found in groups.values() for group in found]
        if not summaries and not lesions:
            raise DicomError("nothing to report")
        for group, texts in [
            *((group, model.statements[:1]) for group in lesions),
            *(
                (group, (*model.statements, *notes, *remarks.get(name, ())))
                for name, found in groups.items()
                for group in found
            ),
        ]:
            group[0].ContentSequence.extend(_comment(text) for text in texts)
        report = hd.sr.MeasurementReport(
            observation_context=_observer(model),
            procedure_reported=[code("LN", "44136-0", "PET unspecified body region")],
            imaging_measurements=[*lesions, *summaries],
            title=code("DCM", "126000", "Imaging Measurement Report"),
        )
        _separate(report[0])
        evidence = [*source_headers(ct), *source_headers(pet), *([seg] if seg is not None else [])]
        document = hd.sr.ComprehensiveSR(
            evidence=evidence,
            content=report[0],
            series_instance_uid=hd.UID(),
            series_number=SR_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            **model.equipment,
            is_complete=True,
            series_description="PET/CT measurements and prediction (research use only)",
            coding_schemes=[_private_scheme()],
            specific_character_set=UTF_8,
        )
        save_whole(document, path)
    return document


def _separate(item: Any) -> None:
    """Set SEPARATE in every container: readers render highdicom's CONTINUOUS as running text, without the names."""
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


def _measurement(name: Any, value: float, unit: tuple[str, str], derivation: Any, decimals: int) -> Any:
    return needed_module("highdicom").sr.Measurement(
        name=name,
        value=round(value, decimals) if decimals else round(value),
        unit=code("UCUM", *unit),
        derivation=None if derivation is None else code(*derivation),
    )


def _measurements(measured: Mapping[str, float | None]) -> list[Any]:
    rows = [(measured.get(key), *how) for key, how in MEASUREMENTS.items()]
    return [_measurement(code(*name), value, *how) for value, name, *how in rows if value is not None]


def _lesion_group(index: int, measured: Mapping[str, float | None], seg: Any, ct: Series, model: Model) -> Any:
    sr, segment = needed_module("highdicom").sr, seg.SegmentSequence[index]
    [region] = segment.AnatomicRegionSequence
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=segment.TrackingUID, identifier=segment.TrackingID),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=segment.SegmentNumber,
            source_series=sr.SourceSeriesForSegmentation(ct.uid),
        ),
        finding_type=segment.SegmentedPropertyTypeCodeSequence[0],
        finding_sites=[sr.FindingSite(anatomic_location=region)],
        algorithm_id=_algorithm(model),
        measurements=_measurements(measured),
    )


def _tumour_group(findings: Findings, model: Model) -> list[Any]:
    sr, measurements = needed_module("highdicom").sr, _measurements(findings.tumour)
    kind, region = CODES["GTV"]
    site = sr.FindingSite(anatomic_location=code("SCT", *region))
    return _summary(TUMOUR, code("SCT", *kind), model, measurements, [], [site])


def _prediction_group(findings: Findings, model: Model) -> list[Any]:
    rows = [
        (_private_code("LOG_HAZARD"), findings.log_hazard, _NONE, 3),
        (_private_code("RISK_PERCENTILE"), findings.risk_percentile, ("%", "Percent"), 0),
        *((_survival_code(day), p, _NONE, 3) for day, p in sorted(findings.survival.items())),
        (_private_code("HPV_PROBABILITY"), findings.hpv_probability, _NONE, 3),
    ]
    measurements = [
        _measurement(name, value, unit, None, decimals) for name, value, unit, decimals in rows if value is not None
    ]
    return _summary(PREDICTION, _private_code("PREDICTION"), model, measurements, _hpv_status(findings), [])


def _summary(
    name: str, kind: Any, model: Model, measurements: list[Any], evaluations: list[Any], sites: list[Any]
) -> list[Any]:
    """A group that refers to no segment; none where there is nothing in it."""
    if not measurements and not evaluations:
        return []
    hd = needed_module("highdicom")
    return [
        hd.sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=name),
            finding_type=kind,
            finding_sites=sites or None,
            algorithm_id=_algorithm(model),
            measurements=measurements,
            qualitative_evaluations=evaluations,
        )
    ]


def _survival_code(days: int) -> Any:
    return code(PRIVATE_SCHEME, f"RFS_{days:d}D", f"Predicted recurrence-free survival at {days:d} days")


def _hpv_status(findings: Findings) -> list[Any]:
    if findings.hpv_positive is None:
        return []
    value = ("10828004", "Positive") if findings.hpv_positive else ("260385009", "Negative")
    evaluation = needed_module("highdicom").sr.QualitativeEvaluation
    return [evaluation(name=_private_code("HPV_STATUS"), value=code("SCT", *value))]
