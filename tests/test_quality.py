"""Quality rules on both sides of their limits, faults put into good cases, and the transform in its chain."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from monai.data.utils import pickle_hashing
from monai.transforms import Compose

from scripts import keys
from scripts.imaging.geometry import Grid
from scripts.imaging.localise import METHOD_CENTRE, METHOD_CT_TOP, METHOD_MASK, METHOD_PET_BRAIN, Location
from scripts.imaging.quality import (
    DEFAULT_LIMITS,
    Check,
    CheckQualityd,
    QualityError,
    check_case,
    check_features,
    checks_from_json,
    checks_to_json,
    fit_voxel_limits,
    merge_limits,
    reject_action,
    verdict,
)
from scripts.imaging.quality_features import feature_distance, fit_feature_statistics
from scripts.imaging.transforms import LoadScansd, LocaliseBoxd, ResampleToBoxd
from scripts.training import sampling

MASK_RULES = {"mask_values", "mask_in_ct", "mask_volume", "mask_uptake"}
SCAN_RULES = set(DEFAULT_LIMITS) - {"airway", "feature_distance"} - MASK_RULES
SHAPE, MM = (72, 60, 64), 5.0
ROI, SPACING = 32, 8.0
CENTRE = np.zeros(3)


class Case:
    """Head on neck on shoulders in blocks of 5 mm, with an airway and a warm brain; the origin is in the middle."""

    def __init__(self) -> None:
        x, y, z = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * MM for n in SHAPE), indexing="ij")
        head = (x / 75) ** 2 + (y / 95) ** 2 + ((z - 60) / 85) ** 2 <= 1
        neck = (x**2 + y**2 <= 55**2) & (z <= 60) & (z > -70)
        trunk = ((x / 150) ** 2 + (y / 90) ** 2 <= 1) & (z <= -70)
        self.airway = (abs(x) < 9) & (abs(y - 10) < 9) & (z < 40)
        self.body = head | neck | trunk
        self.ct = np.where(self.body, 40, -1000).astype(np.int16)
        self.ct[self.airway] = -950
        self.brain = (x / 65) ** 2 + (y / 85) ** 2 + ((z - 70) / 60) ** 2 <= 1
        self.pet = np.where(self.body, 0.8, 0.0).astype(np.float32)
        self.pet[self.brain] = 7.0
        self.pet[(x - 25) ** 2 + y**2 + z**2 <= 15**2] = 12.0
        affine = np.diag([MM, MM, MM, 1.0])
        affine[:3, 3] = -(np.array(SHAPE) - 1) / 2 * MM
        self.ct_grid = self.pet_grid = Grid(SHAPE, affine)
        self.location = Location(CENTRE, METHOD_PET_BRAIN)

    def check(self, **limits: dict[str, float]) -> dict[str, Check]:
        checks = check_case(self.ct, self.ct_grid, self.pet, self.pet_grid, self.location, ROI, SPACING, limits or None)
        return {c.name: c for c in checks}


@pytest.fixture
def case() -> Case:
    return Case()


def with_grid(grid: Grid, scale: tuple[float, float, float] = (1, 1, 1), move: tuple = (0, 0, 0)) -> Grid:
    affine = grid.affine.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] += move
    return Grid(grid.shape, affine)


def set_pet(value: float) -> Callable[[Case], None]:
    return lambda c: c.pet.__setitem__((3, 4, 5), value)


def scale_pet(level: float) -> Callable[[Case], None]:
    return lambda c: setattr(c, "pet", c.pet * np.float32(level / 0.8))


def stretch_pet(contrast: float) -> Callable[[Case], None]:
    return lambda c: setattr(c, "pet", c.pet * np.float32(contrast / 12.0))


def inject(share: float, x: int = 66, width: int = 3) -> Callable[[Case], None]:
    """A hot block with this share of the activity, by default 150 to 165 mm to the right of the middle."""

    def change(c: Case) -> None:
        block = (slice(x, x + width), slice(28, 31), slice(10, 13))
        total = float(c.pet.sum(dtype=np.float64) - c.pet[block].sum(dtype=np.float64))
        c.pet[block] = total * share / (1 - share) / c.pet[block].size

    return change


def clip_ct(lowest: float) -> Callable[[Case], None]:
    return lambda c: np.clip(c.ct, lowest, None, out=c.ct)


def set_tissue(hu: float) -> Callable[[Case], None]:
    return lambda c: c.ct.__setitem__(c.ct > -300, hu)


def shrink_body(share: float) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        c.ct[:] = -1000
        c.ct.reshape(-1)[: round(share * c.ct.size)] = 40

    return change


def move_pet(*mm: float) -> Callable[[Case], None]:
    return lambda c: setattr(c, "pet_grid", with_grid(c.pet_grid, move=mm))


def move_box(x: float) -> Callable[[Case], None]:
    return lambda c: setattr(c, "location", Location(np.array([x, 0.0, 0.0]), METHOD_PET_BRAIN))


def resize(scan: str, *mm: float) -> Callable[[Case], None]:
    scale = tuple(m / MM for m in mm)
    return lambda c: setattr(c, f"{scan}_grid", with_grid(c.ct_grid, scale))


def turn(scan: str, degrees: float) -> Callable[[Case], None]:
    """A scan nods: it turns about the axis from left to right, through the origin."""

    def change(c: Case) -> None:
        angle, matrix = np.deg2rad(degrees), np.eye(4)
        matrix[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        setattr(c, f"{scan}_grid", Grid(SHAPE, matrix @ c.ct_grid.affine))

    return change


def shear(scan: str, degrees: float) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        affine = c.ct_grid.affine.copy()
        affine[:3, 2] += np.tan(np.deg2rad(degrees)) * affine[:3, 1]
        setattr(c, f"{scan}_grid", Grid(SHAPE, affine))

    return change


def scale_ct(slope: float, intercept: float = 0.0) -> Callable[[Case], None]:
    return lambda c: setattr(c, "ct", c.ct.astype(np.float32) * np.float32(slope) + np.float32(intercept))


def pad_ct(value: int, air: int = -1000) -> Callable[[Case], None]:
    """A margin that was not scanned."""

    def change(c: Case) -> None:
        c.ct[c.ct == -1000] = air
        c.ct[:6] = c.ct[-6:] = value

    return change


def speckle(scan: str, share: float, value: float) -> Callable[[Case], None]:
    """Single pixels of every slice, none beside another."""

    def change(c: Case) -> None:
        scans = getattr(c, scan)
        flat = scans[1::2, 1::2].copy()
        at = np.random.default_rng(0).choice(flat[..., 0].size, round(share * scans[..., 0].size), replace=False)
        flat.reshape(-1, flat.shape[2])[at] = value
        scans[1::2, 1::2] = flat

    return change


def empty_slices(scan: str, *index: int) -> Callable[[Case], None]:
    return lambda c: getattr(c, scan).__setitem__((slice(None), slice(None), list(index)), getattr(c, scan).min())


def spoil_ct(value: float) -> Callable[[Case], None]:
    def change(c: Case) -> None:
        c.ct = c.ct.astype(np.float32)
        c.ct[1, 2, 3] = value

    return change


@pytest.mark.parametrize(
    ("change", "rule", "expected"),
    [
        pytest.param(set_pet(0.0), "pet_not_finite", "ok", id="finite"),
        pytest.param(set_pet(np.nan), "pet_not_finite", "reject", id="one_nan"),
        pytest.param(set_pet(np.inf), "pet_not_finite", "reject", id="one_infinite"),
        pytest.param(set_pet(-0.04), "pet_lowest", "ok", id="undershoot"),
        pytest.param(set_pet(-0.06), "pet_lowest", "warn", id="more_than_undershoot"),
        pytest.param(set_pet(-0.6), "pet_lowest", "reject", id="negative"),
        pytest.param(stretch_pet(2.1), "pet_contrast", "ok", id="faint"),
        pytest.param(stretch_pet(1.9), "pet_contrast", "warn", id="too_faint"),
        pytest.param(stretch_pet(0.51), "pet_contrast", "warn", id="almost_blank"),
        pytest.param(stretch_pet(0.49), "pet_contrast", "reject", id="as_good_as_blank"),
        pytest.param(stretch_pet(0.0), "pet_contrast", "reject", id="blank"),
        pytest.param(scale_pet(1.9), "pet_body", "ok", id="high_body"),
        pytest.param(scale_pet(2.1), "pet_body", "warn", id="too_high_body"),
        pytest.param(scale_pet(9.9), "pet_body", "warn", id="other_unit_perhaps"),
        pytest.param(scale_pet(10.1), "pet_body", "reject", id="other_unit"),
        pytest.param(scale_pet(4000.0), "pet_body", "reject", id="becquerel"),
        pytest.param(scale_pet(0.16), "pet_body", "ok", id="low_body"),
        pytest.param(scale_pet(0.14), "pet_body", "warn", id="too_low_body"),
        pytest.param(scale_pet(0.019), "pet_body", "reject", id="scaled_down"),
        pytest.param(set_pet(99.0), "pet_highest", "ok", id="bladder"),
        pytest.param(set_pet(101.0), "pet_highest", "warn", id="very_hot"),
        pytest.param(set_pet(999.0), "pet_highest", "warn", id="extremely_hot"),
        pytest.param(set_pet(1001.0), "pet_highest", "reject", id="impossibly_hot"),
        pytest.param(inject(0.029), "pet_injection_site", "ok", id="warm_arm"),
        pytest.param(inject(0.031), "pet_injection_site", "warn", id="hot_arm"),
        pytest.param(inject(0.099), "pet_injection_site", "warn", id="hotter_arm"),
        pytest.param(inject(0.101), "pet_injection_site", "reject", id="extravasation"),
        pytest.param(inject(0.4, x=3), "pet_injection_site", "reject", id="extravasation_left"),
        pytest.param(inject(0.4, x=35), "pet_injection_site", "ok", id="bladder_at_midline"),
        pytest.param(inject(0.4, x=56), "pet_injection_site", "ok", id="tumour_100_mm_beside"),
        pytest.param(spoil_ct(-1000), "ct_not_finite", "ok", id="finite_ct"),
        pytest.param(spoil_ct(np.nan), "ct_not_finite", "reject", id="ct_nan"),
        pytest.param(spoil_ct(np.inf), "ct_not_finite", "reject", id="ct_infinite"),
        pytest.param(clip_ct(-710), "ct_lowest", "ok", id="lung_window"),
        pytest.param(clip_ct(-690), "ct_lowest", "warn", id="clipped"),
        pytest.param(clip_ct(-310), "ct_lowest", "warn", id="much_clipped"),
        pytest.param(clip_ct(-290), "ct_lowest", "reject", id="no_air"),
        pytest.param(lambda c: np.add(c.ct, 1024, out=c.ct), "ct_lowest", "reject", id="offset_1024"),
        pytest.param(
            lambda c: setattr(c, "ct", ((c.ct + 1000) / 8).astype(np.uint8)), "ct_lowest", "reject", id="grey_levels"
        ),
        pytest.param(lambda c: setattr(c, "ct", (c.ct + 1000) / 2000), "ct_lowest", "reject", id="0_to_1"),
        pytest.param(lambda c: None, "ct_air", "ok", id="air"),
        pytest.param(pad_ct(-3024), "ct_air", "ok", id="padding"),
        pytest.param(pad_ct(-2000, air=-1024), "ct_air", "ok", id="padding_and_cut_air"),
        pytest.param(scale_ct(1, -40), "ct_air", "ok", id="air_a_little_low"),
        pytest.param(scale_ct(1, -70), "ct_air", "warn", id="air_low"),
        pytest.param(scale_ct(1.5), "ct_air", "reject", id="ct_slope_1.5"),
        pytest.param(scale_ct(2), "ct_air", "reject", id="ct_slope_2"),
        pytest.param(scale_ct(0.9), "ct_air", "ok", id="foam"),
        pytest.param(scale_ct(0.8), "ct_air", "warn", id="ct_slope_0.8"),
        pytest.param(scale_ct(0.55), "ct_air", "reject", id="ct_slope_0.55"),
        pytest.param(lambda c: np.maximum(c.ct, -400, out=c.ct), "ct_air", "warn", id="no_air_to_measure"),
        pytest.param(set_tissue(149), "ct_tissue", "ok", id="dense"),
        pytest.param(set_tissue(151), "ct_tissue", "warn", id="too_dense"),
        pytest.param(set_tissue(399), "ct_tissue", "warn", id="much_too_dense"),
        pytest.param(set_tissue(401), "ct_tissue", "reject", id="bone_only"),
        pytest.param(set_tissue(-119), "ct_tissue", "ok", id="fat"),
        pytest.param(set_tissue(-121), "ct_tissue", "warn", id="lighter_than_fat"),
        pytest.param(set_tissue(-249), "ct_tissue", "warn", id="much_lighter_than_fat"),
        pytest.param(set_tissue(-251), "ct_tissue", "reject", id="no_tissue"),
        pytest.param(shrink_body(0.026), "ct_body", "ok", id="small_body"),
        pytest.param(shrink_body(0.024), "ct_body", "warn", id="very_small_body"),
        pytest.param(shrink_body(0.011), "ct_body", "warn", id="tiny_body"),
        pytest.param(shrink_body(0.009), "ct_body", "reject", id="almost_no_body"),
        pytest.param(shrink_body(0.0), "ct_body", "reject", id="no_body"),
        pytest.param(speckle("ct", 0.0008, 3000), "ct_speckle", "ok", id="a_few_ct_pixels"),
        pytest.param(speckle("ct", 0.0015, 3000), "ct_speckle", "warn", id="ct_bright_pixels"),
        pytest.param(speckle("ct", 0.0015, -3000), "ct_speckle", "warn", id="ct_dark_pixels"),
        pytest.param(speckle("pet", 0.0003, 30), "pet_speckle", "ok", id="a_few_pet_pixels"),
        pytest.param(speckle("pet", 0.001, 30), "pet_speckle", "warn", id="pet_hot_pixels"),
        pytest.param(empty_slices("ct", 0, 1, 63), "ct_blank_slices", "ok", id="ct_ends_blank"),
        pytest.param(empty_slices("ct", 30), "ct_blank_slices", "warn", id="ct_slice_lost"),
        pytest.param(empty_slices("pet", 0, 1, 63), "pet_blank_slices", "ok", id="pet_ends_blank"),
        pytest.param(lambda c: c.pet.__setitem__((4, 5, 63), 0.5), "pet_blank_slices", "ok", id="noise_above_the_head"),
        pytest.param(empty_slices("pet", 30, 40), "pet_blank_slices", "warn", id="pet_slices_lost"),
        pytest.param(shear("ct", 0.4), "voxel_skew", "ok", id="rounded_axes"),
        pytest.param(shear("ct", 0.6), "voxel_skew", "warn", id="sheared_ct"),
        pytest.param(shear("pet", 10), "voxel_skew", "warn", id="sheared_pet"),
        pytest.param(turn("ct", 20), "voxel_skew", "ok", id="oblique_is_not_sheared"),
        pytest.param(resize("ct", 1, 1.04, 2), "pixel_aspect", "ok", id="almost_square"),
        pytest.param(resize("ct", 1, 1.06, 2), "pixel_aspect", "warn", id="ct_not_square"),
        pytest.param(resize("pet", 8, 4, 4), "pixel_aspect", "warn", id="pet_not_square"),
        pytest.param(move_pet(135, 0, 0), "overlap", "ok", id="overlap_62_percent"),
        pytest.param(move_pet(150, 0, 0), "overlap", "warn", id="overlap_58_percent"),
        pytest.param(move_pet(275, 0, 0), "overlap", "warn", id="overlap_24_percent"),
        pytest.param(move_pet(300, 0, 0), "overlap", "reject", id="overlap_17_percent"),
        pytest.param(move_pet(0, 0, 900), "overlap", "reject", id="no_overlap"),
        pytest.param(move_box(150), "box_in_view", "ok", id="box_62_percent"),
        pytest.param(move_box(156), "box_in_view", "warn", id="box_58_percent"),
        pytest.param(move_box(240), "box_in_view", "warn", id="box_25_percent"),
        pytest.param(move_box(250), "box_in_view", "reject", id="box_21_percent"),
        pytest.param(resize("ct", 0.49, 0.49, 2), "ct_in_plane", "ok", id="finest_ct"),
        pytest.param(resize("ct", 0.47, 0.47, 2), "ct_in_plane", "warn", id="too_fine_ct"),
        pytest.param(resize("ct", 2.73, 2.73, 3), "ct_in_plane", "ok", id="coarsest_ct"),
        pytest.param(resize("ct", 2.8, 2.8, 3), "ct_in_plane", "warn", id="too_coarse_ct"),
        pytest.param(resize("ct", 14.9, 14.9, 3), "ct_in_plane", "warn", id="much_too_coarse_ct"),
        pytest.param(resize("ct", 15.1, 15.1, 3), "ct_in_plane", "reject", id="useless_ct"),
        pytest.param(resize("ct", 1, 1, 2), "ct_slice", "ok", id="thinnest_slices"),
        pytest.param(resize("ct", 1, 1, 1.9), "ct_slice", "warn", id="too_thin_slices"),
        pytest.param(resize("ct", 1, 1, 3.27), "ct_slice", "ok", id="thickest_slices"),
        pytest.param(resize("ct", 1, 1, 5), "ct_slice", "warn", id="too_thick_slices"),
        pytest.param(resize("ct", 1, 1, 15.1), "ct_slice", "reject", id="useless_slices"),
        pytest.param(resize("pet", 0.98, 0.98, 2.5), "pet_in_plane", "ok", id="finest_pet"),
        pytest.param(resize("pet", 0.9, 0.9, 2.5), "pet_in_plane", "warn", id="too_fine_pet"),
        pytest.param(resize("pet", 5.47, 5.47, 3.27), "pet_in_plane", "ok", id="coarsest_pet"),
        pytest.param(resize("pet", 5.6, 5.6, 3.27), "pet_in_plane", "warn", id="too_coarse_pet"),
        pytest.param(resize("pet", 15.1, 15.1, 3.27), "pet_in_plane", "reject", id="useless_pet"),
        pytest.param(resize("pet", 4, 4, 1.9), "pet_slice", "warn", id="too_thin_pet"),
        pytest.param(resize("pet", 4, 4, 4), "pet_slice", "ok", id="thickest_pet"),
        pytest.param(resize("pet", 4, 4, 5), "pet_slice", "warn", id="too_thick_pet"),
        pytest.param(resize("pet", 4, 4, 15.1), "pet_slice", "reject", id="useless_pet_slices"),
        pytest.param(move_pet(10, 0, 0), "misalignment", "ok", id="head_moved"),
        pytest.param(move_pet(30, 0, 0), "misalignment", "warn", id="shift_30_mm"),
        pytest.param(move_pet(60, 0, 0), "misalignment", "reject", id="shift_60_mm_x"),
        pytest.param(move_pet(0, -60, 0), "misalignment", "reject", id="shift_60_mm_y"),
        pytest.param(move_pet(0, 0, 60), "misalignment", "reject", id="shift_60_mm_z"),
        pytest.param(lambda c: None, "outline_distortion", "ok", id="not_turned"),
        pytest.param(turn("pet", 4), "outline_distortion", "ok", id="nodded_a_little"),
        pytest.param(turn("pet", 15), "outline_distortion", "warn", id="pet_turned"),
        pytest.param(turn("ct", -15), "outline_distortion", "warn", id="ct_turned"),
        pytest.param(resize("pet", 7, 7, 5), "outline_distortion", "warn", id="pet_stretched"),
        pytest.param(lambda c: None, "outline_agreement", "ok", id="same_body"),
        pytest.param(
            lambda c: setattr(c, "pet", np.where(c.body, 0, 1).astype(np.float32)),
            "outline_agreement",
            "reject",
            id="inside_out",
        ),
    ],
)
def test_rule_on_either_side_of_its_limit(case: Case, change: Callable, rule: str, expected: str) -> None:
    change(case)
    assert case.check()[rule].verdict == expected


def test_good_case_has_every_check_and_only_voxel_size_warns(case: Case) -> None:
    checks = case.check()
    assert set(checks) == SCAN_RULES | {"head_in_view"}
    assert {n for n, c in checks.items() if c.verdict != "ok"} == {"ct_in_plane", "ct_slice", "pet_slice"}
    assert verdict(checks.values()) == "warn"


@pytest.mark.parametrize("rule", sorted(SCAN_RULES))
def test_limits_decide(case: Case, rule: str) -> None:
    value = case.check()[rule].value
    wide = {"warn_below": value - 1, "reject_below": value - 2, "warn_above": value + 1, "reject_above": value + 2}
    assert case.check(**{rule: wide})[rule].verdict == "ok"
    assert case.check(**{rule: {**wide, "warn_below": value + 0.5}})[rule].verdict == "warn"
    assert case.check(**{rule: {**wide, "warn_above": value - 0.5}})[rule].verdict == "warn"
    assert case.check(**{rule: {**wide, "reject_below": value + 0.5}})[rule].verdict == "reject"
    assert case.check(**{rule: {**wide, "reject_above": value - 0.5}})[rule].verdict == "reject"


@pytest.mark.parametrize(
    ("method", "flag", "airway_mm", "expected"),
    [
        pytest.param(METHOD_PET_BRAIN, "", 0, "ok", id="brain"),
        pytest.param(METHOD_PET_BRAIN, "the brain is cut off", 200, "warn", id="brain_cut"),
        pytest.param(METHOD_MASK, "", 0, "ok", id="mask"),
        pytest.param(METHOD_CT_TOP, "no brain", 84, "warn", id="neck"),
        pytest.param(METHOD_CT_TOP, "", 84, "ok", id="unflagged_neck"),
        pytest.param(METHOD_CT_TOP, "", 76, "warn", id="short_neck"),
        pytest.param(METHOD_CT_TOP, "no brain", 44, "warn", id="shorter_neck"),
        pytest.param(METHOD_CT_TOP, "no brain", 36, "reject", id="bowel"),
        pytest.param(METHOD_CT_TOP, "no brain", 0, "reject", id="leg"),
        pytest.param(METHOD_CENTRE, "no head in the CT", 200, "reject", id="no_head"),
    ],
)
def test_head_in_view(case: Case, method: str, flag: str, airway_mm: float, expected: str) -> None:
    z = (np.arange(SHAPE[2]) - (SHAPE[2] - 1) / 2) * MM
    case.ct[case.airway] = 40
    open_part = (z < 20) & (z > 20 - airway_mm - 0.1)
    case.ct[case.airway & open_part] = -950
    case.location = Location(CENTRE, method, flag)
    assert case.check()["head_in_view"].verdict == expected


@pytest.mark.parametrize(
    ("axes", "flips"),
    [
        pytest.param((0, 1, 2), (0, 1), id="lps"),
        pytest.param((2, 0, 1), (), id="axes_swapped"),
        pytest.param((1, 2, 0), (2,), id="swapped_and_flipped"),
    ],
)
def test_orientation_of_the_arrays_does_not_matter(case: Case, axes: tuple, flips: tuple) -> None:
    inject(0.05)(case)
    case.location = Location(CENTRE, METHOD_CT_TOP)
    before = case.check()
    turned, affine = np.flip(case.pet.transpose(axes), flips), case.pet_grid.affine.copy()
    affine[:3, :3] = affine[:3, list(axes)]
    for flip in flips:
        affine[:3, 3] += affine[:3, flip] * (turned.shape[flip] - 1)
        affine[:3, flip] *= -1
    case.pet, case.pet_grid = turned, Grid(turned.shape, affine)
    case.ct, case.ct_grid = np.flip(case.ct.transpose(axes), flips), case.pet_grid
    after = case.check()
    assert {n: c.verdict for n, c in after.items()} == {n: c.verdict for n, c in before.items()}
    ground = {"outline_agreement", "outline_distortion"}  # the grid that they are compared on moves by part of a voxel
    assert {n: c.value for n, c in after.items() if n not in ground} == pytest.approx(
        {n: c.value for n, c in before.items() if n not in ground}, abs=1e-6
    )


def test_oblique_scans_are_compared_in_the_world(case: Case) -> None:
    angle = np.deg2rad(15)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    case.ct_grid = case.pet_grid = Grid(SHAPE, turn @ case.ct_grid.affine)
    assert case.check()["misalignment"].value == 0
    assert case.check()["outline_agreement"].value > 90
    case.pet_grid = with_grid(case.pet_grid, move=(60, 0, 0))
    assert case.check()["misalignment"].verdict == "reject"


def test_message_tells_the_shift(case: Case) -> None:
    move_pet(0, 0, 60)(case)
    message = case.check()["misalignment"].message
    assert "x +0, y +0, z +" in message and "are not aligned" in message


def test_message_tells_the_turn(case: Case) -> None:
    turn("pet", 15)(case)
    message = case.check()["outline_distortion"].message
    assert any(f"rotated by {degrees} degrees" in message for degrees in (14, 15, 16))


def test_what_cannot_be_measured_is_a_warning(case: Case) -> None:
    move_pet(0, 0, 900)(case)
    check = case.check()["misalignment"]
    assert (check.value, check.verdict) == (None, "warn")
    assert "cannot be measured" in check.message


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        pytest.param({"pet_max": {"warn_above": 1}}, "no quality rule is called 'pet_max'", id="rule"),
        pytest.param({"pet_body": {"above": 1}}, "'above' is not one of", id="kind"),
    ],
)
def test_unknown_limits_are_errors(limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckQualityd(ROI, limits=limits)


def test_merged_limits_leave_the_defaults_alone() -> None:
    assert merge_limits({"overlap": {"warn_below": 1}})["overlap"]["warn_below"] == 1
    assert DEFAULT_LIMITS["overlap"]["warn_below"] == 60


def test_voxel_limits_follow_the_training_set(case: Case) -> None:
    limits = fit_voxel_limits([(case.ct_grid, case.pet_grid)])
    assert limits["ct_slice"] == pytest.approx({"warn_below": 4.9, "warn_above": 5.1})
    assert verdict(case.check(**limits).values()) == "ok"
    resize("ct", 5, 5, 5.2)(case)
    assert case.check(**limits)["ct_slice"].verdict == "warn"
    with pytest.raises(ValueError, match="at least one training case"):
        fit_voxel_limits([])


def test_json_keeps_the_checks(case: Case) -> None:
    move_pet(0, 0, 900)(case)
    set_pet(np.nan)(case)
    checks = list(case.check().values())
    assert checks_from_json(checks_to_json(checks)) == checks


# --- the transform in its chain -----------------------------------------------------------------------------


def item(case: Case, patient: str = "CHUM-001") -> dict:
    affine = case.ct_grid.affine
    return {keys.PATIENT_ID: patient, keys.CT: (case.ct, affine), keys.PET: (case.pet, affine), keys.MASK: None}


def chain(**settings: object) -> Compose:
    checks = CheckQualityd(ROI, **settings)
    return Compose([LoadScansd(), LocaliseBoxd(ROI, SPACING), checks, ResampleToBoxd(ROI)])


def why(chain: Compose, case: Case) -> str:
    """Why the chain rejects a case."""
    with pytest.raises(RuntimeError) as caught:
        chain(item(case))
    return sampling.reason(caught.value)


def test_transform_adds_checks_that_collate(case: Case) -> None:
    done = chain()(item(case))
    checks = checks_from_json(done[keys.QUALITY])
    assert verdict(checks) == "warn"
    assert done[keys.IMAGE].shape == (2, ROI, ROI, ROI)
    batch = list_data_collate([{keys.QUALITY: done[keys.QUALITY]}] * 2)
    assert [checks_from_json(text) for text in batch[keys.QUALITY]] == [checks, checks]


def test_transform_flags_instead_of_raising(case: Case) -> None:
    set_pet(-3)(case)
    done = chain(on_reject="flag")(item(case))
    assert [c.name for c in checks_from_json(done[keys.QUALITY]) if c.verdict == "reject"] == ["pet_lowest"]


TUMOUR = (25, 0, 0)  # mm, where the PET is hot; the block has 7 voxels of 5 mm along each axis


def mask_at(case: Case, mm: tuple[float, ...] = TUMOUR, value: float = keys.GTVP) -> tuple[np.ndarray, np.ndarray]:
    """A cubic mask around a place, and the CT's affine."""
    index = np.rint(case.ct_grid.to_index(np.array([mm], dtype=float))[0]).astype(int)
    mask = np.zeros(SHAPE, dtype=np.float32 if value % 1 else np.uint8)
    mask[tuple(slice(i - 3, i + 4) for i in index)] = value
    return mask, case.ct_grid.affine


