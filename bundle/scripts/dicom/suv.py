"""Standardised uptake values: the factor of a PET's values, from its headers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from scripts.dicom.tags import (
    AbsentTagError,
    DicomError,
    items_of,
    lenient,
    number_of,
    private_text,
    tag_name,
    text_of,
    words_of,
)
from scripts.dicom.times import (
    START_DATE_TIME,
    START_TIME,
    check_decay_factor,
    required,
    scan_start,
    uptake_time,
)
from scripts.dicom.tracer import F18, HALF_LIFE_S, tracer_of

if TYPE_CHECKING:
    from pydicom import Dataset

T = TypeVar("T")

READABLE_UNITS = ("BQML", "CNTS", "GML")
WEIGHT_KG = (2.0, 500.0)
DOSE_BQ = (1e6, 1e11)  # a dose in MBq, against the standard, is below
USUAL_WEIGHT_KG, USUAL_DOSE_BQ = (30.0, 250.0), (20e6, 1e9)  # of an adult's FDG scan
HALF_LIFE_RANGE_S = (60.0, 1e7)
PHILIPS = (0x7053, "Philips PET Private Group")  # group and private creator
SUV_OFFSET, ACTIVITY_OFFSET = 0x00, 0x09
OWN_FACTOR_TOLERANCE = 0.05  # Philips' own factor against that of the public tags; real headers differ by 0.1 %


@dataclass(frozen=True)
class Suv:
    """Conversion of a PET's rescaled values to SUV.

    Args:
        factor: SUV by body weight (g/ml) per unit of the PET.
        doubts: doubts about it from the headers, as texts without anything that identifies a patient.
    """

    factor: float
    doubts: tuple[str, ...] = ()


def suv_of(headers: Dataset | Sequence[Dataset]) -> Suv:
    """The factor from rescaled values to SUV by body weight (g/ml), from the headers of all slices of a PET series.

    Follows the QIBA vendor-neutral pseudo-code (QIBA Profile FDG-PET/CT, appendix G). With BQML

        factor = weight [g] / (dose [Bq] * 2 ** (-uptake time / half-life))

    where, for decay correction START, the uptake time runs from the injection (:func:`scripts.dicom.times.uptake_time`)
    to the start of the scan (:func:`scripts.dicom.times.scan_start`); for ADMIN the values are corrected to the
    injection, so that it is 0. A dose given in parts is the sum of the parts, each decayed to the start of the scan.
    For CNTS, Philips' factor (7053,1000) is used, or its (7053,1009), which gives Bq/ml. GML values are SUV
    and remain as they are. The tracer must not be known to be another than FDG.

    Doubts are: an unknown tracer, an uptake time outside 30 to 240 min, two sources of one time that differ by minutes,
    a dose given in parts, a weight outside 30 to 250 kg, a dose outside 20 MBq to 1 GBq, a Decay Factor that belongs to
    another moment than that of Decay Correction, and a factor of Philips that differs from that of the public tags.
    Times that the factor does not depend on are checked if they are stated.

    Raises:
        DicomError: naming the tag that is missing, zero, implausible or differs between slices; for other units
            (PROPCNTS), SUV by another measure than body weight, images without attenuation or decay correction,
            another tracer than FDG, and times that do not belong together.
    """
    slices: list[Dataset] = list(headers) if isinstance(headers, Sequence) else [headers]
    if not slices:
        raise DicomError("SUV: no PET slices")
    doubts: list[str] = []
    with lenient():
        units = _agreed(slices, "Units")
        if units not in READABLE_UNITS:
            known = ", ".join(READABLE_UNITS)
            raise DicomError(f"SUV: {tag_name('Units')} is {units}; SUV can be computed from {known} only")
        _check_tracer(slices, doubts)
        if units == "GML":
            _check_suv_type(slices)
            _if_stated(lambda: _uptake_times(slices, doubts), doubts)
            return Suv(1.0, tuple(doubts))
        decay = _check_corrections(slices)
        with suppress(DicomError):  # times that are needed are errors elsewhere
            _compare_with_decay_factor(slices, decay, doubts)
        if units == "CNTS":
            return Suv(_counts_factor(slices, decay, doubts), tuple(doubts))
        factor = _activity_factor(slices, decay, doubts)
        _if_stated(lambda: _compare_with_philips(slices, factor, doubts), doubts)
        return Suv(factor, tuple(doubts))


def _activity_factor(slices: Sequence[Dataset], decay: str, doubts: list[str]) -> float:
    """From Bq/ml to SUV."""
    weight = _positive(slices, "PatientWeight", WEIGHT_KG, "kg")
    parts = _injections(slices)
    doses = [_positive(items, "RadionuclideTotalDose", DOSE_BQ, "Bq") for items in parts]
    _say_if_unusual("PatientWeight", weight, USUAL_WEIGHT_KG, 1.0, "kg", doubts)
    _say_if_unusual("RadionuclideTotalDose", sum(doses), USUAL_DOSE_BQ, 1e6, "MBq", doubts)
    if decay == "ADMIN":
        if len(parts) > 1:
            raise DicomError(
                f"SUV: {tag_name('RadiopharmaceuticalInformationSequence')} has {len(parts)} items, and "
                f"{tag_name('DecayCorrection')} is ADMIN: the values are corrected to one of several injections, and "
                "it is not stated to which"
            )
        _if_stated(lambda: _uptake_times(slices, doubts), doubts)
        return weight * 1000.0 / doses[0]
    half_lives = [_positive(items, "RadionuclideHalfLife", HALF_LIFE_RANGE_S, "s") for items in parts]
    uptakes = _uptake_times(slices, doubts)
    told = list(zip(doses, uptakes, strict=True))
    if len(set(told)) < len(told):
        raise DicomError(
            f"SUV: {tag_name('RadiopharmaceuticalInformationSequence')} has {len(told)} items with the same dose and "
            "time: one dose stated twice, or two doses? Keep one item for each injection"
        )
    if len(told) > 1:
        doubts.append(f"the dose was given in {len(told)} parts, which are decayed to the start of the scan and added")
    left = [
        dose * 2.0 ** (-uptake.total_seconds() / half_life)
        for (dose, uptake), half_life in zip(told, half_lives, strict=True)
    ]
    return weight * 1000.0 / sum(left)


def _injections(slices: Sequence[Dataset]) -> list[list[Dataset]]:
    """For each injection, its items in all slices."""
    keyword = "RadiopharmaceuticalInformationSequence"
    items = [items_of(s, keyword) for s in slices]
    counts = {len(each) for each in items}
    if len(counts) > 1:
        raise DicomError(f"SUV: the slices differ in the number of items of {tag_name(keyword)}")
    if counts == {0}:
        raise AbsentTagError(f"SUV: {tag_name(keyword)} is missing or empty")
    return [list(part) for part in zip(*items, strict=True)]


def _uptake_times(slices: Sequence[Dataset], doubts: list[str]) -> list[timedelta]:
    """From each injection to the start of the scan."""
    parts = _injections(slices)
    for keyword in (START_DATE_TIME, START_TIME):
        for items in parts:
            _agreed(items, keyword, optional=True)
    start = scan_start(slices, _half_life(parts), doubts)
    return [uptake_time(items[0], slices[0], start, doubts) for items in parts]


def _half_life(parts: Sequence[Sequence[Dataset]]) -> float:
    """Of the first injection, in s; of F-18 where it is not stated."""
    return number_of(parts[0][0], "RadionuclideHalfLife", 0.0) or HALF_LIFE_S[F18]


def _compare_with_decay_factor(slices: Sequence[Dataset], decay: str, doubts: list[str]) -> None:
    half_life = _half_life(_injections(slices))
    before = _uptake_times(slices, [])[0] if decay == "ADMIN" else timedelta(0)
    check_decay_factor(slices, half_life, scan_start(slices, half_life, []), before, doubts)


def _counts_factor(slices: Sequence[Dataset], decay: str, doubts: list[str]) -> float:
    """From Philips' counts to SUV."""
    own = _philips_factor(slices, SUV_OFFSET)
    to_activity = _philips_factor(slices, ACTIVITY_OFFSET)
    if own > 0:
        activity = _if_stated(lambda: _activity_factor(slices, decay, doubts), doubts)
        if activity is not None and to_activity > 0:
            _say_if_apart(own, to_activity * activity, doubts)
        return own
    if to_activity > 0:
        return to_activity * _activity_factor(slices, decay, doubts)
    raise DicomError(f"SUV: units are CNTS, and both (7053,1000) and (7053,1009) of {PHILIPS[1]} are missing or zero")


