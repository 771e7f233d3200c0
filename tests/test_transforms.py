"""The chain from a case to the network's item and back to the CT's grid."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, PersistentDataset, decollate_batch
from monai.data.utils import pickle_hashing
from monai.transforms import Compose

from scripts import keys
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.imaging.geometry import Grid, box_grid, resample
from scripts.imaging.images import ImageReadError, read_image
from scripts.imaging.quality import CheckQualityd
from scripts.imaging.transforms import (
    INFERENCE_KEYS,
    TRAINING_KEYS,
    CodeClinicald,
    LoadScansd,
    LocaliseBoxd,
    RestoreMaskd,
    ScaleIntensityPETCTd,
    ToNetworkItemd,
)
from scripts.model.preprocessing import Preprocessing
from scripts.model.spec import ModelSpec

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "sts_petct" / "images"
ROI, SPACING = 16, 4.0


def chain(last: int | None = None, roi: int = ROI, spacing: float = SPACING) -> Compose:
    """The transforms of a training case, up to the ``last`` step."""
    spec = ModelSpec(keys.TASKS, DEFAULT_FEATURES, roi, spacing, (-1000, 1000), None, 1e-5)
    return Compose(Preprocessing(spec, "training", on_reject="flag").transforms[:last])


CT_AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
PET_AFFINE = np.array([[-4.0, 0, 0, 6.0], [0, -4.0, 0, -3.0], [0, 0, 3.5, -5.0], [0, 0, 0, 1]])


def scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    ct = rng.integers(-1000, 1200, size=(48, 44, 30)).astype(np.int16)
    pet = rng.gamma(2.0, 1.0, size=(28, 26, 30)).astype(np.float32)
    mask = np.zeros(ct.shape, dtype=np.uint8)
    mask[20:28, 18:26, 12:18] = keys.GTVP
    mask[30:33, 20:24, 14:17] = keys.GTVN
    return {keys.CT: (ct, CT_AFFINE), keys.PET: (pet, PET_AFFINE), keys.MASK: (mask, CT_AFFINE)}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("case")
    for key, (array, affine) in scans().items():
        nib.save(nib.Nifti1Image(array, affine), folder / f"{key}.nii.gz")
    return {
        keys.PATIENT_ID: "CHUM-001",
        keys.CENTRE: "CHUM",
        **{key: str(folder / f"{key}.nii.gz") for key in (keys.CT, keys.PET, keys.MASK)},
        keys.CLINICAL: {"age": 61.0, "gender": 1.0},
        keys.HPV: 1.0,
        keys.HPV_KNOWN: True,
        keys.TIME: 730.0,
        keys.EVENT: False,
        keys.SURV_KNOWN: True,
    }


def test_item_for_training(case):
    item = chain()(case)
    assert set(item) == set(TRAINING_KEYS)
    assert (item[keys.IMAGE].shape, item[keys.IMAGE].dtype) == ((2, ROI, ROI, ROI), torch.float32)
    assert (item[keys.SEG].shape, item[keys.SEG].dtype) == ((1, ROI, ROI, ROI), torch.float32)
    assert (item[keys.CLINICAL].shape, item[keys.CLINICAL].dtype) == ((len(DEFAULT_FEATURES),), torch.float32)
    for key in (keys.SEG_KNOWN, keys.SEG_CLASSES_KNOWN, keys.HPV_KNOWN, keys.EVENT, keys.SURV_KNOWN):
        assert item[key].dtype == torch.bool
    for key in (keys.HPV, keys.TIME, keys.SEG_INSIDE):
        assert (item[key].dtype, item[key].shape) == (torch.float32, ())
    assert float(item[keys.IMAGE].amin()) == 0.0
    assert float(item[keys.IMAGE].amax()) == 1.0
    assert item[keys.CT_SHAPE].tolist() == [48, 44, 30]
    assert type(item[keys.BOX_AFFINE]) is torch.Tensor
    assert (item[keys.CROP_METHOD], item[keys.CROP_FLAG], float(item[keys.SEG_INSIDE])) == ("mask", "", 1.0)
    torch.testing.assert_close(item[keys.IMAGE].affine, item[keys.BOX_AFFINE])


def test_channels_are_the_resampled_scans(case):
    """Channel 0 is the CT in HU and channel 1 the PET in SUV, each on the box by one interpolation."""
    item = chain(4)(case)
    box = Grid((ROI,) * 3, item[keys.BOX_AFFINE].numpy())
    for channel, key, fill in ((0, keys.CT, -1024.0), (1, keys.PET, 0.0)):
        array, affine = scans()[key]
        expected = resample(array, Grid(array.shape, affine), box, "spline", fill)
        np.testing.assert_array_equal(item[keys.IMAGE][channel].numpy(), expected)
    assert keys.CT not in item
    labels, affine = scans()[keys.MASK]
    expected = resample(labels, Grid(labels.shape, affine), box, "nearest")
    np.testing.assert_array_equal(item[keys.SEG][0].numpy(), expected)
    assert set(np.unique(item[keys.SEG].numpy())) == {keys.BACKGROUND, keys.GTVP, keys.GTVN}
    assert item[keys.SEG_CLASSES_KNOWN]


def test_a_mask_of_another_coding_holds_no_nodes(case):
    array, affine = scans()[keys.MASK]
    item = chain(4)({**case, keys.MASK: (array * 3, affine)})  # 3 and 6
    assert set(np.unique(item[keys.SEG].numpy())) == {keys.BACKGROUND, keys.GTVP}
    assert not item[keys.SEG_CLASSES_KNOWN]


class Series:
    """What reads a scan when it is asked to, as a DICOM series does."""

    def __init__(self, array, affine):
        self.scan = (array, affine)

    def read(self):
        return self.scan


@pytest.mark.parametrize("kind", ["path", "Path", "pair", "meta_tensor", "meta_tensor_with_channel", "series"])
def test_scans_from_anywhere(case, kind):
    def give(key):
        array, affine = scans()[key]
        tensor = torch.from_numpy(array)
        return {
            "path": case[key],
            "Path": Path(case[key]),
            "pair": (array, affine),
            "meta_tensor": MetaTensor(tensor, affine=torch.from_numpy(affine)),
            "meta_tensor_with_channel": MetaTensor(tensor[None], affine=torch.from_numpy(affine)),
            "series": Series(array, affine),
        }[kind]

    loaded = LoadScansd()({keys.PATIENT_ID: "a", **{key: give(key) for key in scans()}})
    for key, (array, affine) in scans().items():
        assert loaded[key].shape == (1, *array.shape)
        np.testing.assert_array_equal(loaded[key][0].numpy(), array)
        np.testing.assert_allclose(loaded[key].affine, affine)


def test_read_only_scans_are_neither_copied_nor_a_matter_of_warnings(monkeypatch):
    """Scans are loaded by several threads, and filters of warnings are one for all of them."""
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 1, 0)
    array.flags.writeable = False
    with monkeypatch.context() as patch:
        patch.setattr("warnings.catch_warnings", lambda: pytest.fail("filters of warnings were changed"))
        loaded = LoadScansd()({keys.PATIENT_ID: "a", keys.CT: (array, np.eye(4)), keys.PET: (array, np.eye(4))})[
            keys.CT
        ]
    np.testing.assert_array_equal(loaded[0].numpy(), array)
    assert loaded.data_ptr() == array.ctypes.data and not array.flags.writeable


@pytest.mark.parametrize("mask", ["missing_key", "none"])
def test_missing_mask_is_not_an_empty_one(case, mask):
    case = {key: value for key, value in case.items() if key != keys.MASK}
    if mask == "none":
        case[keys.MASK] = None
    item = chain()(case)
    assert not item[keys.SEG_KNOWN]
    assert not item[keys.SEG_CLASSES_KNOWN]
    assert not item[keys.SEG].any()
    assert torch.isnan(item[keys.SEG_INSIDE])
    assert item[keys.CROP_METHOD] != "mask"


def test_empty_mask_is_known_and_placed_without_it(case):
    array, affine = scans()[keys.MASK]
    item = chain()({**case, keys.MASK: (np.zeros_like(array), affine)})
    assert item[keys.SEG_KNOWN]
    assert not item[keys.SEG].any()
    assert torch.isnan(item[keys.SEG_INSIDE])
    assert item[keys.CROP_METHOD] != "mask"


def test_mask_is_not_looked_at_unless_asked(case):
    with_mask, without = (LocaliseBoxd(ROI, SPACING, use_mask=u)(LoadScansd()(case)) for u in (True, False))
    assert with_mask[keys.CROP_METHOD] == "mask"
    assert without[keys.CROP_METHOD] != "mask"


def test_mask_on_a_grid_of_its_own(case):
    """A mask drawn on the PET's grid lands at the same place of the box."""
    array, affine = scans()[keys.MASK]
    pet = scans()[keys.PET]
    moved = resample(array, Grid(array.shape, affine), Grid(pet[0].shape, pet[1]), "nearest").astype(np.uint8)
    here, there = chain()(case), chain()({**case, keys.MASK: (moved, pet[1])})
    centres = [
        i[keys.BOX_AFFINE].numpy() @ [*np.argwhere(i[keys.SEG][0].numpy()).mean(axis=0), 1] for i in (here, there)
    ]
    np.testing.assert_allclose(centres[0], centres[1], atol=2.5)


