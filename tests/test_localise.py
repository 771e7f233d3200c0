"""Where the box goes: on drawn patients in every position and with every fault, and on real legs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.imaging.geometry import Grid, box_grid, share_inside
from scripts.imaging.images import read_image
from scripts.imaging.localise import (
    Candidate,
    NoCoarsePass,
    credible_bounds,
    find_anchor,
    locate_head_neck,
    locate_mask,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "sts_petct" / "images"

# The drawn patient, in world mm with the vertex of the head at z = 0.
BRAIN_BASE, BRAIN_CENTRE = -145.0, np.array([0.0, -5.0, -80.0])
TUMOUR = np.array([12.0, 38.0, -195.0])
NODE = np.array([-48.0, 10.0, -240.0])
FIELD = ((-250.0, 250.0), (-180.0, 160.0), (-420.0, 40.0))


def ball(at, centre, radii) -> np.ndarray:
    return sum(((p - c) / r) ** 2 for p, c, r in zip(at, centre, radii, strict=True)) <= 1


def tube(at, centre, radii, z_range) -> np.ndarray:
    flat = sum(((p - c) / r) ** 2 for p, c, r in zip(at[:2], centre, radii, strict=True)) <= 1
    return flat & (at[2] >= z_range[0]) & (at[2] <= z_range[1])


def draw_body(at, arms=False) -> np.ndarray:
    body = ball(at, (0, -2, -92), (80, 100, 92)) | ball(at, (0, 40, -150), (62, 58, 80))
    body |= tube(at, (0, -15), (60, 65), (-300, -120)) | tube(at, (0, -15), (205, 110), (-2000, -290))
    if arms:
        body |= tube(at, (165, 0), (38, 38), (-330, 260)) | tube(at, (-165, 0), (38, 38), (-330, 260))
    return body


def draw_ct(at, arms=False) -> np.ndarray:
    """HU at world positions."""
    hu = np.where(draw_body(at, arms), 40.0, -1000.0)
    hu[(np.abs(at[1] + 150) < 3) & (np.abs(at[0]) < 220)] = -200.0  # the table
    hu[ball(at, BRAIN_CENTRE, (74, 93, 73))] = 1000.0
    hu[ball(at, BRAIN_CENTRE, (66, 85, 65))] = 35.0
    hu[tube(at, (0, -45), (12, 12), (-2000, -150))] = 600.0
    return hu


def draw_pet(at, arms=False, injection=False, brain_suv=7.0, nasopharynx=False) -> np.ndarray:
    """SUV at world positions."""
    suv = np.where(draw_body(at, arms), 0.8, 0.0)
    suv[ball(at, BRAIN_CENTRE, (66, 85, 65))] = brain_suv
    suv[ball(at, (-30, 20, -520), (55, 50, 55))] = 9.0  # heart
    suv[ball(at, (0, 10, -950), (50, 45, 45))] = 40.0  # bladder
    suv[ball(at, TUMOUR, (16, 16, 16))] = 12.0
    suv[ball(at, NODE, (11, 11, 11))] = 8.0
    if injection:
        suv[ball(at, (165, 0, 150), (22, 22, 60))] = 400.0
    if nasopharynx:  # a tumour grown into the base of the skull
        suv[ball(at, (0, 30, -160), (20, 20, 35))] = 15.0
    return suv


def grid_over(field, spacing, axes=(0, 1, 2), signs=(1, 1, 1), tilt_deg=0.0) -> Grid:
    """A grid over a world region whose array axis k runs along world axis ``axes[k]``."""
    low, high = np.array(field, dtype=float).T
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for k, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[axis, k] = sign * spacing[axis]
    angle = np.deg2rad(tilt_deg)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    turn = turn @ np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    shape = tuple(int(n) for n in np.round((high - low) / spacing)[list(axes)])
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def positions(grid: Grid) -> list[np.ndarray]:
    """World x, y and z of every voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return [np.ascontiguousarray(p, dtype=np.float32) for p in np.moveaxis(grid.to_world(index), -1, 0)]


