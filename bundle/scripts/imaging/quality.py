"""Quality control of a case before it enters the network, and of the network's features.

In the paper, cases with negative SUV and with extravasation were removed by hand; here rules do it, in training
(reported exclusions) and in prediction. Each rule measures one quantity and compares it with its limits in
:data:`DEFAULT_LIMITS`. A case of clinical size takes some hundredths of a second.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform

from scripts import keys
from scripts.imaging.geometry import Grid, box_grid
from scripts.imaging.localise import METHOD_CENTRE, METHOD_MASK, METHOD_PET_BRAIN, Location, method_words
from scripts.imaging.quality_features import feature_distance
from scripts.imaging.quality_measures import (
    LATERAL_MM,
    airway_mm,
    grid_shape,
    measure_ct,
    measure_mask,
    measure_pet,
    overlap,
    shared_by,
    voxel_sizes,
)
from scripts.imaging.quality_outlines import best_shift, body_outlines, distortion
from scripts.imaging.transforms import CT_FILL, PET_FILL, array_and_grid

logger = logging.getLogger(__name__)

OK, WARN, REJECT = "ok", "warn", "reject"
VERDICTS = (OK, WARN, REJECT)  # from the best to the worst
RAISE, FLAG = "raise", "flag"  # actions for a rejected case
SCANS = (keys.CT, keys.PET)
HEAD_IN_VIEW = "head_in_view"
HEADERS = "headers"
VOXEL_SIZES = ("ct_in_plane", "ct_slice", "pet_in_plane", "pet_slice")  # replaced by the range of a training set

Limits = Mapping[str, Mapping[str, float]]

# A value beyond ``warn_*`` should be looked at; one beyond ``reject_*`` is unsuitable for the network.
DEFAULT_LIMITS: dict[str, dict[str, float]] = {
    # --- PET values -----------------------------------------------------------------------------------------
    "pet_not_finite": {"reject_above": 0},  # resampling would propagate a single NaN to the whole box
    # resampling and filtering give values some hundredths below zero; the paper removed two negative cases of HECKTOR
    "pet_lowest": {"warn_below": -0.05, "reject_below": -0.5},
    # muscle has 0.6 to 0.9 SUV, blood 1.5 to 2: a range below 0.5 shows no contrast; tonsils and brain always reach 2
    "pet_contrast": {"warn_below": 2.0, "reject_below": 0.5},
    # by definition the mean SUV of a body is about 1; 0.35 to 1.3 in 21 real scans and in the phantoms; Bq/mL are 1000
    # to 5000 times as large, an 8-bit scale or raw counts 10 times and more, SUV with the weight in kg 1/1000. A scale
    # that is wrong by a factor of 2 is within the limits in every second scan.
    "pet_body": {"warn_below": 0.15, "reject_below": 0.02, "warn_above": 2.0, "reject_above": 10.0},
    # tumours have less than 50, a full bladder less than 100; at 1000 the whole dose would be in a few millilitres
    "pet_highest": {"warn_above": 100.0, "reject_above": 1000.0},
    # 1 % of the dose left in an arm is about 5 % of the activity of a head and neck scan; an axillary node of 20 ml and
    # SUV 10 is below 2 %
    "pet_injection_site": {"warn_above": 3.0, "reject_above": 10.0},
    # at most 0.02 % in 21 real scans and in the phantoms, with few counts too
    "pet_speckle": {"warn_above": 0.05},
    "pet_blank_slices": {"warn_above": 0},
    # --- CT values ------------------------------------------------------------------------------------------
    "ct_not_finite": {"reject_above": 0},
    # air is -1000 HU and part of every scan; 0 if the offset of 1024 remains, or for raw values or grey levels
    "ct_lowest": {"warn_above": -700.0, "reject_above": -300.0},
    # -995 to -885 HU (with foam) in 20 real scans, -1024 if clipped; -2000 if the scale is wrong by a factor of 2
    "ct_air": {"warn_below": -1050.0, "reject_below": -1400.0, "warn_above": -850.0, "reject_above": -600.0},
    # fat is -100, muscle 50 HU: medians of -26 to 50 in 20 real scans and in the phantoms
    "ct_tissue": {"warn_below": -120.0, "reject_below": -250.0, "warn_above": 150.0, "reject_above": 400.0},
    # a head has 4 % of the largest field of view (700 mm)
    "ct_body": {"warn_below": 2.5, "reject_below": 1.0},
    # none in 20 real scans, at most 0.04 % in the phantoms
    "ct_speckle": {"warn_above": 0.1},
    "ct_blank_slices": {"warn_above": 0},
    # --- what is in view ----------------------------------------------------------------------------------------
    # different extents are common (HECKTOR); scans without overlap occur
    "overlap": {"warn_below": 60.0, "reject_below": 20.0},
    # 95 % for the shortest scans of HECKTOR (290 mm) and a box of 256 mm
    "box_in_view": {"warn_below": 60.0, "reject_below": 25.0},
    # air within the body from nose to bronchi: 130 mm and more in every phantom, at most 64 mm (bowel) in 20 real
    # scans of legs and hips
    "airway": {"warn_below": 80.0, "reject_below": 40.0},
    # --- voxel sizes: HECKTOR's CT from 0.49x0.49x2 to 2.73x2.73x3 mm, PET from 0.98x0.98x2.5 to 5.47x5.47x3.27 mm, 2 %
    # of rounding allowed. Both come from one scanner, hence one range of slices (2 to 3.27 mm). A node of 15 mm is a
    # single voxel where images are rejected. :func:`fit_voxel_limits` gives the range of a training set instead.
    "ct_in_plane": {"warn_below": 0.48, "warn_above": 2.78, "reject_above": 15.0},
    "ct_slice": {"warn_below": 1.96, "warn_above": 3.34, "reject_above": 15.0},
    "pet_in_plane": {"warn_below": 0.96, "warn_above": 5.58, "reject_above": 15.0},
    "pet_slice": {"warn_below": 1.96, "warn_above": 4.08, "reject_above": 15.0},
    # --- shape of the voxels: scanners have square pixels, and axes at right angles unless the gantry is tilted -------
    "voxel_skew": {"warn_above": 0.5},
    "pixel_aspect": {"warn_above": 1.05},
    # --- CT against PET: measured in steps of 8 mm; motion of the head between the scans is about 10 mm -----------
    "misalignment": {"warn_above": 20.0, "reject_above": 40.0},
    # equal outlines have 100 %, chance about 0; at least 95 % in the phantoms, 78 % in legs with little uptake in fat,
    # 50 to 91 % where the PET is upside down
    "outline_agreement": {"warn_below": 75.0, "reject_below": 50.0},
    # at most 5 mm in head and neck phantoms, 9 mm in legs; one turned by 12 degrees has 10 mm
    "outline_distortion": {"warn_above": 10.0},
    # --- the tumour's mask, where there is one: in training and evaluation --------------------------------------------
    "mask_values": {"reject_above": 0},
    # a mask without its affine, or of another patient, is partly or completely outside the CT
    "mask_in_ct": {"warn_below": 99.5, "reject_below": 50.0},
    # at most 106 ml in 262 phantoms, 818 ml in 20 sarcomas; an inverted mask has 10 litres and more
    "mask_volume": {"warn_above": 500.0, "reject_above": 5000.0},
    # at least 2.25 in the same; median 1.6 in masks of the phantoms flipped left-right, 0.55 flipped front-back; a
    # tumour on FDG-PET has more uptake than the body
    "mask_uptake": {"warn_below": 2.0, "reject_below": 0.75},
    # --- the network's features, in units of the 99th percentile of training cases that were held out --------------
    "feature_distance": {"warn_above": 1.0, "reject_above": 3.0},
}

# name -> unit, quantity, meaning of a value beyond the limits
_RULES: dict[str, tuple[str, str, str]] = {
    "pet_not_finite": (
        "voxels",
        "PET values that are not finite numbers",
        "write the PET again without them; forced, they count as no uptake",
    ),
    "pet_lowest": ("SUV", "lowest PET value", "SUV cannot be negative: look at how it was computed"),
    "pet_contrast": ("SUV", "highest minus lowest PET value", "the PET has (almost) no signal"),
    "pet_body": (
        "SUV",
        "median PET value of the body",
        "about 1 in SUV: is the PET in Bq/mL, counts or another scale?",
    ),
    "pet_highest": ("SUV", "highest PET value", "implausible for SUV: look for an injection site, or another unit"),
    "pet_injection_site": (
        "%",
        f"activity in hot spots more than {LATERAL_MM:g} mm from the midline",
        "extravasation at an injection site? Then SUV is too low everywhere else",
    ),
    "pet_speckle": (
        "%",
        "share of PET pixels far above all their neighbours",
        "sharper than a scanner's resolution: damaged values?",
    ),
    "pet_blank_slices": (
        "slices",
        "PET slices of a single value between others",
        "were they lost? Export the PET again",
    ),
    "ct_not_finite": (
        "voxels",
        "CT values that are not finite numbers",
        "write the CT again without them; forced, they count as air",
    ),
    "ct_lowest": (
        "HU",
        "lowest CT value",
        "no air: is the CT in HU (offset of 1024 not applied, grey levels, windowed)?",
    ),
    "ct_air": ("HU", "most frequent CT value of air", "air is -1000 HU: is the CT's scale (slope, intercept) right?"),
    "ct_tissue": ("HU", "median CT value of the body", "not that of soft tissue: is the CT in HU?"),
    "ct_body": ("%", "share of the CT that is denser than lung", "no body: is the CT in HU, and does it show a body?"),
    "ct_speckle": (
        "%",
        "share of CT pixels far above or below all their neighbours",
        "more than noise: damaged values?",
    ),
    "ct_blank_slices": ("slices", "CT slices of a single value between others", "were they lost? Export the CT again"),
    "overlap": (
        "%",
        "share of the smaller scan inside the larger one",
        "CT and PET show (almost) different parts of the body",
    ),
    "box_in_view": ("%", "share of the network's box that both CT and PET show", "much of it would be empty"),
    "airway": ("mm", "length of the airway in the box", "no neck: this seems to be another part of the body"),
    "ct_in_plane": ("mm", "CT voxel size in the slice", "beyond the training range"),
    "ct_slice": ("mm", "CT slice spacing", "beyond the training range"),
    "pet_in_plane": ("mm", "PET voxel size in the slice", "beyond the training range"),
    "pet_slice": ("mm", "PET slice spacing", "beyond the training range"),
    "voxel_skew": (
        "degrees",
        "deviation of the voxels' axes from right angles",
        "a tilted gantry, or a damaged position (affine)?",
    ),
    "pixel_aspect": (
        "x",
        "longer side of a pixel in the slice over the shorter one",
        "scanners have square pixels: a damaged position (affine)?",
    ),
    "misalignment": ("mm", "shift between the body's outlines in CT and PET", "CT and PET are not aligned"),
    "outline_agreement": (
        "%",
        "agreement of the body's outlines in CT and PET, after that shift",
        "is one of them rotated, flipped, or of another patient?",
    ),
    "outline_distortion": (
        "mm",
        "difference of the body's outlines by rotation or scaling",
        "is one of them rotated, or are its voxel sizes wrong?",
    ),
    "mask_values": (
        "voxels",
        "mask values other than 0, 1 (GTVp) and 2 (GTVn)",
        "write the mask again with these values",
    ),
    "mask_in_ct": ("%", "share of the tumour's mask inside the CT", "is its position (affine) that of this CT?"),
    "mask_volume": ("ml", "volume of the tumour's mask", "is it inverted, or not of a tumour?"),
    "mask_uptake": (
        "x",
        "mean PET value in the tumour's mask against the body's median",
        "the mask is not on uptake: is it flipped, shifted, or of another patient?",
    ),
    "feature_distance": (
        "x",
        "distance of the network's features from the training cases, in their 99th percentiles",
        "unlike the training cases",
    ),
}


@dataclass(frozen=True)
class Check:
    """The result of one rule for one case."""

    name: str  # of the rule, a key of DEFAULT_LIMITS, or head_in_view or headers
    value: float | str | None  # the measured value; a text for categories, None where it cannot be measured
    unit: str  # of the value, "" for text
    limit: str  # the limits of warning and rejection, as text
    verdict: str  # ok, warn or reject
    message: str  # the finding and what to do


class QualityError(ValueError):
    """A rejected case: the patient, the findings, and what to do."""

    def __init__(self, patient: str = "?", checks: Sequence[Check] = ()) -> None:
        super().__init__(patient, checks)
        self.patient, self.checks = patient, list(checks)

    def __str__(self) -> str:
        faults = "; ".join(f"{c.name}: {c.message}" for c in self.checks if c.verdict == REJECT)
        return (
            f"patient {self.patient}: rejected by quality control: {faults}; correct the scans or exclude the case; "
            "a prediction of it can be forced ('force', --force)"
        )


class CheckQualityd(Transform):
    """Check a case between :class:`.LocaliseBoxd` and :class:`.ResampleToBoxd`.

    Sets ``quality``: all checks as a JSON text (see :func:`checks_to_json`), which can be collated. A mask is checked
    too, where there is one. Each text of ``doubts`` (of the headers of the scans) becomes a warning ``headers``.

    Args:
        roi_size: voxels of the box along x, y, z, as for the other transforms.
        on_reject: ``"raise"`` raises for a rejected case, so that it is listed as an exclusion; ``"flag"`` keeps it,
            with its checks, and replaces values that are not finite by air and no uptake.
        limits: limits that differ from :data:`DEFAULT_LIMITS`, by name.
        advisory: names of checks that warn instead of rejecting, e.g. those on the field of view in training, where
            the box is centred on the mask.

    Raises:
        QualityError: when a rule rejects the case and ``on_reject`` is ``"raise"``.
        ValueError: when ``on_reject`` or the name of a limit or of a check is not known.
    """

    def __init__(
        self,
        roi_size: int | Sequence[int],
        on_reject: str = "raise",
        limits: Limits | None = None,
        advisory: Sequence[str] = (),
    ) -> None:
        if on_reject not in (RAISE, FLAG):
            raise ValueError(f"on_reject is {RAISE!r} or {FLAG!r}, got {on_reject!r}")
        unknown = sorted(set(advisory) - {*DEFAULT_LIMITS, HEAD_IN_VIEW})
        if unknown:
            raise ValueError(f"no quality check is called {', '.join(unknown)}")
        self.roi_size, self.on_reject, self.advisory = roi_size, on_reject, tuple(advisory)
        self.limits = merge_limits(limits)  # all limits, since caches are keyed by the attributes of transforms

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the case."""
        d = dict(data)
        affine = np.asarray(torch.as_tensor(d[keys.BOX_AFFINE]), dtype=float)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        half = (np.broadcast_to(np.asarray(self.roi_size, dtype=float), 3) - 1) / 2
        centre = affine[:3, :3] @ half + affine[:3, 3]
        location = Location(centre, d[keys.CROP_METHOD], d[keys.CROP_FLAG])
        (ct, ct_grid), (pet, pet_grid) = (array_and_grid(d[key]) for key in SCANS)
        checks = check_case(ct, ct_grid, pet, pet_grid, location, self.roi_size, spacing.tolist(), self.limits)
        if d.get(keys.MASK) is not None:
            body = next(float(check.value or 0) for check in checks if check.name == "pet_body")
            checks += check_mask(*array_and_grid(d[keys.MASK]), ct_grid, pet, pet_grid, body, self.limits)
        checks += [Check(HEADERS, None, "", "", WARN, doubt) for doubt in d.pop(keys.DOUBTS, [])]
        checks = [self._advise(check, d) for check in checks]
        if self.on_reject == "raise" and verdict(checks) == REJECT:
            raise QualityError(str(d.get(keys.PATIENT_ID, "?")), checks)
        d[keys.QUALITY] = checks_to_json(checks)
        counts = {check.name: check.value for check in checks}
        for key, name, fill in zip(SCANS, ("ct_not_finite", "pet_not_finite"), (CT_FILL, PET_FILL), strict=True):
            if counts[name]:  # a rejected case that is kept
                d[key] = torch.nan_to_num(d[key], nan=fill, posinf=fill, neginf=fill)
        return d

    def _advise(self, check: Check, case: Mapping[Hashable, Any]) -> Check:
        """The check, as a warning if it is advisory; what it would have rejected is logged."""
        if check.verdict != REJECT or check.name not in self.advisory:
            return check
        logger.warning("patient %s: kept in spite of %s: %s", case.get(keys.PATIENT_ID, "?"), check.name, check.message)
        return replace(check, verdict=WARN)


