"""The coarse pass: what it shows to a network, what it makes of the answer, and where its weights come from."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from conftest import BUNDLE
from scripts.imaging.geometry import Grid, box_grid
from scripts.imaging.localise import METHOD_PET_BRAIN, Anchor, NoCoarsePass
from scripts.model.ensemble import FoldEnsemble, save_weights
from scripts.model.networks import MultitaskNet
from scripts.prediction import coarse
from scripts.prediction.coarse import CoarsePass, find_candidates, look_grid, see_tumour

SPACING = 8.0
FIXED = {"tasks": ["seg"], "clinical_features": ["age", "gender", "m_stage"]} | {
    "roi_size": [32, 32, 32],
    "spacing_mm": SPACING,
    "ct_window": [-1000, 1000],
    "pet_window": [0, 25],
    "bn_eps": 1e-5,
}
BY_MAXIMUM = {**FIXED, "pet_window": None}
TUMOUR, BLADDER = np.array([30.0, 10.0, -200.0]), np.array([0.0, 0.0, -900.0])


class HotSpots(torch.nn.Module):
    """Takes for tumour what has at least ``share`` of the PET channel's range, and keeps what it was shown."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.shown: list[torch.Tensor] = []

    def tumour_probability(self, image: torch.Tensor) -> torch.Tensor:
        self.shown.append(torch.as_tensor(image).clone())
        return (torch.as_tensor(image)[:, 1:] >= self.share).float() * 0.9


def scans(length_mm=400.0, spots=((TUMOUR, 12.0),), turn=(1, 1, 1), pet_shift=(0.0, 0.0, 0.0)):
    """A cylinder of water that ends at z = 0, with hot cubes of 32 mm; CT, its grid, PET, its grid."""
    grid = box_grid((0, 0, -length_mm / 2), (40, 36, round(length_mm / 8)), 8.0)
    affine = grid.affine @ np.diag([*turn, 1.0])
    affine[:3, 3] = grid.to_world([(n - 1) * (s < 0) for n, s in zip(grid.shape, turn, strict=True)])
    grid = Grid(grid.shape, affine)
    at = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    body = np.hypot(at[..., 0], at[..., 1]) < 100
    pet = np.where(body, 1.0, 0.0).astype(np.float32)
    for centre, suv in spots:
        pet[(np.abs(at - centre) <= 16).all(axis=-1)] = suv
    moved = affine.copy()
    moved[:3, 3] += pet_shift
    return np.where(body, 0, -1000).astype(np.int16), grid, pet, Grid(grid.shape, moved)


def centres(network, settings, case):
    grid, probability = see_tumour(network, settings, whole(case), *case)
    return [c.centre_mm for c in find_candidates(probability, grid)]


def whole(case) -> Grid:
    return look_grid(case[1], case[3], SPACING)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, id="one_window_and_a_bit"),
        pytest.param({"length_mm": 96.0, "spots": (((30.0, 10.0, -50.0), 12.0),)}, id="shorter_than_a_window"),
        pytest.param({"turn": (-1, 1, -1)}, id="flipped"),
        pytest.param({"length_mm": 1000.0}, id="whole_body"),
    ],
)
def test_hot_spot_is_found_where_it_is(case):
    (centre,) = centres(HotSpots(0.3), FIXED, scans(**case))
    np.testing.assert_allclose(centre, case.get("spots", ((TUMOUR, 0),))[0][0], atol=SPACING)


@pytest.mark.parametrize("settings", [FIXED, BY_MAXIMUM], ids=["fixed_window", "minimum_to_maximum"])
def test_heat_elsewhere_does_not_hide_a_tumour(settings):
    """An injection site far away scales neither its own windows beyond a box's range nor the tumour's at all."""
    case = scans(1000.0, ((TUMOUR, 12.0), (BLADDER, 400.0)))
    found = centres(HotSpots(0.35), settings, case)
    assert any(np.abs(centre - TUMOUR).max() <= SPACING for centre in found)


