"""Quality control of whole scans: what is sound passes, in any field of view and noise; what was damaged is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

import phantom
from conftest import SHARED_DATA
from research.measure_localisation import SCENARIOS, draw_scene
from scripts.imaging.geometry import Grid, box_grid, resample, smooth_resample
from scripts.imaging.images import read_image
from scripts.imaging.localise import locate_head_neck
from scripts.imaging.quality import Check, check_case

Scans = tuple[np.ndarray, Grid, np.ndarray, Grid]  # CT in HU, its grid, PET in SUV, its grid
ROI, SPACING = 128, 2.0
# about the scanner and the place, not about damage
ABOUT_PLACE = {"ct_in_plane", "ct_slice", "pet_in_plane", "pet_slice", "head_in_view", "box_in_view", "overlap"}
STS = SHARED_DATA / "sts_petct" / "images"
needs_sts = pytest.mark.skipif(not STS.is_dir(), reason="real PET/CT of legs is not on this machine")
needs_head = pytest.mark.skipif(not (SHARED_DATA / "hn_pet").is_dir(), reason="the real head PET is not here")


def check(scans: Scans) -> dict[str, Check]:
    location = locate_head_neck(*scans, ROI, SPACING)
    return {c.name: c for c in check_case(*scans, location, ROI, SPACING)}


def doubts(scans: Scans) -> dict[str, str]:
    return {n: c.verdict for n, c in check(scans).items() if c.verdict != "ok" and n not in ABOUT_PLACE}


# --- scans ---------------------------------------------------------------------------------------------------------


def counts(suv: np.ndarray, air: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of a PET: with the square root of uptake, and positive in the air with this mean."""
    noisy = suv + 0.09 * np.sqrt(suv) * rng.standard_normal(suv.shape)
    return (noisy.clip(0) + air * ndimage.gaussian_filter(rng.gamma(1.5, 1 / 1.5, suv.shape), 0.6)).astype(np.float32)


def few_counts(suv: np.ndarray, air: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of few counts, by a reconstruction that leaves values below zero."""
    grain = ndimage.gaussian_filter(rng.standard_normal(suv.shape), 0.7)
    return (suv + (air + 0.2 * np.sqrt(suv)) * grain).astype(np.float32)


NECK, HEAD_NECK, CHEST, TRUNK = (-110.0, 70.0), (-110.0, 210.0), (-350.0, 210.0), (-750.0, 210.0)


@cache
def drawn(
    z: tuple[float, float], air: float, body: tuple[tuple[str, float], ...] = (), noise: Callable = counts
) -> Scans:
    """A phantom between two heights of the body in mm: CT 500 mm wide, PET 700 mm."""
    patient = phantom.draw_patient(5, 0)
    patient = dataclasses.replace(patient, body={**patient.body, **dict(body)})
    parts = phantom.build_anatomy({**patient.body, "contrast_hu": 0.0}, patient.lesions)
    ends = patient.pose.to_world(np.array([[0.0, -20.0, z[0]], [0.0, -20.0, z[1]]]))
    rng = np.random.default_rng(0)

    def grid(width: float, mm: float) -> phantom.Grid:
        across, along = round(width / mm), round((ends[1, 2] - ends[0, 2]) / mm)
        x, y = ends.mean(axis=0)[:2] + (across - 1) * mm / 2
        return phantom.Grid((across, across, along), (mm, mm, mm), (float(x), float(y), float(ends[0, 2] + mm / 2)))

    ct_grid, pet_grid = grid(500.0, 4.0), grid(700.0, 5.0)
    ct = phantom.paint_ct(patient, parts, ct_grid, 1).T
    ct = (ct + rng.normal(0, 14, ct.shape)).clip(-1024).astype(np.int16)
    pet = noise((phantom.paint_pet(patient, parts, pet_grid, 6.5).T - 0.01).clip(0), air, rng)
    return ct, Grid(ct.shape, ct_grid.affine), pet, Grid(pet.shape, pet_grid.affine)


def cropped(scans: Scans) -> Scans:
    """CT and PET within a neck: (almost) no air around it."""
    ct, ct_grid, pet, pet_grid = scans
    middle = ct_grid.centre + np.array([0.0, 15.0, 0.0])

    def cut(array: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
        ends = np.sort(np.rint(grid.to_index([middle - 55, middle + 55])).astype(int), axis=0)
        window = (slice(ends[0, 0], ends[1, 0]), slice(ends[0, 1], ends[1, 1]), slice(0, array.shape[2]))
        return array[window], grid.crop(window)

    return *cut(ct, ct_grid), *cut(pet, pet_grid)


def resampled(scans: Scans) -> Scans:
    """The middle of the PET on the CT's grid, zeros around it."""
    ct, ct_grid, pet, pet_grid = scans
    window = (slice(40, 100), slice(40, 100), slice(0, pet.shape[2]))
    return ct, ct_grid, resample(pet[window], pet_grid.crop(window), ct_grid, "linear"), ct_grid


def changed_pet(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Scans], Scans]:
    return lambda scans: (*scans[:2], change(scans[2]), scans[3])