def check_case(
    ct: np.ndarray,
    ct_grid: Grid,
    pet: np.ndarray,
    pet_grid: Grid,
    location: Location,
    roi_size: int | Sequence[int],
    spacing_mm: float | Sequence[float],
    limits: Limits | None = None,
) -> list[Check]:
    """Apply every rule to a case.

    The scans and the size of the box as for :func:`.locate_head_neck`, which gives the ``location`` of the box;
    ``limits``: those that differ from :data:`DEFAULT_LIMITS`, by name.

    Returns:
        One check per rule, in the order of :data:`DEFAULT_LIMITS`.
    """
    table = merge_limits(limits)
    box = box_grid(location.centre_mm, roi_size, spacing_mm)
    ct_values, ct_thin = measure_ct(ct, ct_grid)
    pet_values, pet_thin = measure_pet(pet, pet_grid, ct_thin)
    outlines = body_outlines(ct_thin, pet_thin, pet_values["pet_body"], box)
    shift, agreement = (None, None) if outlines is None else best_shift(*outlines)
    distorted, turn = (None, 0.0) if outlines is None or shift is None else distortion(*outlines, shift)
    values: dict[str, float | None] = {
        **pet_values,
        **ct_values,
        "overlap": 100 * overlap(ct_grid, pet_grid),
        "box_in_view": 100 * shared_by(box, ct_grid, pet_grid),
        **voxel_sizes(ct_grid, pet_grid),
        **grid_shape(ct_grid, pet_grid),
        "misalignment": None if shift is None else float(np.linalg.norm(shift)),
        "outline_agreement": None if agreement is None else 100 * agreement,
        "outline_distortion": distorted,
    }
    checks = {name: _judge(name, value, table) for name, value in values.items()}
    if shift is not None and shift.any():
        words = ", ".join(f"{axis} {mm:+.0f}" for axis, mm in zip("xyz", shift, strict=True))
        checks["misalignment"] = _tell(checks["misalignment"], f"PET by {words} mm against the CT")
    if checks["outline_distortion"].verdict != OK and distorted is not None:
        checks["outline_distortion"] = _tell(checks["outline_distortion"], f"rotated by {turn:.0f} degrees")
    head = _check_head(location, ct, ct_grid, box, table)
    order = [*table]
    return sorted([*checks.values(), head], key=lambda c: order.index("airway" if c is head else c.name))