def patient(
    ct_field=FIELD, pet_field=None, ct_spacing=(5, 5, 6), pet_spacing=(6, 6, 6), position=None, arms=False, **pet
):
    """CT, its grid, PET, its grid."""
    ct_grid = grid_over(ct_field, ct_spacing, **(position or {}))
    pet_grid = grid_over(pet_field or ct_field, pet_spacing, **(position or {}))
    rng = np.random.default_rng(0)
    hu = draw_ct(positions(ct_grid), arms) + rng.normal(0, 15, ct_grid.shape)
    suv = draw_pet(positions(pet_grid), arms, **pet) + rng.normal(0, 0.1, pet_grid.shape)
    return hu.astype(np.int16), ct_grid, suv.clip(0).astype(np.float32), pet_grid


def with_top(top: float, bottom: float = FIELD[2][0]):
    return (*FIELD[:2], (bottom, top))


def tumour_share(box: Grid) -> float:
    grid = grid_over(((-120, 120), (-120, 120), (-330, -120)), (3, 3, 3))
    at = positions(grid)
    return share_inside(ball(at, TUMOUR, (16, 16, 16)) | ball(at, NODE, (11, 11, 11)), grid, box)


BRAIN_SEEN = [
    pytest.param({}, "", id="plain"),
    pytest.param({"position": {"signs": (-1, -1, 1)}}, "", id="array_runs_left_and_back"),
    pytest.param({"position": {"signs": (1, 1, -1)}}, "", id="head_at_low_index"),
    pytest.param({"position": {"axes": (2, 0, 1), "signs": (-1, 1, -1)}}, "", id="axes_permuted"),
    pytest.param({"position": {"tilt_deg": 12}}, "", id="oblique"),
    pytest.param({"ct_spacing": (8, 8, 8), "pet_spacing": (8, 8, 8)}, "", id="coarse"),
    pytest.param({"ct_field": with_top(250), "arms": True}, "", id="arms_raised"),
    pytest.param({"ct_field": with_top(250), "arms": True, "injection": True}, "", id="injection_site_above_head"),
    pytest.param({"ct_field": with_top(40, -1150), "ct_spacing": (8, 8, 8)}, "", id="whole_body"),
    pytest.param({"pet_field": with_top(40, -1150)}, "", id="whole_body_PET_with_neck_CT"),
    pytest.param({"brain_suv": 2.5}, "", id="faint_brain"),
    pytest.param({"brain_suv": 16.0}, "", id="hot_brain"),
    pytest.param({"nasopharynx": True}, "", id="tumour_grown_into_the_brain"),
    pytest.param({"ct_field": with_top(-60)}, "cut off", id="brain_cut_off"),
    pytest.param({"ct_field": with_top(-95)}, "cut off", id="brain_cut_below_its_middle"),
    pytest.param({"ct_field": with_top(-150), "pet_field": FIELD}, "outside the CT", id="CT_without_the_brain"),
]


@pytest.mark.parametrize(("scene", "flag"), BRAIN_SEEN)
def test_box_hangs_from_the_brain(scene, flag):
    scans = patient(**scene)
    for roi in ((32, 7.0), (128, 2.0)):
        location = locate_head_neck(*scans, *roi)
        box = box_grid(location.centre_mm, *roi)
        assert location.method == "pet_brain"
        assert flag in location.flag if flag else location.flag == ""
        assert tumour_share(box) == 1.0
        ct_top = scene.get("ct_field", FIELD)[2][1]
        if ct_top > -100:  # otherwise the box was moved down into the CT
            assert box.bounds[1, 2] == pytest.approx(BRAIN_BASE + 30, abs=14)
        x, y, _ = BRAIN_CENTRE
        np.testing.assert_allclose(location.centre_mm[:2], (x, y + 30), atol=8)


def blank(ct, ct_grid, pet, pet_grid):
    return ct, ct_grid, pet * 0, pet_grid


def becquerel(ct, ct_grid, pet, pet_grid):
    return ct, ct_grid, pet * 6500, pet_grid


def not_a_number(ct, ct_grid, pet, pet_grid):
    pet[::2, ::2, ::2] = np.nan
    return ct, ct_grid, pet, pet_grid