SCALED = [
    pytest.param((-1000, 1000), None, [-1000, 0, 1000], [0, 0.5, 1], [0.0, 5.0, 20.0], [0, 0.25, 1], id="paper"),
    pytest.param((-1000, 1000), None, [-3000, 0, 3000], [0, 0.5, 1], [2.0, 3.0, 4.0], [0, 0.5, 1], id="clipped"),
    pytest.param((-1000, 1000), None, [-200, 0, 200], [0, 0.5, 1], [-1.0, 0.0, 1.0], [0, 0.5, 1], id="box_min_max"),
    pytest.param((-200, 200), (0, 25), [-500, 0, 500], [0, 0.5, 1], [-1.0, 5.0, 50.0], [0, 0.2, 1], id="fixed_SUV"),
    pytest.param((-1000, 1000), None, [7, 7, 7], [0, 0, 0], [3.0, 3.0, 3.0], [0, 0, 0], id="constant"),
    pytest.param((-1000, 1000), (0, 25), [7, 7, 7], [0, 0, 0], [0.0, 0.0, 0.0], [0, 0, 0], id="blank_fixed_SUV"),
]


@pytest.mark.parametrize(("ct_window", "pet_window", "ct", "scaled_ct", "pet", "scaled_pet"), SCALED)
def test_scaling(ct_window, pet_window, ct, scaled_ct, pet, scaled_pet):
    image = torch.tensor([ct, pet], dtype=torch.float32).reshape(2, 3, 1, 1)
    for given in (image, MetaTensor(image, affine=torch.eye(4))):
        scaled = ScaleIntensityPETCTd(ct_window, pet_window)({keys.IMAGE: given})[keys.IMAGE]
        assert type(scaled) is type(given)
        np.testing.assert_allclose(scaled.reshape(2, 3).numpy(), [scaled_ct, scaled_pet], atol=1e-6)


