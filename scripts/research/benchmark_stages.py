"""The stages of ``benchmark.py``: the bundle's implementation, a plain one, and the criterion for equal results.

The bundle's implementation is the one of ``inference.json`` and ``train.json``. The plain one is MONAI without changes
over whole volumes, and the same network in float32 with torch's default kernels and memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import nn

from command_line import BUNDLE

import phantom
from experiments.experiment import DEEP
from phantom.cohort import write_cohort
from runtimes.inference import inference_config
from scripts import keys
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.cohorts.files import in_config, written_whole
from scripts.cohorts.thresholds import above
from scripts.imaging.geometry import Grid, resample
from scripts.imaging.images import read_image
from scripts.imaging.transforms import RestoreMaskd, ScaleIntensityPETCTd
from scripts.model.ensemble import FoldEnsemble, load_weights, read_state, save_weights
from scripts.model.layers import SafeConv3d
from scripts.model.losses import MultitaskLoss
from scripts.model.networks import MultitaskNet

PATIENT = "PHANTOM-1"
SPACING_MM = 2.0
FOLDS = 5
BATCH = 4
SEED = 0

Answer = dict[str, np.ndarray]
Run = Callable[[], Answer]


class DisagreementError(AssertionError):
    """The bundle's implementation and the plain one give different results."""


@dataclass(frozen=True)
class Setup:
    """Folder and sizes of the inputs of a benchmark."""

    folder: Path  # of inputs and outputs
    roi: int = 128  # voxels along an edge of the network's box
    shrink: int = 1  # factor of the voxel size to that of a clinical scan
    cohort: int = 5  # number of patients of the stage cohort
    amp: bool | None = None  # whether the bundle computes in bfloat16; None: as the configs choose on this machine

    @property
    def forced(self) -> dict[str, bool]:
        """Ids of the configs that are set for every stage."""
        return {} if self.amp is None else {"amp": self.amp}

    @property
    def spacing_mm(self) -> float:
        """Voxels of the box, whose extent is always 256 mm."""
        return SPACING_MM * 128 / self.roi

    def scan(self, name: str) -> Path:
        """File of the patient's ``CT`` or ``PT``."""
        return self.folder / "cohort" / "images" / PATIENT / f"{PATIENT}__{name}.nii.gz"

    def models(self, folds: int) -> Path:
        """Folder of a model of so many folds."""
        return self.folder / f"model_{folds}"


# --- inputs ------------------------------------------------------------------------------------------------------
def make_inputs(setup: Setup) -> None:
    """Write the pair of scans and the models, unless they exist."""
    for folds in (1, FOLDS):
        path = setup.models(folds) / "model.pt"
        if not path.is_file():
            save_weights(random_ensemble(setup, folds), path)
    if not setup.scan("PT").is_file():
        write_pair(setup)


def random_ensemble(setup: Setup, folds: int) -> FoldEnsemble:
    """Networks with random weights and random statistics of the batch norms."""
    torch.manual_seed(SEED)
    settings = {
        "tasks": list(keys.TASKS),
        "clinical_features": list(DEFAULT_FEATURES),
        "survival_inputs": DEEP["survival_inputs"],  # the paper's, which have the most to do
        "hpv_inputs": DEEP["hpv_inputs"],
        "roi_size": [setup.roi] * 3,
        "spacing_mm": setup.spacing_mm,
        "ct_window": [-1000, 1000],
        "pet_window": [0, 25],
        "bn_eps": 1e-5,
    }
    ensemble = FoldEnsemble(MultitaskNet(len(DEFAULT_FEATURES)), settings)
    ensemble.provenance = {"trained_on": "nothing: random weights"}
    members = [MultitaskNet(len(DEFAULT_FEATURES)) for _ in range(folds)]
    for norm in (module for member in members for module in member.modules() if isinstance(module, nn.BatchNorm3d)):
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    ensemble.folds = nn.ModuleList(members)
    return ensemble