def test_network_is_shown_what_it_was_trained_on():
    network = HotSpots(0.3)
    case = scans(length_mm=1000.0)
    see_tumour(network, FIXED, whole(case), *case)
    for image in network.shown:
        assert image.shape == (1, 2, 32, 32, 32)
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
    ct, pet = torch.cat(network.shown).unbind(dim=1)
    assert float(ct.min()) == 0  # air
    # box by box as for the network: water is the highest HU of these, and the tumour 12 SUV of a fixed 25
    assert float(pet.max()) == pytest.approx(12 / 25, rel=0.2)
    assert float(ct.max()) == 1


def test_windows_of_air_are_not_shown():
    network = HotSpots(0.3)
    ct, ct_grid, pet, pet_grid = scans()
    look = look_grid(ct_grid, pet_grid, SPACING)
    see_tumour(network, FIXED, look, np.full_like(ct, -1000), ct_grid, pet, pet_grid)
    assert network.shown == []


@pytest.mark.parametrize("length_mm", [96.0, 264.0])
def test_windows_fit_the_network(length_mm):
    """Odd fields of view are filled up with air to edges that the real network can halve four times."""
    network = MultitaskNet(tasks=["seg"]).eval()
    case = scans(length_mm)
    grid, probability = see_tumour(network, {**FIXED, "roi_size": 32}, whole(case), *case)
    assert probability.shape == grid.shape
    assert np.isfinite(probability).all()


def test_common_field_of_view():
    ct, pet = box_grid((0, 0, 0), 10, 10.0), box_grid((0, 0, 60), 10, 8.0)
    assert look_grid(ct, pet, 5.0).bounds.tolist() == [[-40, -40, 20], [40, 40, 50]]
    near = np.array([[-500, -5, 30], [500, 5, 40]], dtype=float)
    assert look_grid(ct, ct, 5.0, near).bounds.tolist() == [[-50, -45, -10], [50, 45, 50]]
    with pytest.raises(NoCoarsePass, match="no part in common"):
        look_grid(ct, box_grid((0, 0, 500), 10, 8.0), 5.0)


def test_candidates_are_measured():
    grid = box_grid((0, 0, 0), 16, 10.0)
    probability = np.zeros(grid.shape, dtype=np.float32)
    probability[2:4, 2:4, 2:4] = 0.75
    probability[10:14, 10, 10] = [0.51, 1.0, 0.51, 0.5]
    heavy, light = find_candidates(probability, grid)
    assert (heavy.mass_ml, heavy.confidence) == (pytest.approx(6.0), 0.75)
    assert heavy.bounds_mm.tolist() == [[-60, -60, -60], [-40, -40, -40]]
    assert (light.mass_ml, light.confidence) == (pytest.approx(2.02), 1.0)
    assert find_candidates(probability * 0, grid) == []


# a field of view of one window: the real network answers once
SMALL = scans(96.0)


@pytest.fixture
def model(tmp_path):
    """A file of two folds."""
    torch.manual_seed(0)
    settings = {**FIXED, "tasks": ["seg", "hpv", "surv"]}
    ensemble = FoldEnsemble(MultitaskNet(clinical_features=3), settings).eval()
    ensemble.resize(2)
    save_weights(ensemble, tmp_path / "model.pt")
    return tmp_path / "model.pt", ensemble