def check_mask(
    mask: np.ndarray,
    grid: Grid,
    ct_grid: Grid,
    pet: np.ndarray,
    pet_grid: Grid,
    body: float,
    limits: Limits | None = None,
) -> list[Check]:
    """Apply the rules for a tumour's mask (see :func:`scripts.imaging.quality_measures.measure_mask`).

    The scans and ``limits`` as for :func:`check_case`.

    Args:
        mask: (X, Y, Z), supposedly of 0, 1 (GTVp) and 2 (GTVn).
        grid: its grid.
        ct_grid: the CT's.
        pet: (X, Y, Z).
        pet_grid: its grid.
        body: median PET value of the body, the rule ``pet_body``.
        limits: see there.
    """
    values, strange = measure_mask(mask, grid, ct_grid, pet, pet_grid, body)
    checks = [_judge(name, value, merge_limits(limits)) for name, value in values.items()]
    if strange:
        checks[0] = _tell(checks[0], f"such as {', '.join(f'{value:g}' for value in strange)}")
    return checks


def reject_action(force: bool | str) -> str:
    """``"flag"`` if a rejected case shall be predicted all the same (also as text), otherwise ``"raise"``.

    Raises:
        ValueError: any other value.

    Example:
        >>> reject_action(False), reject_action("true")
        ('raise', 'flag')
    """
    actions = {"true": FLAG, "false": RAISE}
    if str(force).lower() not in actions:
        raise ValueError(f"force is true or false, got {force!r}")
    return actions[str(force).lower()]