@pytest.mark.parametrize(("channel", "name"), [(0, "CT"), (1, "PET")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(channel, name, value):
    image = torch.zeros(2, 4, 4, 4)
    image[channel, 1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"CHUM-001: the {name} holds"):
        ScaleIntensityPETCTd()({keys.IMAGE: image, keys.PATIENT_ID: "CHUM-001"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({keys.PET: None}, ValueError, "CHUM-001: no PET image", id="no_PET"),
        pytest.param({keys.CT: None}, ValueError, "CHUM-001: no CT image", id="no_CT"),
        pytest.param({keys.CT: "absent.nii.gz"}, ImageReadError, "no such file", id="absent_file"),
        pytest.param({keys.CT: 3}, ValueError, "a scan is a path", id="not_a_scan"),
        pytest.param(
            {keys.PET: (np.zeros((9, 9, 9)), np.diag([1e6, 1e6, 1e6, 1]))},
            ValueError,
            "the PET has voxels of",
            id="kilometres",
        ),
        pytest.param(
            {keys.CT: SimpleNamespace(read=lambda: (np.zeros((9, 9, 9)), np.diag([1e-4, 1, 1, 1])))},
            ValueError,
            "CHUM-001: the CT has voxels of 0.0001",
            id="read_by_an_object",
        ),
    ],
)
def test_scans_that_cannot_be_had(case, change, error, message):
    with pytest.raises(error, match=message):
        LoadScansd()({**case, **change})


@pytest.mark.parametrize("use_mask", [True, False])
def test_a_doubtful_place_of_a_scan_is_a_warning_of_quality_control(case, tmp_path, use_mask):
    shifted = CT_AFFINE.copy()
    shifted[0, 3] = 12.0
    image = nib.Nifti1Image(*scans()[keys.CT])
    image.set_sform(CT_AFFINE, 1)
    image.set_qform(shifted, 1)
    nib.save(image, tmp_path / "ct.nii")
    loaded = LoadScansd()({**case, keys.CT: str(tmp_path / "ct.nii")})
    item = CheckQualityd(ROI, on_reject="flag")(LocaliseBoxd(ROI, SPACING, use_mask=use_mask)(loaded))
    checks = {check["name"]: check for check in json.loads(item[keys.QUALITY])}
    told = "CT: its sform and its qform are up to 12 mm apart; the sform was used"
    assert (checks["headers"]["verdict"], checks["headers"]["message"]) == ("warn", told)
    assert "sform" not in item[keys.CROP_FLAG]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleIntensityPETCTd(ct_window=(1000, -1000)), "ct_window"),
        (lambda: ScaleIntensityPETCTd(pet_window=(0, 0)), "pet_window"),
        (lambda: RestoreMaskd(threshold=0.0), "threshold"),
        (lambda: RestoreMaskd(peak=1.0), "peak"),
        (lambda: CodeClinicald()({keys.CLINICAL: [1.0, 2.0]}), "coded clinical values"),
        (lambda: CodeClinicald(("age",))({keys.CLINICAL: torch.zeros(1, 1)}), "coded clinical values"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("given", [{}, {keys.CLINICAL: None}, {keys.CLINICAL: {}}])
def test_missing_clinical_values_are_zeros(given):
    assert CodeClinicald()(given)[keys.CLINICAL].tolist() == [0.0] * len(DEFAULT_FEATURES)


def test_coded_clinical_values_pass():
    assert CodeClinicald(("age", "gender"))({keys.CLINICAL: [61.0, 2.0]})[keys.CLINICAL].tolist() == [61.0, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"age": 61, "gender": "male", "m_stage": "Mx"}, id="as written"),
        pytest.param([61.0, 2.0, 0.0], id="coded already"),
    ],
)
def test_clinical_values_stay_beside_their_coding(given):
    item = CodeClinicald(("age", "gender", "m_stage"))({keys.CLINICAL: given})
    assert json.loads(item[keys.CLINICAL_VALUES]) == [
        {"name": "age", "value": 61.0, "coded": 61.0, "missing": False},
        {"name": "gender", "value": 1.0, "coded": 2.0, "missing": False},
        {"name": "m_stage", "value": None, "coded": 0.0, "missing": True},
    ]


