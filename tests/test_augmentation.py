"""Augmentation of whole batches: against MONAI and scipy case by case, in mm, and from the seeds alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Affine as MonaiAffine
from monai.transforms import Compose, RandFlipd, RandScaleIntensityd, RandShiftIntensityd
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation
from scipy.stats import kstest
from torch.profiler import profile

from conftest import BUNDLE
from scripts.training.augmentation import (
    Affine,
    Augmentation,
    Blur,
    Flip,
    Gamma,
    Misregistration,
    Noise,
    PetNoise,
    Scale,
    Shift,
)

SEEDS = [11, 12, 13, 14]
TRANSFORMS = "train#augmentation#transforms"
CT, PET = 0, 1


def batch(shape=(12, 10, 8), cases: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((cases, 2, *shape), generator=generator)
    return image, torch.randint(0, 3, (cases, 1, *shape), generator=generator).float()


def augmented(transforms, image, seg, seeds=SEEDS, spacing_mm=2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return Augmentation(transforms, spacing_mm)(image.clone(), seg.clone(), seeds)


ALL = [
    Flip(1.0),
    Affine(1.0, (0.17, 0.17, 0.17), (4, 4, 4), (0.1, 0.1, 0.1)),
    Misregistration(1.0, 4.0),
    Blur(1.0, (2, 8), "pet"),
    PetNoise(1.0, 0.25, (4, 8)),
    Scale(1.0, 0.25, "pet"),
    Gamma(1.0, (0.8, 1.25), "pet"),
    Blur(1.0, (8, 30), "ct"),
    Noise(1.0, 0.02, "ct"),
    Shift(1.0, 0.05, "ct"),
]


@pytest.mark.parametrize(
    ("ours", "monai"),
    [
        pytest.param(Flip(0.5), RandFlipd(["image", "seg"], 0.5, 0), id="flip"),
        pytest.param(Flip(1.0, axis=2), RandFlipd(["image", "seg"], 1.0, 2), id="flip_z"),
        pytest.param(Scale(0.5, 0.1), RandScaleIntensityd("image", prob=0.5, factors=0.1), id="scale"),
        pytest.param(Shift(0.5, 0.05), RandShiftIntensityd("image", prob=0.5, offsets=0.05), id="shift"),
    ],
)
def test_one_batch_is_as_monai_case_by_case(ours, monai) -> None:
    """Bit for bit, with the numbers that a pipeline of MONAI transforms draws from the same seed."""
    image, seg = batch(cases=12)
    seeds = list(range(12))
    expected = []
    for one, mask, seed in zip(image, seg, seeds, strict=True):
        pipeline = Compose([Compose([monai])]).set_random_state(seed=seed)
        expected.append(pipeline({"image": one, "seg": mask}))
    got_image, got_seg = augmented([ours], image, seg, seeds)
    assert torch.equal(got_image, torch.stack([item["image"].as_tensor() for item in expected]))
    assert torch.equal(got_seg, torch.stack([torch.as_tensor(item["seg"]) for item in expected]))
    changed = [not torch.equal(a, b) for a, b in zip(got_image, image, strict=True)]
    assert any(changed) and (ours.prob == 1.0 or not all(changed))


@pytest.mark.parametrize("spacing_mm", [1.0, 4.0])
def test_affine_is_as_monai_case_by_case(spacing_mm: float) -> None:
    image, seg = batch((16, 14, 12))
    affine = Affine(1.0, (0.17, 0.1, 0.3), (8, 4, 6), (0.1, 0.2, 0.1))
    got_image, got_seg = augmented([affine], image, seg, spacing_mm=spacing_mm)
    drawing = Augmentation([affine], spacing_mm)
    for case, seed in enumerate(SEEDS):
        rotate, translate, scale = np.reshape(drawing._draw(seed)[0], (3, 3))
        parameters = {
            "rotate_params": rotate.tolist(),
            "translate_params": (translate / spacing_mm).tolist(),
            "scale_params": (1 + scale).tolist(),
        }
        expected, _ = MonaiAffine(**parameters, padding_mode="zeros", mode="bilinear")(image[case])
        torch.testing.assert_close(got_image[case], expected.as_tensor(), atol=2e-5, rtol=0)
        expected, _ = MonaiAffine(**parameters, padding_mode="zeros", mode="nearest")(seg[case])
        assert (got_seg[case] == expected.as_tensor()).float().mean() > 0.99  # the same but for ties
        assert set(got_seg[case].unique().tolist()) <= {0.0, 1.0, 2.0}


@pytest.mark.parametrize("name", ["train.json", "paper.json"])
def test_draws_of_the_affine_are_uniform_and_independent(name: str) -> None:
    """Of the whole range, whatever the transforms before it draw.

    MONAI's ``RandAffined`` is not: in a pipeline with a seed it decides with the number that it then takes for the
    first angle, which for a probability of 0.5 is never positive.
    """
    config = json.loads((BUNDLE / "configs" / name).read_text())
    listed = config["train"]["augmentation"]["transforms"] if "train" in config else config[TRANSFORMS]
    made = ConfigParser(listed).get_parsed_content()
    augmentation, (at,) = Augmentation(made, 2.0), [k for k, one in enumerate(made) if isinstance(one, Affine)]
    drawn = [augmentation._draw(seed) for seed in range(3000)]
    found = np.array([numbers[at] for numbers in drawn if numbers[at] is not None])
    assert len(found) / len(drawn) == pytest.approx(0.5, abs=0.03)
    limits = np.array([0.17] * 3 + [16.0] * 3 + [0.1] * 3)
    for column in (found / limits).T:
        assert kstest(column, "uniform", (-1, 2)).pvalue > 1e-3
    assert np.abs(np.corrcoef(found.T) - np.eye(9)).max() < 0.1
    chosen = np.array([[numbers is not None for numbers in one] for one in drawn])
    assert np.abs(np.corrcoef(chosen.T) - np.eye(len(made))).max() < 0.08


def test_affine_in_mm_is_as_scipy_where_voxels_are_not_cubes() -> None:
    """Rotation, shift and change of size at once, from their formulas."""
    spacing, size = np.array([2.0, 3.0, 4.0]), np.array([32, 24, 20])
    angles, shift, scale = np.array([0.15, -0.1, 0.12]), np.array([7.0, -5.0, 9.0]), np.array([0.08, -0.05, 0.1])
    image = torch.rand((1, 2, *size), generator=torch.Generator().manual_seed(1))
    change = Affine(1.0)
    change.numbers = lambda: [*angles, *shift, *scale]  # type: ignore[method-assign]
    seg = (image[:, :1] > 0.5).float()
    got_image, got_seg = augmented([change], image, seg, [1], spacing)
    rotation = Rotation.from_euler("XYZ", angles).as_matrix()
    matrix = rotation @ np.diag(1 + scale) * spacing / spacing[:, None]  # of voxels
    centre = (size - 1) / 2
    offset = centre + rotation @ shift / spacing - matrix @ centre
    with_air = {"mode": "grid-constant", "cval": 0.0}
    for channel in (CT, PET):
        expected = affine_transform(image[0, channel].numpy(), matrix, offset, order=1, **with_air)
        np.testing.assert_allclose(got_image[0, channel].numpy(), expected, atol=1e-5)
    nearest = affine_transform(seg[0, 0].numpy(), matrix, offset, order=0, **with_air)
    assert (got_seg[0, 0].numpy() == nearest).mean() > 0.999


def test_affine_is_rigid_in_mm_where_voxels_are_not_cubes() -> None:
    """A rotation by 90 degrees about z of a box of 2 x 4 x 4 mm."""
    image, seg = torch.zeros(1, 2, 16, 8, 8), torch.zeros(1, 1, 16, 8, 8)
    seg[0, 0, 11:13, 3:5, 3:5] = 1  # 6 to 10 mm from the centre along x
    rotation = Affine(1.0, (0, 0, np.pi / 2))
    rotation.numbers = lambda: [0, 0, np.pi / 2, 0, 0, 0, 0, 0, 0]  # type: ignore[method-assign]
    turned = augmented([rotation], image, seg, [1], spacing_mm=(2.0, 4.0, 4.0))[1]
    x, y, _ = np.nonzero(turned[0, 0].numpy())
    assert (x - 7.5).mean() == pytest.approx(0, abs=0.5)
    assert abs((y - 3.5).mean()) * 4 == pytest.approx(9, abs=2)
    assert len(x) * 32 == pytest.approx(8 * 32, rel=0.5)


@pytest.mark.parametrize(
    ("spacing_mm", "voxels"), [(2.0, 3), (4.0, 2), ((6.0, 6.0, 6.0), 1), (20.0, 0), (0.6, 10), (0.1, 12)]
)
def test_only_the_ct_moves_and_by_mm(spacing_mm, voxels: int) -> None:
    image, seg = batch()
    move = Misregistration(1.0, 6.0)
    move.numbers = lambda: [6.0, -6.0, 0.0]  # type: ignore[method-assign]
    got_image, got_seg = augmented([move], image, seg, spacing_mm=spacing_mm)
    assert torch.equal(got_image[:, PET], image[:, PET]) and torch.equal(got_seg, seg)
    expected = torch.zeros_like(image[:, CT])
    if voxels < 10:  # the CT is still in the box
        expected[:, voxels:, : 10 - voxels] = image[:, CT, : 12 - voxels, voxels:]
    assert torch.equal(got_image[:, CT], expected)


@pytest.mark.parametrize("spacing_mm", [2.0, 4.0, (2.0, 3.0, 4.0)])
@pytest.mark.parametrize("channel", [CT, PET])
def test_blur_has_its_width_in_mm(spacing_mm, channel: int) -> None:
    image, seg = batch((24, 20, 28))
    blur = Blur(1.0, (8.0, 8.0), ("ct", "pet")[channel])
    got, _ = augmented([blur], image, seg, spacing_mm=spacing_mm)
    sd = 8.0 / 2.3548 / np.broadcast_to(spacing_mm, 3)
    assert torch.equal(got[:, 1 - channel], image[:, 1 - channel])
    inner = (slice(8, -8), slice(8, -8), slice(8, -8))
    for case in range(4):
        expected = gaussian_filter(image[case, channel].numpy(), sd, truncate=6)
        np.testing.assert_allclose(got[case, channel].numpy()[inner], expected[inner], atol=1e-5)
    flat = torch.ones_like(image)
    torch.testing.assert_close(augmented([blur], flat, seg, spacing_mm=spacing_mm)[0], flat)


@pytest.mark.parametrize(("voxels", "share"), [(0.5, 0.0), (1.0, 0.62), (1.5, 0.99), (2.0, 1.0), (4.0, 1.0)], ids=str)
def test_a_narrow_blur_has_less_effect(voxels: float, share: float) -> None:
    """The variance of a blurred point, as a share of that of the Gaussian."""
    point, seg = torch.zeros(1, 2, 25, 25, 25), torch.zeros(1, 1, 25, 25, 25)
    point[..., 12, 12, 12] = 1
    profile = augmented([Blur(1.0, (4 * voxels, 4 * voxels), "pet")], point, seg, [1], 4.0)[0][0, PET].sum((1, 2))
    variance = float((profile * (torch.arange(25) - 12) ** 2).sum())
    assert variance / (voxels / 2.3548) ** 2 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_image_without_contrast_stays_finite(value: float) -> None:
    image, seg = torch.full((4, 2, 12, 10, 8), value), torch.zeros(4, 1, 12, 10, 8)
    got, _ = augmented(ALL, image, seg)
    assert bool(torch.isfinite(got).all())


def test_a_value_that_is_not_a_number_stays_in_its_case() -> None:
    image, seg = batch()
    image[1, PET, 3, 3, 3] = math.nan
    got, _ = augmented(ALL, image, seg)
    assert torch.isnan(got).flatten(1).any(dim=1).tolist() == [False, True, False, False]


def spread_of_noise(noise, level: float, spacing_mm: float = 2.0) -> torch.Tensor:
    """What noise adds to a PET and CT of this level, (B, 2, X, Y, Z)."""
    image, seg = torch.full((2, 2, 32, 32, 32), level), torch.zeros(2, 1, 32, 32, 32)
    image[..., 0:2, :] = 0.0  # air
    got = augmented([noise], image, seg, SEEDS[:2], spacing_mm)[0]
    return (got - image)[..., 2:, :]


def fixed(noise, *numbers: float):
    """The noise of these numbers, with seeds of its own."""
    noise.numbers = lambda: [*numbers, noise.R.randint(2**31)]
    return noise


def test_noise_of_the_ct_is_white_and_of_its_spread() -> None:
    added = spread_of_noise(fixed(Noise(1.0, 0.02, "ct"), 0.02), 0.5)
    assert not added[:, PET].any()
    assert float(added[:, CT].std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float((added[:, CT, 1:] * added[:, CT, :-1]).mean())) < 0.02 * 0.02**2
    assert not torch.equal(added[0, CT], added[1, CT])


@pytest.mark.parametrize("level", [0.02, 0.4])
@pytest.mark.parametrize("spacing_mm", [2.0, 4.0])
def test_noise_of_the_pet_is_a_share_of_the_uptake_and_correlated(level: float, spacing_mm: float) -> None:
    added = spread_of_noise(fixed(PetNoise(1.0, 0.25, (6, 6)), 0.2, 6.0), level, spacing_mm)
    assert not added[:, CT].any()
    assert float(added[:, PET].std()) == pytest.approx(0.2 * level, rel=0.12)
    neighbours = float((added[:, PET, 1:] * added[:, PET, :-1]).mean()) / (0.2 * level) ** 2
    sd = 6.0 / 2.3548 / spacing_mm
    assert neighbours == pytest.approx(np.exp(-1 / (4 * sd**2)), abs=0.12)


def test_noise_of_the_pet_grows_with_the_root_of_the_uptake() -> None:
    image, seg = torch.full((1, 2, 48, 48, 48), 0.1), torch.zeros(1, 1, 48, 48, 48)
    image[:, :, 24:] = 0.9
    noise = fixed(PetNoise(1.0, 0.05, (2, 2)), 0.05, 2.0)
    added = (augmented([noise], image, seg, [3])[0] - image)[0, PET]
    assert float(added[24:].std() / added[:24].std()) == pytest.approx(3.0, rel=0.03)
    assert float(added[24:].std()) == pytest.approx(0.05 * 0.9, rel=0.03)  # the body is what lies above the mean


@pytest.mark.parametrize("noise", [PetNoise(1.0, 3.0, (4, 8)), Noise(1.0, 3.0, "both")])
def test_noise_makes_no_value_negative(noise) -> None:
    got, _ = augmented([noise], *batch())
    assert float(got.min()) == 0.0


def test_gamma_keeps_0_and_1() -> None:
    image, seg = torch.tensor([0.0, 0.25, 1.0, -0.1]).reshape(1, 1, 4, 1, 1).repeat(1, 2, 1, 1, 1), torch.zeros(1)
    got, _ = augmented([Gamma(1.0, (2.0, 2.0), "pet")], image, seg, [1])
    assert got[0, PET].flatten().tolist() == [0.0, 0.0625, 1.0, 0.0]
    assert torch.equal(got[0, CT], image[0, CT])


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2]])
def test_a_case_follows_from_its_seed_alone(order: list[int]) -> None:
    """Whatever the other cases of its batch are, and however often something was drawn before."""
    image, seg = batch()
    augmentation = Augmentation(ALL, 2.0)
    expected = augmentation(image.clone(), seg.clone(), SEEDS)
    got = augmentation(image[order], seg[order], [SEEDS[k] for k in order])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other[order], atol=1e-6, rtol=0)
    assert not torch.equal(augmentation(image[:1].clone(), seg[:1].clone(), [99])[0], expected[0][:1])


def test_without_a_change_a_batch_stays_as_it_is_bit_for_bit() -> None:
    never = [type(change).__new__(type(change)) for change in ALL]
    for change, like in zip(never, ALL, strict=True):
        change.__dict__.update({**like.__dict__, "prob": 0.0})
    for transforms in ([], never):
        image, seg = batch()
        got = Augmentation(transforms, 2.0)(image, seg, SEEDS)
        assert all(torch.equal(*pair) for pair in zip(got, batch(), strict=True))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        pytest.param(lambda: Flip(1.5), "prob of Flip is a number, from 0 to 1; got 1.5", id="prob"),
        pytest.param(lambda: Flip("0.5"), "prob of Flip is a number, from 0 to 1; got '0.5'", id="text"),
        pytest.param(lambda: Flip(0.5, axis=3), "axis of Flip is 0, 1 or 2; got 3", id="axis"),
        pytest.param(lambda: Blur(1.0, (2, 8), "mr"), "channel is one of both, ct, pet; got 'mr'", id="channel"),
        pytest.param(lambda: Blur(1.0, (-2, 8)), "fwhm_mm of Blur is the smallest and the largest", id="negative"),
        pytest.param(lambda: Blur(1.0, (8, 2)), "fwhm_mm of Blur is the smallest and the largest", id="falling"),
        pytest.param(lambda: Gamma(1.0, 1.2), "gamma of Gamma is the smallest and the largest", id="one_gamma"),
        pytest.param(lambda: Gamma(1.0, (0, 1.2)), "gamma of Gamma is .* from 0.01 on; got", id="gamma_of_zero"),
        pytest.param(lambda: Affine(1.0, 0.17), "rotate_range of Affine is a number for each of x, y", id="one_angle"),
        pytest.param(lambda: Affine(1.0, translate_mm=(4, 4)), "translate_mm of Affine is a number for", id="two_axes"),
        pytest.param(lambda: Affine(1.0, scale_range=(1.5, 0, 0)), "from 0 to 0.9; got", id="size_of_zero"),
        pytest.param(lambda: Misregistration(1.0, math.nan), "shift_mm of .* from 0 on; got nan", id="nan"),
        pytest.param(lambda: Scale(1.0, 1.5), "factors of Scale is a number, from 0 to 1; got 1.5", id="factor"),
        pytest.param(lambda: Shift(1.0, -0.1), "offsets of Shift is a number, from 0 on; got -0.1", id="offset"),
        pytest.param(lambda: Noise(1.0, -0.1), "std of Noise is a number, from 0 on", id="std"),
        pytest.param(lambda: PetNoise(1.0, -0.1, (4, 8)), "cv of PetNoise is a number, from 0 on", id="cv"),
        pytest.param(lambda: PetNoise(1.0, 0.1, 4), "fwhm_mm of PetNoise is the smallest", id="fwhm"),
    ],
)
def test_refusals(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_the_paper_has_its_own_augmentation() -> None:
    """Flips, affine and intensity of both channels together; nothing of what train.json adds."""
    changes = json.loads((BUNDLE / "configs" / "paper.json").read_text())["train#augmentation#transforms"]
    assert [change.pop("_target_").rsplit(".", 1)[1] for change in changes] == ["Flip", "Affine", "Scale", "Shift"]
    assert changes == [
        {"prob": 0.5, "axis": 0},
        {"prob": 0.5, "rotate_range": [0.17] * 3, "translate_mm": [16] * 3, "scale_range": [0.1] * 3},
        {"prob": 0.5, "channel": "both", "factors": 0.1},
        {"prob": 0.5, "channel": "both", "offsets": 0.05},
    ]


def test_nothing_is_read_back_from_the_device() -> None:
    """On a GPU the host would wait for it."""
    image, seg = batch()
    augmentation = Augmentation(ALL, 2.0)
    with profile() as profiled:
        augmentation(image, seg, SEEDS)
    called = {event.name for event in profiled.events()}
    assert {"aten::grid_sampler_3d", "aten::normal_"} <= called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