def verdict(checks: Iterable[Check]) -> str:
    """The worst verdict of some checks.

    Example:
        >>> verdict([]), verdict([Check("ct_slice", 5.0, "mm", "", "warn", "")])
        ('ok', 'warn')
    """
    return max((c.verdict for c in checks), key=VERDICTS.index, default=OK)


def merge_limits(limits: Limits | None) -> dict[str, dict[str, float]]:
    """:data:`DEFAULT_LIMITS` with the limits of some rules replaced.

    Raises:
        ValueError: when a rule or a kind of limit is not known.

    Example:
        >>> merge_limits({"misalignment": {"warn_above": 10.0}})["misalignment"]
        {'warn_above': 10.0, 'reject_above': 40.0}
    """
    table = copy.deepcopy(DEFAULT_LIMITS)
    kinds = ("warn_below", "reject_below", "warn_above", "reject_above")
    for name, values in (limits or {}).items():
        if name not in table:
            raise ValueError(f"no quality rule is called {name!r}: choose from {', '.join(table)}")
        for kind, number in values.items():
            if kind not in kinds:
                raise ValueError(f"limits of {name}: {kind!r} is not one of {', '.join(kinds)}")
            table[name][kind] = float(number)
    return table


def fit_voxel_limits(grids: Iterable[tuple[Grid, Grid]]) -> dict[str, dict[str, float]]:
    """Limits of the voxel sizes from the CT and PET grids of a training set, for ``limits`` of :func:`check_case`.

    Returns:
        ``warn_below`` and ``warn_above`` of the four rules on voxel sizes, 2 % beyond the smallest and the largest.

    Raises:
        ValueError: when there is no case.
    """
    sizes = [voxel_sizes(ct_grid, pet_grid) for ct_grid, pet_grid in grids]
    if not sizes:
        raise ValueError("the range of voxel sizes needs at least one training case")
    ranges = {name: [size[name] for size in sizes] for name in sizes[0]}
    return {name: {"warn_below": 0.98 * min(r), "warn_above": 1.02 * max(r)} for name, r in ranges.items()}