def test_item_for_inference_has_no_labels(case):
    item = ToNetworkItemd(INFERENCE_KEYS)(chain(6)(case))
    assert set(item) == set(INFERENCE_KEYS)
    with pytest.raises(KeyError):
        ToNetworkItemd()({keys.IMAGE: torch.zeros(1)})


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint16, np.uint8])
def test_native_pet_goes_with_the_item(case, dtype):
    """Unchanged, in its own type, through a loader and back: SUV is measured on it."""
    pet = (scans()[keys.PET][0] * 10).astype(dtype)
    given = {**case, keys.PET: (pet, PET_AFFINE)}
    prepare = Compose([chain(6), ToNetworkItemd(INFERENCE_KEYS)])
    (batch,) = DataLoader(Dataset([given], prepare), batch_size=1)
    (item,) = decollate_batch(batch)
    np.testing.assert_array_equal(item[keys.PET][0].numpy(), pet)
    assert item[keys.PET].numpy().dtype == dtype
    np.testing.assert_allclose(item[keys.PET].affine, PET_AFFINE)
    assert 0 <= time.monotonic() - float(item[keys.STARTED]) < 60


def test_the_class_of_a_voxel_is_the_most_probable_one_on_the_ct():
    """Probabilities cross between the voxels of the box: the CT, of half the voxel size, has the border there."""
    box, ct = box_grid((0.0, 0.0, 0.0), 4, 2.0), box_grid((0.0, 0.0, 0.0), 8, 1.0)
    each = torch.zeros(2, 4, 4, 4)
    each[0], each[1] = (
        torch.tensor([0.9, 0.6, 0.2, 0.1])[:, None, None],
        torch.tensor([0.0, 0.2, 0.6, 0.2])[:, None, None],
    )
    item = {
        **{keys.SEG_PROB: each.sum(dim=0, keepdim=True), keys.CLASS_PROB: each},
        **{keys.BOX_AFFINE: torch.from_numpy(box.affine), keys.CT_AFFINE: torch.from_numpy(ct.affine)},
        keys.CT_SHAPE: torch.tensor(ct.shape),
    }
    restored = RestoreMaskd()(item)
    assert restored[keys.PRED].dtype == torch.uint8
    assert restored[keys.PRED][0, 1:-1, 4, 4].tolist() == [1, 1, 1, 2, 2, 0]  # 0.875, 0.825, 0.8, 0.8, 0.675, 0.425
    merged = RestoreMaskd()({name: value for name, value in item.items() if name != keys.CLASS_PROB})
    assert torch.equal(merged[keys.PRED], (restored[keys.PRED] > 0).to(torch.uint8))
    assert merged[keys.VOLUME_ML] == restored[keys.VOLUME_ML]