def test_weights_are_the_first_fold_and_read_once(model, monkeypatch):
    path, ensemble = model
    coarse_pass, shown = CoarsePass(path), []

    def keep(network, *arguments):
        shown.append(network)
        return see_tumour(network, *arguments)

    monkeypatch.setattr(coarse, "see_tumour", keep)
    coarse_pass(*SMALL)
    image = torch.rand(1, 2, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(shown[0].tumour_probability(image), ensemble.folds[0].tumour_probability(image))
    path.unlink()
    coarse_pass(*SMALL)
    assert shown[1] is shown[0]


@pytest.mark.parametrize(("coarse_mm", "used_mm"), [(4.0, 8.0), (16.0, 16.0)])
def test_voxels_are_no_smaller_than_the_networks(model, monkeypatch, coarse_mm, used_mm):
    path, _ = model
    seen = []
    monkeypatch.setattr(
        coarse, "see_tumour", lambda _n, _s, look, *_: seen.append(look) or (look, np.zeros(look.shape))
    )
    CoarsePass(path, spacing_mm=coarse_mm)(*scans())
    np.testing.assert_allclose(seen[0].spacing, used_mm)


def test_cache_knows_new_weights(model):
    """A pickled pass depends on its parameters and its file alone, not on whether it has looked at a scan."""
    path, _ = model
    fresh, used = CoarsePass(path), CoarsePass(path)
    used(*SMALL)
    assert pickle.dumps(fresh) == pickle.dumps(used)
    assert len(pickle.dumps(used)) < 2000
    before = pickle.dumps(used)
    assert pickle.dumps(pickle.loads(before)) == before
    os.utime(path, (1, 1))
    assert pickle.dumps(used) != before


WHOLE_BRAIN = Anchor(np.array([0.0, 0.0, -60.0]), METHOD_PET_BRAIN)
CUT_BRAIN = Anchor(np.array([0.0, 0.0, -60.0]), METHOD_PET_BRAIN, "the brain is cut off")


@pytest.mark.parametrize(
    ("when", "anchor", "looks"),
    [
        ("in_doubt", WHOLE_BRAIN, False),
        ("in_doubt", CUT_BRAIN, True),
        ("in_doubt", None, True),
        ("always", WHOLE_BRAIN, True),
    ],
)
def test_looks_when_it_is_asked_to(model, monkeypatch, when, anchor, looks):
    path, _ = model
    seen = []
    monkeypatch.setattr(
        coarse, "see_tumour", lambda _n, _s, look, *_: seen.append(look) or (look, np.zeros(look.shape))
    )
    answer = CoarsePass(path, when)(*scans(1000.0), anchor)
    assert answer == ([] if looks else None)
    if looks and anchor is not None:  # the neck alone, and what lies about it
        assert seen[0].bounds[0, 2] == pytest.approx(-60 - 256 - 40, abs=SPACING)
    assert len(seen) == int(looks)


def test_other_times_are_refused():
    with pytest.raises(ValueError, match="sometimes"):
        CoarsePass("model.pt", when="sometimes")


def test_no_pass_without_segmentation(tmp_path):
    settings = {**FIXED, "tasks": ["surv"]}
    save_weights(FoldEnsemble(MultitaskNet(3, tasks=["surv"]), settings), tmp_path / "model.pt")
    with pytest.raises(NoCoarsePass, match="not trained for segmentation"):
        CoarsePass(tmp_path / "model.pt")(*scans())


# --- the configs -----------------------------------------------------------------------------------------------


def parsed(*files: str, **changes) -> object:
    """The proposer in a config of the bundle."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in files])
    parser.update(changes)
    preprocessing = "preprocessing" if "inference.json" in files else "validate#preprocessing"
    return parser.get_parsed_content(preprocessing).transforms[1].proposer


def test_inference_and_evaluation_look_alike_and_training_not_at_all(model):
    path, _ = model
    inference = parsed("inference.json", checkpoint=str(path))
    evaluation = parsed("train.json", "evaluate.json", checkpoint=str(path))
    assert isinstance(inference, CoarsePass)
    assert vars(inference) == vars(evaluation)
    assert (inference.when, inference.checkpoint) == ("in_doubt", str(path))
    assert parsed("train.json") is None


def test_pass_can_be_switched_off_and_on(model):
    path, _ = model
    assert parsed("inference.json", checkpoint=str(path), **{"proposer#_disabled_": True}) is None
    assert parsed("inference.json", checkpoint=str(path), **{"proposer#when": "always"}).when == "always"