def checks_to_json(checks: Iterable[Check]) -> str:
    """Checks as a JSON text: a list of objects with the fields of :class:`Check`."""
    return json.dumps([asdict(c) for c in checks], allow_nan=False)


def checks_from_json(text: str) -> list[Check]:
    """The checks of :func:`checks_to_json`."""
    return [Check(**fields) for fields in json.loads(text)]


# --- the network's features ----------------------------------------------------------------------------------------


def check_features(features: np.ndarray, statistics: Mapping[str, Any], limits: Limits | None = None) -> Check:
    """Check the distance of a case's features from those of the training cases.

    Args:
        features: (F,) of one case, from the network whose statistics these are.
        statistics: of :func:`.fit_feature_statistics`, or ``{"reason": why there are none}``.
        limits: limits that differ from :data:`DEFAULT_LIMITS`, by name.

    Returns:
        The check ``feature_distance``: the distance in units of the held-out training cases' 99th percentile. Without
        statistics it is ``ok``, without a value, and its message says ``not available``.
    """
    if "reason" in statistics:
        unknown = _judge("feature_distance", None, merge_limits(limits))
        return replace(unknown, verdict=OK, message=f"not available: {statistics['reason']}")
    distance = float(feature_distance(np.asarray(features).reshape(1, -1), statistics)[0])
    value = distance / statistics["reference"]
    if not np.isfinite(value):
        fault = _judge("feature_distance", None, merge_limits(limits))
        return Check(fault.name, None, fault.unit, fault.limit, REJECT, "features that are not finite numbers")
    return _judge("feature_distance", value, merge_limits(limits))