def test_without_a_probability_there_is_no_mask():
    assert RestoreMaskd()({keys.PATIENT_ID: "a"}) == {keys.PATIENT_ID: "a"}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_loader(case, workers):
    cases = [case, {**case, keys.PATIENT_ID: "CHUM-002", keys.MASK: None}]
    loader = DataLoader(Dataset(cases, chain()), batch_size=2, num_workers=workers)
    (batch,) = list(loader)
    assert batch[keys.IMAGE].shape == (2, 2, ROI, ROI, ROI)
    assert batch[keys.SEG_KNOWN].tolist() == [True, False]
    assert batch[keys.PATIENT_ID] == ["CHUM-001", "CHUM-002"]
    assert batch[keys.BOX_AFFINE].shape == (2, 4, 4)
    torch.testing.assert_close(batch[keys.IMAGE][0].as_tensor(), chain()(case)[keys.IMAGE].as_tensor())


def test_chain_survives_pickling_and_keys_a_cache(case):
    again = pickle.loads(pickle.dumps(chain()))
    torch.testing.assert_close(again(case)[keys.IMAGE].as_tensor(), chain()(case)[keys.IMAGE].as_tensor())
    assert pickle_hashing(chain().transforms) == pickle_hashing(chain().transforms)
    assert pickle_hashing(chain().transforms) != pickle_hashing(chain(spacing=3.0).transforms)


def test_cache_on_disk_gives_the_same_item(case, tmp_path):
    first, second = (
        PersistentDataset([case], chain(), cache_dir=tmp_path, hash_transform=pickle_hashing) for _ in "ab"
    )
    fresh, cached = first[0], second[0]
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert set(fresh) == set(cached)
    torch.testing.assert_close(torch.as_tensor(fresh[keys.IMAGE]), torch.as_tensor(cached[keys.IMAGE]))
    assert cached[keys.CROP_METHOD] == "mask"


def test_batch_does_not_change_the_case(case):
    before = dict(case)
    chain()(case)
    assert case == before