def apart(ct, ct_grid, pet, pet_grid):
    affine = pet_grid.affine.copy()
    affine[2, 3] += 2000
    return ct, ct_grid, pet, Grid(pet_grid.shape, affine)


NO_BRAIN = [
    pytest.param({}, blank, "no signal", id="blank_PET"),
    pytest.param({}, becquerel, "not in SUV", id="becquerel_per_ml"),
    pytest.param({}, not_a_number, "not finite numbers", id="not_a_number"),
    pytest.param({}, apart, "do not overlap", id="no_overlap"),
    pytest.param({"brain_suv": 0.9}, None, "no plausible brain", id="brain_without_uptake"),
    pytest.param({"ct_field": with_top(250), "arms": True}, becquerel, "not in SUV", id="arms_raised_becquerel"),
    pytest.param({"position": {"tilt_deg": 10}}, blank, "no signal", id="oblique_blank"),
    pytest.param({"position": {"signs": (-1, 1, -1)}}, blank, "no signal", id="head_at_low_index_blank"),
    pytest.param({"ct_spacing": (8, 8, 8), "pet_spacing": (8, 8, 8)}, blank, "no signal", id="coarse_blank"),
    pytest.param({"ct_field": with_top(40, -1150)}, blank, "no signal", id="whole_body_blank"),
    pytest.param({"ct_field": with_top(-135)}, None, "cut off", id="scan_starts_below_the_brain"),
    pytest.param({"ct_field": with_top(-160, -260)}, None, "covers", id="short_field_of_view"),
]


@pytest.mark.parametrize(("scene", "fault", "flag"), NO_BRAIN)
def test_fallback_says_so_and_still_holds_the_tumour(scene, fault, flag):
    scans = patient(**scene)
    location = locate_head_neck(*(fault(*scans) if fault else scans), 32, 7.0)
    assert location.method == "ct_body_top"
    assert flag in location.flag
    assert tumour_share(box_grid(location.centre_mm, 32, 7.0)) == 1.0


@pytest.mark.parametrize(
    ("hu", "flag"), [pytest.param(-1000, "no body", id="air"), pytest.param("finger", "no head", id="too_little")]
)
def test_scan_without_a_head_is_used_from_its_centre(hu, flag):
    ct, ct_grid, pet, pet_grid = patient()
    ct[:] = -1000
    centre = ct_grid.centre
    if hu == "finger":
        ct[ball(positions(ct_grid), (60, 20, -200), (30, 30, 60))] = 40
        centre = np.array([60.0, 20.0, -200.0])
    location = locate_head_neck(ct, ct_grid, pet * 0, pet_grid, 32, 7.0)
    assert (location.method, flag in location.flag) == ("scan_centre", True)
    box = box_grid(location.centre_mm, 32, 7.0)
    assert (box.bounds[0] < centre).all()
    assert (centre < box.bounds[1]).all()


def test_large_hot_tumour_without_a_skull_is_no_brain():
    """A sarcoma of a thigh has a brain's size, shape and uptake; only the bone around it is missing."""
    grid = grid_over(((-200, 200), (-120, 120), (-300, 300)), (4, 4, 5))
    at = positions(grid)
    thighs = tube(at, (95, 0), (85, 85), (-400, 400)) | tube(at, (-95, 0), (85, 85), (-400, 400))
    ct, pet = np.where(thighs, 40.0, -1000.0), np.where(thighs, 0.6, 0.0)
    ct[tube(at, (95, 0), (14, 14), (-400, 400)) | tube(at, (-95, 0), (14, 14), (-400, 400))] = 900
    pet[ball(at, (100, 5, 150), (60, 65, 70))] = 9.0
    location = locate_head_neck(ct, grid, pet, grid, 32, 7.0)
    assert location.method != "pet_brain"
    assert "no plausible brain" in location.flag


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_box_stays_within_the_scan(axis):
    """Wherever the tumour is, the box takes real voxels rather than padding as long as there are any."""
    grid = grid_over(((-300, 300), (-250, 250), (-400, 400)), (5, 5, 5))
    mask = np.zeros(grid.shape, dtype=np.uint8)
    edge = [slice(40, 44)] * 3
    edge[axis] = slice(0, 3)
    mask[tuple(edge)] = 1
    location = locate_mask(mask, grid, 32, 7.0)
    box = box_grid(location.centre_mm, 32, 7.0)
    assert box.bounds[0, axis] == pytest.approx(grid.bounds[0, axis])
    assert share_inside(mask, grid, box) == 1.0