# --- verdicts ------------------------------------------------------------------------------------------------------


def _judge(name: str, value: float | None, table: Limits) -> Check:
    """Compare a value with its limits."""
    limits, (unit, quantity, fault) = table[name], _RULES[name]
    said = _range(limits, unit)
    if value is None:
        return Check(name, None, unit, said, WARN, f"{quantity} cannot be measured")
    result = OK
    for kind in (WARN, REJECT):
        if value < limits.get(f"{kind}_below", -np.inf) or value > limits.get(f"{kind}_above", np.inf):
            result = kind
    number = float(f"{value:.4g}")
    message = f"{quantity}: {number:g} {unit}" + ("" if result == OK else f" ({said}): {fault}")
    return Check(name, number, unit, said, result, message)


def _range(limits: Mapping[str, float], unit: str) -> str:
    """Limits in words, e.g. ``at least 60 %, rejected below 20``."""

    def bounds(kind: str, words: tuple[str, str]) -> str:
        pairs = ((words[0], limits.get(f"{kind}_below")), (words[1], limits.get(f"{kind}_above")))
        return " and ".join(f"{word} {number:g}" for word, number in pairs if number is not None)

    accepted, refused = bounds(WARN, ("at least", "at most")), bounds(REJECT, ("below", "above"))
    refused = f"rejected {refused}" if refused else ""
    return f"{', '.join(filter(None, (accepted, refused)))} {unit}"


def _tell(check: Check, more: str) -> Check:
    """A check with an addition to its message."""
    return replace(check, message=f"{check.message} ({more})")


def _check_head(location: Location, ct: np.ndarray, ct_grid: Grid, box: Grid, table: Limits) -> Check:
    """Whether the head and neck are in view: by the tumour's mask, by the brain, otherwise by the airway in the CT.

    A neck has air inside it over most of its length, unlike legs and arms.
    """
    limit = f"a tumour mask, a brain, or an airway of {_range(table['airway'], 'mm')}"
    found = f"box {method_words(location.method)}" + (f" ({location.flag})" if location.flag else "")
    if location.rule in (METHOD_MASK, METHOD_PET_BRAIN):
        return Check(HEAD_IN_VIEW, location.method, "", limit, WARN if location.flag else OK, found)
    airway = _judge("airway", airway_mm(ct, ct_grid, box), table)
    result = REJECT if location.rule == METHOD_CENTRE else airway.verdict
    if result == OK and location.flag:  # no brain, or the head cut off, and yet a neck
        result = WARN
    message = f"{'head or neck outside the field of view? ' if result == REJECT else ''}{found}; {airway.message}"
    return Check(HEAD_IN_VIEW, location.method, "", limit, result, message)