RESTORED = [
    pytest.param(np.diag([-1.0, -1.0, 3.0, 1.0]), id="typical"),
    pytest.param(np.array([[0, 1.5, 0, 0], [-1.2, 0, 0, 0], [0, 0, -2.0, 0], [0, 0, 0, 1.0]]), id="permuted"),
    pytest.param(np.array([[1.0, 0.2, 0, 0], [-0.2, 1.0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1.0]]), id="oblique"),
]


@pytest.mark.parametrize("affine", RESTORED)
def test_mask_returns_to_the_ct(affine):
    ct = Grid((70, 60, 36), affine)
    box = box_grid(ct.centre, 24, 2.0)
    index = np.stack(np.meshgrid(*map(np.arange, box.shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm(box.to_world(index) - ct.centre, axis=-1)
    prob = torch.from_numpy(1 / (1 + np.exp(distance - 14))).float()[None]
    batch = {
        keys.SEG_PROB: MetaTensor(prob[None], affine=torch.from_numpy(box.affine)),
        keys.BOX_AFFINE: torch.from_numpy(box.affine)[None],
        keys.CT_SHAPE: torch.tensor([ct.shape]),
        keys.CT_AFFINE: torch.from_numpy(ct.affine)[None],
    }
    (item,) = [RestoreMaskd()(item) for item in decollate_batch(batch)]
    mask = item[keys.PRED]
    assert (mask.shape, mask.dtype) == ((1, *ct.shape), torch.uint8)
    np.testing.assert_allclose(mask.affine, ct.affine)
    at = np.stack(np.meshgrid(*map(np.arange, ct.shape), indexing="ij"), axis=-1)
    expected = np.linalg.norm(ct.to_world(at) - ct.centre, axis=-1) <= 14
    dice = 2 * (mask[0].numpy().astype(bool) & expected).sum() / (int(mask.sum()) + expected.sum())
    assert dice > 0.95
    assert item[keys.VOLUME_ML] == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.05)
    assert item[keys.VOLUME_ML] == pytest.approx(int(mask.sum()) * ct.voxel_ml)


@pytest.mark.parametrize("prob_dtype", [torch.float32, torch.bfloat16])
def test_box_beside_the_ct_gives_an_empty_mask(prob_dtype):
    item = {
        keys.SEG_PROB: torch.ones(1, 8, 8, 8, dtype=prob_dtype),
        keys.BOX_AFFINE: torch.from_numpy(box_grid((900, 0, 0), 8, 2.0).affine),
        keys.CT_SHAPE: torch.tensor([9, 8, 7]),
        keys.CT_AFFINE: torch.eye(4, dtype=torch.float64),
    }
    restored = RestoreMaskd()(item)
    assert restored[keys.PRED].shape == (1, 9, 8, 7)
    assert (int(restored[keys.PRED].sum()), restored[keys.VOLUME_ML]) == (0, 0.0)


def test_real_scans_there_and_back():
    """A real sarcoma's mask through a 2 mm box and back onto its CT."""
    if not REAL.is_dir():
        pytest.skip(f"no real images at {REAL}")
    for folder in sorted(REAL.iterdir())[:4]:
        name = folder.name
        paths = {keys.CT: f"{name}__CT.nii.gz", keys.PET: f"{name}__PT.nii.gz", keys.MASK: f"{name}.nii.gz"}
        case = {keys.PATIENT_ID: name, **{key: str(folder / path) for key, path in paths.items()}}
        item = chain(6, roi=128, spacing=2.0)(case)
        assert torch.isfinite(item[keys.IMAGE]).all()
        truth, affine = read_image(case[keys.MASK])
        restored = RestoreMaskd()({**item, keys.SEG_PROB: item[keys.SEG]})
        mask = restored[keys.PRED][0].numpy() > 0
        truth = truth > 0
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.96, name
        np.testing.assert_allclose(restored[keys.PRED].affine, affine, atol=1e-4)
        assert restored[keys.VOLUME_ML] == pytest.approx(truth.sum() * abs(np.linalg.det(affine)) / 1000, rel=0.07)