def moved(case: Case, x: float) -> tuple[np.ndarray, np.ndarray]:
    mask, affine = mask_at(case)
    return mask, with_grid(Grid(SHAPE, affine), move=(x, 0, 0)).affine


def inside_out(case: Case) -> tuple[np.ndarray, np.ndarray]:
    mask, affine = mask_at(case)
    return 1 - mask, affine


@pytest.mark.parametrize(
    ("make", "rejected", "said"),
    [
        pytest.param(mask_at, set(), (), id="right"),
        pytest.param(lambda c: mask_at(c, value=keys.GTVN), set(), (), id="node"),
        pytest.param(lambda c: (np.zeros(SHAPE), c.ct_grid.affine), set(), (), id="empty"),
        pytest.param(
            lambda c: mask_at(c, value=255), {"mask_values"}, ("343 voxels", "such as 255"), id="another_coding"
        ),
        pytest.param(lambda c: mask_at(c, value=0.4), {"mask_values"}, ("such as 0.4",), id="interpolated"),
        pytest.param(lambda c: moved(c, 900), {"mask_in_ct", "mask_uptake"}, ("affine",), id="beside_the_ct"),
        pytest.param(lambda c: mask_at(c, (-25, 0, -60)), set(), ("is not on uptake",), id="flipped"),
        pytest.param(lambda c: mask_at(c, (150, 60, 0)), {"mask_uptake"}, ("is not on uptake",), id="in_the_air"),
        pytest.param(inside_out, {"mask_volume", "mask_uptake"}, ("inverted",), id="inside_out"),
    ],
)
def test_masks_are_checked(case: Case, make: Callable, rejected: set, said: tuple[str, ...]) -> None:
    with_mask = item(case) | {keys.MASK: make(case)}
    checks = checks_from_json(chain(on_reject="flag")(with_mask)[keys.QUALITY])
    of_mask = {check.name: check for check in checks if check.name in MASK_RULES}
    assert {name for name, check in of_mask.items() if check.verdict == "reject"} == rejected
    doubts = [check for check in of_mask.values() if check.verdict != "ok"]
    assert bool(doubts) == bool(said)
    assert all(words in " ".join(check.message for check in doubts) for words in said)
    if rejected:
        with pytest.raises(RuntimeError) as caught:
            chain()(with_mask)
        assert all(name in sampling.reason(caught.value) for name in rejected)