@pytest.mark.parametrize("position", [{}, {"signs": (-1, -1, 1)}, {"axes": (2, 0, 1)}, {"tilt_deg": 12}])
def test_mask_is_centred(position):
    grid = grid_over(((-300, 300), (-300, 300), (-300, 300)), (4, 5, 6), **position)
    location = locate_mask(ball(positions(grid), (40, -30, 55), (30, 20, 45)).astype(np.uint8), grid, 32, 7.0)
    assert (location.method, location.flag) == ("mask", "")
    np.testing.assert_allclose(location.centre_mm, (40, -30, 55), atol=4)


def test_mask_that_does_not_fit_is_told():
    grid = grid_over(((-300, 300), (-300, 300), (-300, 300)), (5, 5, 5))
    mask = ball(positions(grid), (0, 0, 0), (60, 60, 200)).astype(np.uint8)
    location = locate_mask(mask, grid, 32, 7.0)
    assert "does not fit" in location.flag
    share = share_inside(mask, grid, box_grid(location.centre_mm, 32, 7.0))
    assert f"{100 * share:.1f} %" in location.flag


def test_empty_mask_is_refused():
    grid = Grid((8, 8, 8), np.eye(4))
    with pytest.raises(ValueError, match="empty"):
        locate_mask(np.zeros(grid.shape), grid, 4, 1.0)


def test_real_legs_fall_back():
    """Sarcomas of the extremities: hot, large, and no brain anywhere."""
    if not REAL.is_dir():
        pytest.skip(f"no real images at {REAL}")
    for folder in sorted(REAL.iterdir()):
        ct, ct_affine = read_image(folder / f"{folder.name}__CT.nii.gz")
        pet, pet_affine = read_image(folder / f"{folder.name}__PT.nii.gz")
        grid = Grid(ct.shape, ct_affine)
        location = locate_head_neck(ct, grid, pet, Grid(pet.shape, pet_affine), 32, 7.0)
        assert location.method != "pet_brain", folder.name
        assert "no plausible brain" in location.flag, folder.name
        mask, _ = read_image(folder / f"{folder.name}.nii.gz")
        assert share_inside(mask, grid, box_grid(location.centre_mm, 32, 7.0)) > 0.99, folder.name


# --- what the network proposes -------------------------------------------------------------------------------


def candidate(centre, size_mm=30.0, mass_ml=10.0, confidence=0.95) -> Candidate:
    half = np.full(3, size_mm / 2)
    return Candidate(np.stack([np.asarray(centre, dtype=float) - half, np.asarray(centre) + half]), mass_ml, confidence)


@pytest.fixture(scope="module")
def scans():
    """A whole body: nothing of the scan's edge moves the box."""
    return patient(ct_field=with_top(40, -1150), ct_spacing=(10, 10, 10), pet_spacing=(10, 10, 10))


NOT_BELIEVED = [
    pytest.param([], id="nothing_seen"),
    pytest.param([candidate(BRAIN_CENTRE, 60, 200)], id="brain"),
    pytest.param([candidate((0, 10, -950), 90, 300)], id="bladder"),
    pytest.param([candidate((190, 0, -200), 40, 100)], id="injection_site_at_the_elbow"),
    pytest.param([candidate(TUMOUR, mass_ml=0.5)], id="tiny"),
    pytest.param([candidate(TUMOUR, confidence=0.6)], id="uncertain"),
]


@pytest.mark.parametrize("seen", NOT_BELIEVED)
def test_what_cannot_be_a_tumour_of_the_neck_moves_nothing(scans, seen):
    rules = locate_head_neck(*scans, 32, 7.0)
    both = locate_head_neck(*scans, 32, 7.0, proposer=lambda *_: seen)
    assert (both.method, both.flag) == ("pet_brain", "the network finds no tumour there")
    np.testing.assert_array_equal(both.centre_mm, rules.centre_mm)