def write_pair(setup: Setup) -> None:
    """A phantom on grids of clinical size: CT 512 x 512 x 200 int16, PET 256 x 256 x 200 float32, gzip."""
    import nibabel as nib
    from isal import igzip

    patient = phantom.draw_patient(SEED, 3)
    parts = phantom.build_anatomy({**patient.body, "contrast_hu": 0.0}, patient.lesions)
    ct_grid = _grid(patient, (512, 512, 200), (0.98, 0.98, 2.0), setup.shrink)
    pet_grid = _grid(patient, (256, 256, 200), (2.73, 2.73, 2.0), setup.shrink)
    rng = np.random.default_rng(SEED)
    ct = phantom.paint_ct(patient, parts, ct_grid, 1) + rng.normal(0, 12, ct_grid.shape[::-1]).astype(np.float32)
    pet = phantom.paint_pet(patient, parts, pet_grid, 6.5)
    pet += np.sqrt(pet) * rng.normal(0, 0.09, pet.shape).astype(np.float32)
    setup.scan("CT").parent.mkdir(parents=True, exist_ok=True)
    for name, array, grid in (
        ("CT", np.rint(np.clip(ct, -1000, 3000)).astype(np.int16), ct_grid),
        ("PT", np.maximum(pet, 0), pet_grid),
    ):
        with written_whole(setup.scan(name)) as partial:
            partial.write_bytes(igzip.compress(nib.Nifti1Image(array.T, grid.affine).to_bytes(), 2, mtime=0))


def _grid(
    patient: phantom.Patient, shape: tuple[int, int, int], mm: tuple[float, float, float], shrink: int
) -> phantom.Grid:
    """A grid around head and neck, its top 60 mm above the head: the network's box lies within."""
    top = patient.pose.to_world(np.array([[0.0, -8.0, 192.0]]))[0]
    middle = patient.pose.to_world(np.array([[0.0, -22.0, 0.0]]))[0]
    counts, voxel = np.array(shape) // shrink, np.array(mm) * shrink
    reach = (counts - 1) * voxel / 2
    origin = (middle[0] + reach[0], middle[1] + reach[1], top[2] + 60 - 2 * reach[2])
    x, y, z = (int(n) for n in counts)
    dx, dy, dz = (float(size) for size in voxel)
    return phantom.Grid((x, y, z), (dx, dy, dz), (float(origin[0]), float(origin[1]), float(origin[2])))


def bundle(setup: Setup, folds: int = 1, **options: Any) -> ConfigParser:
    """``inference.json`` for the one patient and a model of so many folds."""
    places = {"dataset_dir": str(setup.folder / "cohort"), "output_dir": str(setup.folder / "predictions")}
    return inference_config(setup.models(folds) / "model.pt", **{**places, "force": True, **setup.forced, **options})


# --- preprocessing -----------------------------------------------------------------------------------------------
def preprocess(setup: Setup) -> Run:
    """The bundle: both files to the network's input, the box found."""
    parser = bundle(setup)
    parser.get_parsed_content("initialize")
    dataset = parser.get_parsed_content("dataset")

    def run() -> Answer:
        item = dataset[0]
        return {"box_affine": np.asarray(item[keys.BOX_AFFINE]), "image": np.asarray(item[keys.IMAGE])}

    return run


def preprocess_plainly(setup: Setup) -> Run:
    """MONAI without changes: load, orient and resample both whole volumes, then crop around the bundle's box centre."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd, SpatialCrop

    names = [keys.CT, keys.PET]
    chain = Compose(
        [
            LoadImaged(names),
            EnsureChannelFirstd(names),
            Orientationd(names, axcodes="RAS", labels=None),
            Spacingd(names, pixdim=[setup.spacing_mm] * 3, mode=3),  # type: ignore[arg-type]
        ]
    )
    centre = box_of(setup).centre

    def run() -> Answer:
        data = chain({keys.CT: str(setup.scan("CT")), keys.PET: str(setup.scan("PT"))})
        answer: Answer = {}
        for name in names:
            grid = Grid(data[name].shape[1:], np.asarray(data[name].affine))
            middle = np.rint(grid.to_index(centre)).astype(int).tolist()
            part = MetaTensor(SpatialCrop(roi_center=middle, roi_size=[setup.roi] * 3)(data[name]))
            answer |= {name: np.asarray(part)[0].astype(np.float32), f"{name}_affine": np.asarray(part.affine)}
        return answer

    return run


def box_of(setup: Setup) -> Grid:
    """The network's box as placed by the bundle."""
    item = bundle(setup).get_parsed_content("dataset")[0]
    return Grid((setup.roi,) * 3, np.asarray(item[keys.BOX_AFFINE]))