def _compare_with_philips(slices: Sequence[Dataset], factor: float, doubts: list[str]) -> None:
    own, to_activity = _philips_factor(slices, SUV_OFFSET), _philips_factor(slices, ACTIVITY_OFFSET)
    if own > 0 and to_activity > 0:
        _say_if_apart(own / to_activity, factor, doubts)


def _say_if_unusual(
    keyword: str, number: float, usual: tuple[float, float], of: float, unit: str, doubts: list[str]
) -> None:
    """``of``: the unit in that of the tag."""
    if not usual[0] <= number <= usual[1]:
        low, high = (f"{limit / of:g}" for limit in usual)
        doubts.append(f"{tag_name(keyword)} is {number / of:g} {unit}; {low} to {high} {unit} are usual: is it right?")


def _say_if_apart(own: float, computed: float, doubts: list[str]) -> None:
    if abs(own / computed - 1) > OWN_FACTOR_TOLERANCE:
        doubts.append(
            f"Philips' own SUV factor (7053,1000) is {own / computed:.2f} times that of weight, dose and times"
        )


def _philips_factor(slices: Sequence[Dataset], offset: int) -> float:
    """A private factor, 0 where there is none (Philips also writes 0)."""
    found = {private_text(s, *PHILIPS, offset) for s in slices}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in (7053,10{offset:02X})")
    return _as_number(found.pop(), f"SUV: (7053,10{offset:02X}), {PHILIPS[1]},")