@pytest.mark.parametrize(
    ("seen", "centre"),
    [
        pytest.param([candidate(TUMOUR)], TUMOUR, id="one"),
        pytest.param([candidate(TUMOUR), candidate(NODE)], (TUMOUR + NODE) / 2, id="tumour_and_node"),
        pytest.param(
            [candidate(BRAIN_CENTRE, 60, 200), candidate(TUMOUR), candidate((0, 10, -950), 90, 300)],
            TUMOUR,
            id="among_brain_and_bladder",
        ),
        pytest.param(
            [candidate((0, 0, -380), mass_ml=9), candidate(TUMOUR), candidate((0, 30, -150), mass_ml=8)],
            (TUMOUR + np.array([0.0, 30.0, -150.0])) / 2,
            id="what_does_not_fit_beside_heavier_ones",
        ),
    ],
)
def test_box_is_centred_on_the_tumour_that_the_network_sees(scans, seen, centre):
    location = locate_head_neck(*scans, 32, 7.0, proposer=lambda *_: seen)
    assert (location.method, location.rule, location.flag) == ("pet_brain+network", "pet_brain", "")
    np.testing.assert_allclose(
        location.centre_mm, centre, atol=15.1
    )  # the box's corners, not the middles, are averaged


def test_network_is_asked_about_the_neck_only(scans):
    asked = []
    locate_head_neck(*scans, 32, 7.0, proposer=lambda *arguments: asked.append(arguments[4]) or [])
    low, high = credible_bounds(asked[0])
    for tumour in (TUMOUR, NODE):
        assert (low < tumour).all()
        assert (tumour < high).all()
    assert high[2] < BRAIN_CENTRE[2]
    assert low[2] > -500


def test_network_helps_where_the_head_is_cut_off():
    ct, ct_grid, pet, pet_grid = patient(ct_field=with_top(-135))
    location = locate_head_neck(ct, ct_grid, pet, pet_grid, 16, 8.0, proposer=lambda *_: [candidate(NODE)])
    assert location.method == "ct_body_top+network"
    assert "cut off" in location.flag
    np.testing.assert_allclose(location.centre_mm, NODE, atol=1)


def test_anywhere_is_believed_where_no_anatomy_is_known():
    ct, ct_grid, pet, pet_grid = patient()
    asked = []

    def propose(*arguments):
        asked.append(credible_bounds(arguments[4]))
        return [candidate((-120, -60, -100))]

    location = locate_head_neck(np.full_like(ct, -1000), ct_grid, pet, pet_grid, 16, 8.0, proposer=propose)
    assert (location.method, asked) == ("scan_centre+network", [None])
    assert "no body" in location.flag
    np.testing.assert_allclose(location.centre_mm, (-120, -60, -100), atol=1)


@pytest.mark.parametrize("fault", [blank, becquerel, not_a_number, apart])
def test_network_is_not_shown_a_faulty_pet(fault):
    def never(*_):
        raise AssertionError("the network was asked")

    location = locate_head_neck(*fault(*patient()), 32, 7.0, proposer=never)
    assert location.method == "ct_body_top"


def test_network_that_need_not_look_changes_nothing(scans):
    location = locate_head_neck(*scans, 32, 7.0, proposer=lambda *_: None)
    assert (location.method, location.flag) == ("pet_brain", "")


def test_anything_but_a_whole_brain_is_doubtful(scans):
    assert not find_anchor(*scans).doubtful
    assert find_anchor(*patient(ct_field=with_top(-60))).doubtful
    assert find_anchor(*patient(brain_suv=0.9)).doubtful


def test_absent_pass_is_told(scans):
    def absent(*_):
        raise NoCoarsePass("no weights at model.pt")

    location = locate_head_neck(*scans, 32, 7.0, proposer=absent)
    assert (location.method, location.flag) == ("pet_brain", "no coarse pass: no weights at model.pt")