def lower_third_zero(pet: np.ndarray) -> np.ndarray:
    pet = pet.copy()
    pet[:, :, : pet.shape[2] // 3] = 0
    return pet


def moved(scans: Scans, *mm: float) -> Scans:
    affine = scans[3].affine.copy()
    affine[:3, 3] += mm
    return *scans[:3], Grid(scans[3].shape, affine)


def real(patient: str) -> Scans:
    (ct, ct_affine), (pet, pet_affine) = (read_image(STS / patient / f"{patient}__{k}.nii.gz") for k in ("CT", "PT"))
    return ct, Grid(ct.shape, ct_affine), pet, Grid(pet.shape, pet_affine)


def painted(patient: str, air: float) -> Scans:
    """A real CT with a PET painted into its body: muscle, fat and a hot spot in a field of 700 mm."""
    ct, ct_grid = real(patient)[:2]
    mm, rng = np.array([4.07, 4.07, 3.0]), np.random.default_rng(1)
    shape = np.rint([700 / mm[0], 700 / mm[1], np.ptp(ct_grid.bounds[:, 2]) / mm[2]]).astype(int)
    pet_grid = box_grid(ct_grid.centre, shape.tolist(), mm)
    hu = smooth_resample(ct, ct_grid, pet_grid, 2.0, fill=-1000.0)
    body = ndimage.binary_opening(hu > -300)
    suv = np.where(body, np.where(hu < -50, 0.3, 0.8), 0.0).astype(np.float32)
    places = np.argwhere(body & (hu > 0))
    suv[tuple(slice(i - 3, i + 4) for i in places[len(places) // 2])] = 10.0
    return ct, ct_grid, counts(ndimage.gaussian_filter(suv, 2.8 / mm), air, rng), pet_grid


# --- the body in the PET ---------------------------------------------------------------------------------------------


def scanned(z: tuple[float, float], air: float, *further: object) -> Callable[[], Scans]:
    return lambda: drawn(z, air, *further)  # type: ignore[arg-type]


def made_of(change: Callable[[Scans], Scans], z: tuple[float, float] = NECK, air: float = 0.05) -> Callable[[], Scans]:
    return lambda: change(drawn(z, air))


SOUND = [
    *(pytest.param(scanned(NECK, air), id=f"neck_air_{air}") for air in (0.0, 0.01, 0.05, 0.1)),
    *(pytest.param(scanned(HEAD_NECK, air), id=f"head_neck_air_{air}") for air in (0.0, 0.01, 0.05, 0.1)),
    *(pytest.param(scanned(CHEST, air), id=f"chest_air_{air}") for air in (0.0, 0.05)),
    pytest.param(scanned(TRUNK, 0.05, (("bladder", 80.0),)), id="hot_bladder"),
    pytest.param(scanned(HEAD_NECK, 0.05, (("brain", 20.0),)), id="hot_brain"),
    pytest.param(scanned((-60.0, 210.0), 0.1, (("brain", 20.0),)), id="mostly_hot_brain"),
    pytest.param(scanned(HEAD_NECK, 0.03, (), few_counts), id="few_counts_and_negative_values"),
    pytest.param(made_of(cropped), id="no_air"),
    pytest.param(made_of(resampled), id="resampled_with_zeros_around"),
    pytest.param(made_of(changed_pet(lower_third_zero), HEAD_NECK), id="PET_not_scanned_below"),
    pytest.param(made_of(changed_pet(lambda pet: np.where(pet < 0.15, 0, pet)), HEAD_NECK), id="air_set_to_zero"),
]


@pytest.mark.parametrize("make", SOUND)
def test_the_body_is_found_in_any_field_of_view_and_noise(make: Callable[[], Scans]) -> None:
    scans = make()
    checks = check(scans)
    # muscle has 0.79 in this phantom; beside brain and glands the median is higher, in noisy air by the noise
    assert 0.65 < checks["pet_body"].value < 1.2
    assert checks["outline_agreement"].value > 90 and checks["misalignment"].value <= 8
    assert {n: v for n, v in doubts(scans).items() if n != "pet_lowest"} == {}  # negative values are told as such
    ct, ct_grid, pet, pet_grid = scans
    location = locate_head_neck(*scans, ROI, SPACING)
    becquerel = check_case(ct, ct_grid, pet * np.float32(5000), pet_grid, location, ROI, SPACING)
    values = {c.name: c.value for c in becquerel}
    assert values["pet_body"] == pytest.approx(5000 * checks["pet_body"].value, rel=1e-3)
    assert values["outline_agreement"] == pytest.approx(checks["outline_agreement"].value)


@pytest.mark.parametrize("mm", [(60, 0, 0), (0, -60, 0)], ids=["x", "y"])
@pytest.mark.parametrize("make", [case for case in SOUND if case.id != "no_air"])  # there the outlines leave the view
def test_a_pet_that_lies_elsewhere_is_still_rejected(make: Callable[[], Scans], mm: tuple[float, ...]) -> None:
    assert check(moved(make(), *mm))["misalignment"].verdict == "reject"


@needs_sts
@pytest.mark.parametrize("air", [0.01, 0.05])
@pytest.mark.parametrize("patient", ["STS-004", "STS-010", "STS-034"])
def test_a_real_ct_with_a_painted_pet_is_not_taken_for_misaligned(patient: str, air: float) -> None:
    scans = painted(patient, air)
    assert doubts(scans) == {}
    assert 0.5 < check(scans)["pet_body"].value < 0.85
    assert check(moved(scans, 40, 0, 0))["misalignment"].verdict != "ok"


# --- no false alarms ---------------------------------------------------------------------------------------------


def scan(seed: int, index: int, scale: str = "small", view: str = "hospital") -> Scans:
    patient = phantom.draw_patient(seed, index)
    made = phantom.scan_patient(patient, seed, index, scale, view)
    ct_grid, pet_grid = (Grid(g.shape, g.affine) for g in (made.ct_grid, made.pet_grid))
    return made.ct, ct_grid, made.pet.astype(np.float32) * np.float32(made.pet_slope), pet_grid


@pytest.mark.parametrize("index", range(8))
def test_demonstration_phantoms_raise_no_doubt(index: int) -> None:
    assert doubts(scan(0, index)) == {}


def test_phantoms_of_full_scale_raise_no_doubt() -> None:
    assert doubts(scan(3, 1, "full")) == {}


NECKS = [("small", 0), ("small", 2), ("small", 4), ("small", 9), ("full", 2), ("full", 5)]


@pytest.mark.parametrize(("scale", "index"), NECKS)
def test_a_neck_alone_in_noisy_air_raises_no_doubt(scale: str, index: int) -> None:
    """No brain in view, a PET of 0.7 m of which the neck fills little, and positive noise in the air around it."""
    scans = scan(0, index, scale, view="neck")
    assert doubts(scans) == {}
    assert check(scans)["head_in_view"].verdict != "ok"
    assert check(moved(scans, 60, 0, 0))["misalignment"].verdict == "reject"


@pytest.mark.parametrize(
    "name",
    sorted(
        set(SCENARIOS) - {"demonstration", "blank_pet", "blank_pet_arms_up", "injection_site_up", "injection_site_down"}
    ),
)
def test_other_fields_of_view_raise_no_doubt(name: str) -> None:
    scene = draw_scene(SCENARIOS[name], phantom.draw_patient(1, 0), 1, 0)
    assert doubts((scene.ct, scene.ct_grid, scene.pet, scene.pet_grid)) == {}


# --- the neck alone: nothing but a cylinder, in a wide field of view whose air has noise ------------------------------


@cache
def neck_scan(index: int, air: float, width_mm: float = 0.0) -> Scans:
    """A phantom of full scale from the clavicles to below the brain; its PET is 0.7 m wide.

    Args:
        index: of the patient.
        air: mean SUV of the noise that is added.
        width_mm: of the CT, which air fills up; 0: as the hospital scans it.
    """
    made = phantom.scan_patient(phantom.draw_patient(901, index), 901, index, "full", view="neck")
    ct, ct_grid, pet_grid = made.ct, Grid(made.ct_grid.shape, made.ct_grid.affine), made.pet_grid
    more = np.maximum(0, np.ceil((width_mm - ct_grid.extent[:2]) / ct_grid.spacing[:2] / 2)).astype(int)
    ct = np.pad(ct, [(more[0], more[0]), (more[1], more[1]), (0, 0)], constant_values=-1000)
    affine = ct_grid.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [*more, 0]
    pet = counts(made.pet * np.float32(made.pet_slope), air, np.random.default_rng(index))
    return ct, Grid(ct.shape, affine), pet, Grid(pet_grid.shape, pet_grid.affine)


ALIGNMENT = ("misalignment", "outline_agreement", "outline_distortion")
NECKS = [
    pytest.param(0, 0.0, 0.0, id="neck"),
    pytest.param(1, 0.05, 0.0, id="noisy_air"),
    pytest.param(2, 0.1, 0.0, id="noisier_air"),
    pytest.param(3, 0.1, 800.0, id="noisy_air_in_the_widest_field_of_view"),
]


@pytest.mark.parametrize(("index", "air", "width_mm"), NECKS)
def test_a_neck_alone_is_not_rejected(index: int, air: float, width_mm: float) -> None:
    scans = neck_scan(index, air, width_mm)
    checks = check(scans)
    assert [name for name, found in checks.items() if found.verdict == "reject"] == []
    assert {name: checks[name].verdict for name in ALIGNMENT} == dict.fromkeys(ALIGNMENT, "ok")
    share = (scans[0] > -300).mean()
    assert 0.02 < share < 0.15 and 0.4 < checks["pet_body"].value < 1.3, "little body, and yet its uptake is found"


@pytest.mark.parametrize(
    ("damage", "rule", "verdicts"),
    [
        pytest.param(lambda s: moved(s, 60, 0, 0), "misalignment", {"reject"}, id="60_mm_to_the_right"),
        pytest.param(lambda s: moved(s, 0, -60, 0), "misalignment", {"reject"}, id="60_mm_back"),
        pytest.param(lambda s: moved(s, 40, 0, 0), "misalignment", {"warn", "reject"}, id="40_mm_to_the_right"),
        pytest.param(lambda s: moved(s, 0, 0, 60), "misalignment", {"warn", "reject"}, id="60_mm_up"),
        pytest.param(lambda s: place("pet", turned(0, 20))(s), "", {"warn", "reject"}, id="nods_20_degrees"),
        pytest.param(lambda s: place("pet", voxel=np.diag([1.5, 1.5, 1]))(s), "", {"warn", "reject"}, id="pixels_1.5"),
    ],
)
@pytest.mark.parametrize(("index", "air", "width_mm"), NECKS)
def test_a_neck_alone_that_is_misaligned_is_told(
    index: int, air: float, width_mm: float, damage: Callable[[Scans], Scans], rule: str, verdicts: set[str]
) -> None:
    """By the rule named, or by one of those on alignment."""
    checks = check(damage(neck_scan(index, air, width_mm)))
    assert {checks[name].verdict for name in ([rule] if rule else ALIGNMENT)} & verdicts


@needs_sts
@pytest.mark.parametrize("patient", sorted(p.name for p in STS.glob("STS-*")) or ["STS-002"])
def test_real_legs_are_no_head_and_neck_but_sound_scans(patient: str) -> None:
    scans = real(patient)
    assert doubts(scans) == {}
    assert check(scans)["head_in_view"].verdict != "ok"


@needs_head
def test_a_real_head_raises_no_doubt() -> None:
    folder = SHARED_DATA / "hn_pet" / "images" / "QIN-0024"
    (ct, ct_affine), (pet, pet_affine) = (read_image(folder / f"QIN-0024__{kind}.nii.gz") for kind in ("CT", "PT"))
    assert doubts((ct, Grid(ct.shape, ct_affine), pet, Grid(pet.shape, pet_affine))) == {}


# --- damage that changes the answer ---------------------------------------------------------------------------------


def on_ct(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Scans], Scans]:
    return lambda s: (change(s[0].astype(np.float32)), *s[1:])


def on_pet(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Scans], Scans]:
    return lambda s: (*s[:2], change(s[2]), s[3])


def about_centre(grid: Grid, world: np.ndarray, voxel: np.ndarray) -> Grid:
    """A grid whose axes are changed in the world or in the array, and whose middle stays."""
    affine = grid.affine.copy()
    affine[:3, :3] = world @ affine[:3, :3] @ voxel
    affine[:3, 3] = grid.centre - affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2)
    return Grid(grid.shape, affine)


def place(which: str, world: np.ndarray | None = None, voxel: np.ndarray | None = None) -> Callable[[Scans], Scans]:
    world, voxel = np.eye(3) if world is None else world, np.eye(3) if voxel is None else voxel

    def change(s: Scans) -> Scans:
        ct_grid = about_centre(s[1], world, voxel) if which in ("ct", "both") else s[1]
        return s[0], ct_grid, s[2], about_centre(s[3], world, voxel) if which in ("pet", "both") else s[3]

    return change


def turned(axis: int, degrees: float) -> np.ndarray:
    one, other = [k for k in range(3) if k != axis]
    matrix, angle = np.eye(3), np.deg2rad(degrees)
    matrix[[one, other], [one, other]] = np.cos(angle)
    matrix[one, other], matrix[other, one] = -np.sin(angle), np.sin(angle)
    return matrix


def sheared(row: int, column: int, share: float) -> np.ndarray:
    matrix = np.eye(3)
    matrix[row, column] = share
    return matrix


def every_fifth_empty(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[:, :, ::5] = array.min()
    return array


def speckled(array: np.ndarray, share: float, high: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(rng.random(array.shape) < share, rng.uniform(0, high, array.shape), array).astype(np.float32)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        pytest.param(on_ct(lambda ct: ct * 2), "ct_air", id="ct_slope_2"),
        pytest.param(on_ct(lambda ct: ct * 1.25), "ct_air", id="ct_slope_1.25"),
        pytest.param(on_ct(lambda ct: ct * 0.75), "ct_air", id="ct_slope_0.75"),
        pytest.param(on_ct(lambda ct: ct * 0.5), "ct_air", id="ct_slope_0.5"),
        pytest.param(on_ct(lambda ct: ct - 100), "ct_air", id="ct_intercept_100_low"),
        pytest.param(on_ct(lambda ct: ct + 200), "ct_air", id="ct_intercept_200_high"),
        pytest.param(on_ct(lambda ct: ct + 1024), "ct_lowest", id="ct_offset_left_on"),
        pytest.param(on_ct(lambda ct: 2 * ct + 1000), "ct_tissue", id="ct_slope_2_and_air_in_place"),
        pytest.param(on_ct(lambda ct: -ct), "ct_tissue", id="ct_slope_-1"),
        pytest.param(
            on_ct(lambda ct: ct.astype(np.int16).byteswap().astype(np.float32)), "ct_tissue", id="ct_other_byte_order"
        ),
        pytest.param(
            on_ct(lambda ct: ct.astype(np.int16).view(np.uint16).astype(np.float32)), "ct_lowest", id="ct_unsigned"
        ),
        pytest.param(on_ct(lambda ct: speckled(ct, 0.01, 3000)), "ct_speckle", id="ct_1_percent_of_values"),
        pytest.param(on_ct(every_fifth_empty), "ct_blank_slices", id="ct_slices_empty"),
        pytest.param(on_pet(lambda pet: pet * 3), "pet_body", id="pet_slope_3"),
        pytest.param(on_pet(lambda pet: pet * 0.1), "pet_body", id="pet_slope_0.1"),
        pytest.param(on_pet(lambda pet: pet - 0.1), "pet_lowest", id="pet_intercept_0.1_low"),
        pytest.param(on_pet(lambda pet: speckled(pet, 0.01, 30)), "pet_speckle", id="pet_1_percent_of_values"),
        pytest.param(on_pet(every_fifth_empty), "pet_blank_slices", id="pet_slices_empty"),
        pytest.param(place("ct", turned(0, 15)), "outline_distortion", id="ct_nods_15_degrees"),
        pytest.param(place("ct", turned(1, 15)), "outline_distortion", id="ct_leans_15_degrees"),
        pytest.param(place("pet", turned(0, -15)), "outline_distortion", id="pet_nods_15_degrees"),
        pytest.param(place("pet", voxel=np.diag([1.5, 1.5, 1])), "outline_agreement", id="pet_pixels_1.5"),
        pytest.param(place("ct", voxel=sheared(0, 2, 0.05)), "voxel_skew", id="ct_sheared"),
        pytest.param(place("both", voxel=sheared(1, 0, 0.05)), "voxel_skew", id="both_sheared"),
        pytest.param(place("both", voxel=np.diag([1.1, 1, 1])), "pixel_aspect", id="both_pixels_1.1_along_x"),
        pytest.param(place("pet", voxel=np.diag([1, 0.9, 1])), "pixel_aspect", id="pet_pixels_0.9_along_y"),
        pytest.param(lambda s: moved(s, 0, 0, 32), "misalignment", id="pet_moved_32_mm"),
    ],
)
@pytest.mark.parametrize("index", [0, 3])
def test_damage_is_told(damage: Callable[[Scans], Scans], rule: str, index: int) -> None:
    scans = scan(1, index)
    assert doubts(scans) == {}
    assert rule in doubts(damage(scans))