def _if_stated(look: Callable[[], T], doubts: list[str]) -> T | None:
    """The result of a check that the factor does not depend on: absent tags are ignored, other faults are doubts."""
    try:
        return look()
    except AbsentTagError:
        return None
    except DicomError as error:
        doubts.append(str(error).removeprefix("SUV: "))
        return None


def _as_number(text: str, where: str) -> float:
    """A tag's number, 0 when it is empty."""
    try:
        number = float(text or 0)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DicomError(f"{where} is not a finite number")
    return number


def _check_tracer(slices: Sequence[Dataset], doubts: list[str]) -> None:
    found = {tracer_of(s) for s in slices}
    problem = next((tracer.problem for tracer in found if tracer.problem), "")
    if problem or len(found) > 1:
        raise DicomError(f"SUV: {problem or 'the slices differ in their tracer'}")
    doubts += [tracer.doubt for tracer in found if tracer.doubt]


def _check_suv_type(slices: Sequence[Dataset]) -> None:
    kind = _agreed(slices, "SUVType", optional=True)
    if kind not in ("", "BW"):
        raise DicomError(f"SUV: {tag_name('SUVType')} is {kind}; values by body weight (BW) are needed")


def _check_corrections(slices: Sequence[Dataset]) -> str:
    """The time to which decay is corrected, START or ADMIN."""
    done = set(words_of(slices[0], "CorrectedImage"))
    if not done:
        raise DicomError(f"SUV: {tag_name('CorrectedImage')} is missing")
    if "ATTN" not in done:
        raise DicomError(f"SUV: {tag_name('CorrectedImage')} has no ATTN: the PET is not attenuation corrected")
    decay = _agreed(slices, "DecayCorrection")
    if decay not in ("START", "ADMIN"):
        reason = "the values are not corrected to one moment" if decay == "NONE" else "START or ADMIN was expected"
        raise DicomError(f"SUV: {tag_name('DecayCorrection')} is {decay}: {reason}")
    if not done & {"DECY", "DECAY"}:
        raise DicomError(
            f"SUV: {tag_name('CorrectedImage')} has no DECY, though {tag_name('DecayCorrection')} is {decay}: "
            "the values may not be decay corrected"
        )
    return decay


def _positive(headers: Sequence[Dataset], keyword: str, limits: tuple[float, float], unit: str) -> float:
    """A number that all headers agree on and that lies within its limits."""
    found = {_as_number(required(h, keyword), f"SUV: {tag_name(keyword)}") for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {tag_name(keyword)}")
    number = found.pop()
    if number == 0:
        raise AbsentTagError(f"SUV: {tag_name(keyword)} is zero")
    if not limits[0] <= number <= limits[1]:
        raise DicomError(
            f"SUV: {tag_name(keyword)} is {number:g} {unit}, outside {limits[0]:g} to {limits[1]:g} {unit}; "
            "check its unit"
        )
    return number


def _agreed(headers: Sequence[Dataset], keyword: str, optional: bool = False) -> str:
    found = {(text_of(h, keyword) if optional else required(h, keyword)).upper() for h in headers}
    if len(found) > 1:
        raise DicomError(f"SUV: the slices differ in {tag_name(keyword)}: {', '.join(sorted(found))}")
    return found.pop()