def check_preprocessing(setup: Setup, plain: Answer, product: Answer) -> str:
    """The bundle's interpolation on the plain grid gives the same values, and both boxes are at the same place."""
    said = []
    for key, name, unit, tolerance in ((keys.CT, "CT", "HU", 1.0), (keys.PET, "PT", "SUV", 0.01)):
        array, affine = read_image(setup.scan(name))
        target = Grid(plain[key].shape, plain[f"{key}_affine"])
        worst = float(np.abs(resample(array, Grid(array.shape, affine), target) - plain[key]).max())
        _hold(worst <= tolerance, f"{name} differs by {worst:.3g} {unit} (allowed {tolerance:g})")
        said.append(f"{name} within {worst:.2g} {unit}")
    distance = np.abs(Grid((setup.roi,) * 3, product["box_affine"]).centre - target.centre).max()
    _hold(distance <= setup.spacing_mm * setup.roi / 4, f"the boxes lie {distance:.0f} mm apart")
    return ", ".join(said)


# --- network -----------------------------------------------------------------------------------------------------
def network_run(folds: int, **options: Any) -> Callable[[Setup], Run]:
    """The bundle's inferer on its network."""

    def make(setup: Setup) -> Run:
        parser = bundle(setup, folds, **options)
        parser.get_parsed_content("initialize")
        inferer, network = parser.get_parsed_content("inferer"), parser.get_parsed_content("network").eval()
        image, clinical = random_image(setup)

        def run() -> Answer:
            with torch.no_grad():
                return _numpy(inferer(image, network, clinical=clinical))

        return run

    return make


def plain_network_run(folds: int) -> Callable[[Setup], Run]:
    """The same weights, float32, torch's own choice of kernels, layout and memory; folds one after another."""

    def make(setup: Setup) -> Run:
        network, (image, clinical) = plain_ensemble(setup, folds), random_image(setup)

        def run() -> Answer:
            with torch.no_grad():
                return _numpy(network.predict(image, clinical))

        return run

    return make


def plain_ensemble(setup: Setup, folds: int) -> FoldEnsemble:
    """The model with torch's own convolutions in the place of those that choose their kernel."""
    ensemble = FoldEnsemble(
        MultitaskNet(len(DEFAULT_FEATURES)), read_state(setup.models(folds) / "model.pt")["_extra_state"]["settings"]
    )
    load_weights(ensemble, setup.models(folds) / "model.pt")
    _plain_convolutions(ensemble)
    return ensemble.eval()


def _plain_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, SafeConv3d):
            module.__class__ = nn.Conv3d  # type: ignore[assignment]


def random_image(setup: Setup, cases: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 2, R, R, R) and clinical values (B, F)."""
    generator = torch.Generator().manual_seed(SEED)
    image = torch.rand((cases, 2, setup.roi, setup.roi, setup.roi), generator=generator)
    return image, torch.rand((cases, len(DEFAULT_FEATURES)), generator=generator)


def check_network(setup: Setup, plain: Answer, product: Answer) -> str:
    """float32: the same results; bfloat16: similar mask and scores (random weights are the worst case)."""
    half = parser_amp(setup)
    dice = _dice(above(plain[keys.SEG_PROB]), above(product[keys.SEG_PROB]))
    hazard = float(np.abs(plain[keys.LOG_HAZARD] - product[keys.LOG_HAZARD]).max())
    hpv = float(np.abs(plain[keys.HPV_PROB] - product[keys.HPV_PROB]).max())
    least, most = (0.99, 0.05) if half else (0.9999, 1e-3)
    _hold(dice >= least, f"masks agree with Dice {dice:.5f} (allowed {least})")
    _hold(max(hazard, hpv) <= most, f"log hazard differs by {hazard:.2g}, HPV by {hpv:.2g} (allowed {most:g})")
    return f"Dice {dice:.5f}, log hazard within {hazard:.1g}, HPV within {hpv:.1g}"


def parser_amp(setup: Setup) -> bool:
    """Whether the bundle computes in bfloat16 here."""
    return bool(bundle(setup).get_parsed_content("amp"))


# --- mask --------------------------------------------------------------------------------------------------------
def tumour_probability(setup: Setup) -> tuple[dict[Any, Any], Grid]:
    """A tumour-like probability map in the box, as the network's item has it, and the CT's grid."""
    box = box_of(setup)
    axes = np.ogrid[tuple(slice(-1, 1, complex(n)) for n in box.shape)]
    blob = np.exp(-8 * sum((axis - shift) ** 2 for axis, shift in zip(axes, (0.1, 0.2, -0.1), strict=True)))
    array, affine = read_image(setup.scan("CT"))
    item = {
        keys.SEG_PROB: torch.from_numpy(blob[None].astype(np.float32)),
        keys.BOX_AFFINE: torch.from_numpy(box.affine),
        keys.CT_SHAPE: torch.tensor(array.shape),
        keys.CT_AFFINE: torch.from_numpy(affine),
    }
    return item, Grid(array.shape, affine)


def restore(setup: Setup) -> Run:
    """The bundle: only the box is resampled, quick compression."""
    from scripts.imaging.images import write_mask

    item, grid = tumour_probability(setup)
    transform, path = RestoreMaskd(), setup.folder / "mask_product.nii.gz"

    def run() -> Answer:
        mask = np.asarray(transform(item)[keys.PRED])[0]
        write_mask(path, mask, grid.affine)
        return {"mask": mask}

    return run


def restore_plainly(setup: Setup) -> Run:
    """The whole CT's grid by MONAI, then nibabel with gzip level 9."""
    item, grid = tumour_probability(setup)

    def run() -> Answer:
        mask = whole_mask(item[keys.SEG_PROB], np.asarray(item[keys.BOX_AFFINE]), grid)
        write_plainly(mask, grid.affine, setup.folder / "mask_plain.nii.gz")
        return {"mask": mask}

    return run