def test_without_a_mask_nothing_is_said_of_one(case: Case) -> None:
    assert not MASK_RULES & {check.name for check in checks_from_json(chain()(item(case))[keys.QUALITY])}


def test_values_that_are_no_numbers_count_as_nothing_in_a_case_that_passes_all_the_same(case: Case) -> None:
    case.ct, case.pet = case.ct.astype(np.float32), case.pet.astype(np.float32)
    case.ct[0, 0, 0], case.pet[5, 5, 5] = np.inf, np.nan
    done = chain(on_reject="flag")(item(case))
    rejected = {c.name for c in checks_from_json(done[keys.QUALITY]) if c.verdict == "reject"}
    assert rejected >= {"pet_not_finite", "ct_not_finite"}
    assert torch.isfinite(done[keys.IMAGE]).all()


def test_transform_takes_limits(case: Case) -> None:
    set_pet(-3)(case)
    limits = {"pet_lowest": {"reject_below": -5, "warn_below": -4}}
    assert "pet_lowest" in chain(limits=limits)(item(case))[keys.QUALITY]


def test_advisory_checks_warn_where_they_would_reject(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """A cohort without heads trains; a fault in its values still excludes a case."""
    case.ct[case.airway], case.pet[case.brain] = 40, 0.8
    assert "head_in_view" in why(chain(), case)
    advised = chain(advisory=["head_in_view"])
    checks = {c.name: c for c in checks_from_json(advised(item(case))[keys.QUALITY])}
    assert checks["head_in_view"].verdict == "warn"
    assert "CHUM-001: kept in spite of head_in_view" in caplog.text
    case.pet[0, 0, 0] = -5
    assert "pet_lowest" in why(advised, case) and "head_in_view" not in why(advised, case)


def test_limits_belong_to_what_a_cache_is_keyed_by() -> None:
    keyed = pickle_hashing(CheckQualityd(ROI))
    assert keyed == pickle_hashing(CheckQualityd(ROI, limits={}))
    assert keyed != pickle_hashing(CheckQualityd(ROI, limits={"pet_body": {"reject_above": 9.0}}))


@pytest.mark.parametrize("force", [True, "True", "true", False, "False", "false"])
def test_force_flags_what_is_rejected_without(force: bool | str) -> None:
    assert reject_action(force) == ("flag" if str(force).lower() == "true" else "raise")


@pytest.mark.parametrize("force", ["yes", "flase", "", 1, None])
def test_a_mistyped_force_is_an_error(force: object) -> None:
    with pytest.raises(ValueError, match="true or false"):
        reject_action(force)  # type: ignore[arg-type]


def test_statistics_that_could_not_be_fitted_are_no_warning() -> None:
    check = check_features(np.zeros(4), {"reason": "7 training cases"})
    assert (check.verdict, check.value) == ("ok", None)
    assert "not available" in check.message and "7 training cases" in check.message


def test_transform_refuses_unknown_ways() -> None:
    with pytest.raises(ValueError, match="'raise' or 'flag', got 'stop'"):
        CheckQualityd(ROI, on_reject="stop")
    with pytest.raises(ValueError, match="no quality check is called head"):
        CheckQualityd(ROI, advisory=["head"])


def test_rejected_case_is_a_reported_exclusion(case: Case, tmp_path: Path) -> None:
    bad = Case()
    bad.pet = bad.pet * np.float32(5000)
    datasets = {"training": sampling.CaseDataset([item(case), item(bad, "CHUP-002")], chain())}
    sampling.prepare_datasets(datasets, str(tmp_path), show_progress=False)
    assert [c[keys.PATIENT_ID] for c in datasets["training"].data] == ["CHUM-001"]
    with (tmp_path / "exclusions.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["PatientID"] == "CHUP-002"
    assert "patient CHUP-002: rejected by quality control: pet_body: median PET value of the body" in row["reason"]
    assert "is the PET in Bq/mL" in row["reason"] and "('force', --force)" in row["reason"]


def test_doubts_of_cases_that_are_kept_are_listed(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flipped = item(case, "CHUP-002") | {keys.MASK: mask_at(case, (-25, 0, -60))}
    cached = [sampling.CaseDataset([item(case), flipped], chain(), cache_dir=str(tmp_path / "cache")) for _ in range(2)]
    for dataset in cached:  # the second time from the cache
        sampling.prepare_datasets({"training": dataset}, str(tmp_path), show_progress=False)
        with (tmp_path / "quality.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert not {"ct_slice", "pet_slice"} & {row["check"] for row in rows}, "the cohort sets the range of its voxels"
        (row,) = [row for row in rows if row["check"] == "mask_uptake"]
        assert (row["PatientID"], row["set"]) == ("CHUP-002", "training")
        assert 0.75 < float(row["value"]) < 2 and "is not on uptake" in row["message"]
        assert "of 2 training cases are kept with doubts" in caplog.text and "mask_uptake 1" in caplog.text
        assert not (tmp_path / "exclusions.csv").exists()


def test_quality_error_survives_a_process_boundary() -> None:
    import pickle

    error = QualityError("A", [Check("pet_lowest", -3.0, "SUV", "", "reject", "too low")])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, ValueError) and "patient A" in str(error) and "too low" in str(error)


# --- features ------------------------------------------------------------------------------------------------


def draw_features(count: int, seed: int) -> np.ndarray:
    """Correlated positive features with silent units, as a network has them."""
    mixing = np.random.default_rng(0).normal(size=(6, 60))
    rng = np.random.default_rng(seed)
    features = np.maximum(1.0 + rng.normal(size=(count, 6)) @ mixing + 0.3 * rng.normal(size=(count, 60)), 0)
    features[:, :3] = 0.0
    return features


def test_features_of_new_cases_are_rarely_beyond_the_limit() -> None:
    statistics = fit_feature_statistics(draw_features(200, 1))
    verdicts = [check_features(f, statistics).verdict for f in draw_features(400, 2)]
    assert verdicts.count("warn") + verdicts.count("reject") <= 20
    assert verdicts.count("reject") == 0


@pytest.mark.parametrize(
    ("times", "expected"),
    [(0.98, "ok"), (1.02, "warn"), (2.98, "warn"), (3.02, "reject")],
)
def test_feature_distance_on_either_side_of_its_limit(times: float, expected: str) -> None:
    statistics = fit_feature_statistics(draw_features(200, 1))
    step = np.asarray(statistics["axes"][0]) * statistics["scale"]
    one = feature_distance(np.asarray(statistics["mean"]) + step, statistics)[0]
    far = np.asarray(statistics["mean"]) + step * times * statistics["reference"] / one
    check = check_features(far, statistics)
    assert (check.verdict, check.value) == (expected, pytest.approx(times, rel=1e-3))


def test_feature_distance_equals_the_mahalanobis_distance_of_the_stored_covariance() -> None:
    statistics = fit_feature_statistics(draw_features(80, 1), components=4)
    axes, variances, noise = (np.asarray(statistics[k]) for k in ("axes", "variances", "noise"))
    covariance = axes.T @ np.diag(variances - noise) @ axes + noise * np.eye(60)
    new = draw_features(5, 3)
    deviation = (new - statistics["mean"]) / np.asarray(statistics["scale"])
    expected = np.sqrt(np.einsum("nf,fg,ng->n", deviation, np.linalg.inv(covariance), deviation) / 60)
    np.testing.assert_allclose(feature_distance(new, statistics), expected, rtol=1e-8)


def test_statistics_are_plain_and_live_in_a_checkpoint() -> None:
    statistics = fit_feature_statistics(draw_features(40, 1))
    assert json.loads(json.dumps(statistics)) == statistics
    file = io.BytesIO()
    torch.save({"features": statistics}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["features"] == statistics


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_rejected(bad: float) -> None:
    features = draw_features(40, 1)
    statistics = fit_feature_statistics(features)
    features[0, 5] = bad
    check = check_features(features[0], statistics)
    assert (check.verdict, check.value) == ("reject", None)
    assert "finite" in check.message
    with pytest.raises(ValueError, match="not finite"):
        fit_feature_statistics(features)


@pytest.mark.parametrize("shape", [(9, 4), (20,), (20, 0)])
def test_too_few_features_are_an_error(shape: tuple) -> None:
    with pytest.raises(ValueError, match="10 or more"):
        fit_feature_statistics(np.zeros(shape))


def test_other_features_than_the_statistics_are_an_error() -> None:
    with pytest.raises(ValueError, match="59 features, but the statistics hold 60"):
        check_features(np.zeros(59), fit_feature_statistics(draw_features(20, 1)))


# --- whole cases ------------------------------------------------------------------------------------------


def test_clinical_size_is_quick() -> None:
    ct = np.full((512, 512, 200), -1000, dtype=np.int16, order="F")
    ct[150:350, 180:330] = 40
    pet = np.zeros((256, 256, 200), dtype=np.float32, order="F")
    pet[75:175, 90:165] = 0.8
    pet[100:150, 105:150, 150:] = 8.0
    ct_grid = Grid(ct.shape, np.diag([0.98, 0.98, 1.65, 1.0]))
    pet_grid = Grid(pet.shape, np.diag([1.96, 1.96, 1.65, 1.0]))
    location = Location(ct_grid.centre, METHOD_CT_TOP)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        check_case(ct, ct_grid, pet, pet_grid, location, 128, 2.0)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.4  # 0.06 s on one idle core; the margin is for busy machines