def whole_mask(probability: torch.Tensor, box_affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Stock MONAI: linear interpolation of (1, R, R, R) on every voxel of the CT, then the threshold."""
    from monai.transforms import SpatialResample

    whole = SpatialResample(mode="bilinear", padding_mode="zeros")(
        MetaTensor(probability, affine=torch.from_numpy(box_affine)),
        dst_affine=torch.from_numpy(grid.affine),
        spatial_size=grid.shape,
    )
    return above(np.asarray(whole)[0])


def write_plainly(mask: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """``gzip`` at its default level 9, over what nibabel makes."""
    import gzip

    import nibabel as nib

    path.write_bytes(gzip.compress(nib.Nifti1Image(mask.astype(np.uint8), affine).to_bytes(), 9))


def check_mask(setup: Setup, plain: Answer, product: Answer) -> str:
    """The same voxels, except for rounding errors."""
    dice = _dice(plain["mask"], product["mask"])
    _hold(dice >= 0.9999, f"masks agree with Dice {dice:.6f} (allowed 0.9999)")
    return f"Dice {dice:.6f}"


# --- one patient -------------------------------------------------------------------------------------------------
def patient(setup: Setup) -> Run:
    """The bundle: files to mask and JSON."""
    predict, writer = _inference(bundle(setup))

    def run() -> Answer:
        predict()
        return _written(writer.output_dir)

    return run


def _inference(parser: ConfigParser) -> tuple[Callable[[], None], Any]:
    """A function that predicts the cases of a config without output on the terminal, and the writer of the results."""
    parser.get_parsed_content("initialize")
    evaluator, writer = parser.get_parsed_content("evaluator"), parser.get_parsed_content("handlers#0")

    def predict() -> None:
        with open_silence():
            evaluator.run()

    return predict, writer


def patient_plainly(setup: Setup) -> Run:
    """Stock MONAI and the plain network; whole volumes on a lattice of which the bundle's box is a part."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, SpatialCrop, SpatialResample

    names, box = [keys.CT, keys.PET], box_of(setup)
    load = Compose([LoadImaged(names), EnsureChannelFirstd(names)])
    network = plain_ensemble(setup, 1)
    scale = ScaleIntensityPETCTd((-1000, 1000), (0, 25))

    def run() -> Answer:
        data = load({keys.CT: str(setup.scan("CT")), keys.PET: str(setup.scan("PT"))})
        grid = Grid(data[keys.CT].shape[1:], np.asarray(data[keys.CT].affine))
        image = []
        for name in names:
            affine, size, start = lattice(Grid(data[name].shape[1:], np.asarray(data[name].affine)), box)
            whole = SpatialResample(mode=3, padding_mode="nearest")(data[name], torch.from_numpy(affine), size)
            part = SpatialCrop(roi_start=start, roi_end=[s + setup.roi for s in start])(whole)
            image.append(torch.as_tensor(np.asarray(part)[0]))
        image_pair = scale({keys.IMAGE: torch.stack(image).float()})[keys.IMAGE]
        with torch.no_grad():
            result = network.predict(image_pair[None], torch.zeros(1, len(DEFAULT_FEATURES)))
        mask = whole_mask(result[keys.SEG_PROB][0], box.affine, grid)
        write_plainly(mask, grid.affine, setup.folder / "patient_plain.nii.gz")
        numbers = {keys.HPV_PROB: result[keys.HPV_PROB].numpy(), keys.LOG_HAZARD: result[keys.LOG_HAZARD].numpy()}
        (setup.folder / "patient_plain.json").write_text(json.dumps({k: v.tolist() for k, v in numbers.items()}))
        return {"mask": mask, **numbers}

    return run


def lattice(scan: Grid, box: Grid) -> tuple[np.ndarray, list[int], list[int]]:
    """The box's lattice over a whole scan: affine, voxels, and where in it the box starts."""
    index = box.to_index(scan.corners)
    first = np.minimum(np.ceil(index.min(axis=0)), 0).astype(int)
    last = np.maximum(np.floor(index.max(axis=0)), np.array(box.shape) - 1).astype(int)
    affine = box.affine.copy()
    affine[:3, 3] = box.to_world(first)
    return affine, (last - first + 1).tolist(), (-first).tolist()


def check_patient(setup: Setup, plain: Answer, product: Answer) -> str:
    """Mask and scores as from the plain path."""
    dice = _dice(plain["mask"], product["mask"])
    hazard = float(np.abs(plain[keys.LOG_HAZARD] - product[keys.LOG_HAZARD]).max())
    least, most = (0.99, 0.05) if parser_amp(setup) else (0.999, 2e-3)
    _hold(dice >= least and hazard <= most, f"Dice {dice:.5f} (allowed {least}), log hazard by {hazard:.2g} ({most:g})")
    return f"Dice {dice:.5f}, log hazard within {hazard:.1g}"


def _written(output_dir: Path) -> Answer:
    said = json.loads((output_dir / PATIENT / "prediction.json").read_text(encoding="utf-8"))
    mask, _ = read_image(output_dir / PATIENT / said["files"]["mask"])
    return {
        "mask": mask != 0,
        keys.LOG_HAZARD: np.array([said["survival"]["log_hazard"]]),
        keys.HPV_PROB: np.array([said["hpv"]["probability"]]),
    }


# --- a cohort ----------------------------------------------------------------------------------------------------
def cohort(loader: Mapping[str, Any]) -> Callable[[Setup], Run]:
    """The bundle over copies of the patient; ``loader`` replaces entries of the config's data loader."""

    def make(setup: Setup) -> Run:
        folder = setup.folder / "copies"
        for name, kind in itertools.product((f"P-{n:03d}" for n in range(setup.cohort)), ("CT", "PT")):
            link = folder / "images" / name / f"{name}__{kind}.nii.gz"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(setup.scan(kind))
        changes: dict[str, Any] = {f"evaluator#val_data_loader#{name}": value for name, value in loader.items()}
        changes |= {"dataset_dir": str(folder), "output_dir": str(setup.folder / "cohort_predictions")}
        predict, writer = _inference(bundle(setup, **changes))

        def run() -> Answer:
            predict()
            rows = [writer.rows[name] for name in sorted(writer.rows)]
            return {keys.LOG_HAZARD: np.array([row["log_hazard"] for row in rows], dtype=float)}

        return run

    return make


def check_cohort(setup: Setup, plain: Answer, product: Answer) -> str:
    """Every patient has the same results, sequentially or overlapping."""
    _hold(len(plain[keys.LOG_HAZARD]) == setup.cohort, "not every patient was predicted")
    worst = float(np.abs(plain[keys.LOG_HAZARD] - product[keys.LOG_HAZARD]).max())
    _hold(worst <= 1e-5, f"log hazard differs by {worst:.2g}")
    return f"log hazard within {worst:.1g}"


# --- training ----------------------------------------------------------------------------------------------------
def training(**options: Any) -> Callable[[Setup], Run]:
    """A step as ``train.json`` sets it up, on random images; dropout is off, so that the loss can be compared."""

    def make(setup: Setup) -> Run:
        from scripts.training import engine

        parser = ConfigParser()
        parser.read_config(str(BUNDLE / "configs" / "train.json"))
        torch.manual_seed(SEED)
        changes = {
            "bundle_root": in_config(str(BUNDLE)),
            "network_def#network#tumour_prior": None,  # as the plain network starts
            **DEEP,
            **setup.forced,
            **options,
        }
        for name, value in changes.items():
            parser[name] = value
        if not parser.get_parsed_content("checkpointing"):
            engine.tune_allocator()
        network, loss = parser.get_parsed_content("train#network"), parser.get_parsed_content("train#loss")
        frugal, compiled = parser.get_parsed_content("checkpointing"), parser.get_parsed_content("compile")
        engine.speed_up(parser.get_parsed_content("network"), compiled=compiled, checkpointing=frugal)
        optimizer, inferer = parser.get_parsed_content("train#optimizer"), parser.get_parsed_content("train#inferer")
        return _steps(setup, network, loss, optimizer, inferer)

    return make


def train_plainly(setup: Setup) -> Run:
    """The same step: float32, torch's own layout and memory."""
    torch.manual_seed(SEED)
    network = MultitaskNet(len(DEFAULT_FEATURES))
    loss = MultitaskLoss(survival_weights=network.survival_weights(), l2_weight=0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    return _steps(setup, network, loss, optimizer, lambda image, net, clinical: net(image, clinical))


def _steps(setup: Setup, network: nn.Module, loss: Any, optimizer: Any, call: Any) -> Run:
    image, clinical = random_image(setup, BATCH)
    targets = {
        keys.SEG: (image[:, 1:] > 0.9).float(),
        keys.SEG_KNOWN: torch.ones(BATCH, dtype=torch.bool),
        keys.HPV: torch.arange(BATCH).remainder(2).float(),
        keys.HPV_KNOWN: torch.ones(BATCH, dtype=torch.bool),
        keys.TIME: 100.0 * torch.arange(1, BATCH + 1),
        keys.EVENT: torch.arange(BATCH).remainder(2) == 0,
        keys.SURV_KNOWN: torch.ones(BATCH, dtype=torch.bool),
    }
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network.train()

    def run() -> Answer:
        optimizer.zero_grad(set_to_none=True)
        value = loss(call(image, network, clinical=clinical), targets)
        value.backward()
        optimizer.step()
        return {"loss": np.array([float(value.detach())])}

    return run


def check_training(setup: Setup, plain: Answer, product: Answer) -> str:
    """The same loss at the first step; in bfloat16 nearly the same."""
    share = abs(float(product["loss"][0] / plain["loss"][0]) - 1)
    most = 0.03 if parser_amp(setup) else 0.01
    _hold(share <= most, f"the loss differs by {100 * share:.2g} % (allowed {100 * most:g})")
    return f"loss within {100 * share:.1g} %"


# --- data loading ------------------------------------------------------------------------------------------------
def trace_loading(setup: Setup, cases: int = 12, epochs: int = 3) -> dict[str, float]:
    """Share of an epoch's time, after the first one, in which the training step waits for data.

    Runs ``train.json`` on phantoms, and asks the trainer when it starts and ends to fetch a batch.
    """
    from ignite.engine import Events

    data, out = setup.folder / "training_cohort", setup.folder / "training"
    write_cohort(data, cases, SEED)
    shutil.rmtree(out, ignore_errors=True)
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    roi = max(32, setup.roi // 2)
    for name, value in {
        "bundle_root": in_config(str(BUNDLE)),
        "dataset_dir": in_config(str(data)), "output_dir": in_config(str(out)),
        "roi_size": [roi] * 3, "spacing_mm": 256 / roi, "epochs": epochs, "val_interval": epochs + 1,
    }.items():  # fmt: skip
        parser[name] = value
    start = time.perf_counter()
    parser.get_parsed_content("initialize")
    prepared = time.perf_counter() - start
    trainer = parser.get_parsed_content("train#trainer")
    waits, first_waits, clock = [0.0], [0.0], [0.0, 0.0]

    def begin() -> None:
        clock[0] = time.perf_counter()

    def end() -> None:
        first = (trainer.state.iteration - 1) % trainer.state.epoch_length == 0
        if trainer.state.epoch > 1:
            (first_waits if first else waits).append(time.perf_counter() - clock[0])

    def second() -> None:
        clock[1] = time.perf_counter()

    trainer.add_event_handler(Events.GET_BATCH_STARTED, begin)
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, end)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), second)
    with open_silence():
        trainer.run()
    total = time.perf_counter() - clock[1]
    return {
        "prepare_first_epoch_s": prepared,
        "epochs_s": total,
        "wait_between_steps_share": sum(waits) / total,
        "wait_at_epoch_start_share": sum(first_waits) / total,
    }


# --- helpers -----------------------------------------------------------------------------------------------------
def open_silence() -> contextlib.AbstractContextManager[Any]:
    """Without progress bars."""
    import io

    return contextlib.redirect_stderr(io.StringIO())


def _hold(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DisagreementError(otherwise)


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = int(one.sum()) + int(other.sum())
    return 1.0 if total == 0 else 2 * int((one & other).sum()) / total


def _numpy(outputs: Mapping[str, torch.Tensor]) -> Answer:
    return {name: value.numpy() for name, value in outputs.items()}
