"""MONAI dictionary transforms from a case (see :mod:`scripts.keys`) to the network's input, and back to the CT's grid.

The order in the configs: ``LoadScansd, LocaliseBoxd, CheckQualityd`` (:mod:`scripts.imaging.quality`),
``ResampleToBoxd, ScaleIntensityPETCTd, CodeClinicald`` and ``ToNetworkItemd``. The transforms here are deterministic
and have plain parameters only, so that a cache can be keyed by them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from scripts import keys
from scripts.cohorts.clinical import DEFAULT_FEATURES, code_clinical, feature_named, parse_value
from scripts.cohorts.thresholds import HALF, label_map
from scripts.imaging.geometry import Grid, box_grid, field_of_view_fault, resample, share_inside, to_ct_window
from scripts.imaging.images import read_scan
from scripts.imaging.lesions import without_faint_lesions
from scripts.imaging.localise import Proposer, locate_head_neck, locate_mask

CT_FILL = -1024.0  # air, in HU
PET_FILL = 0.0

ITEM_KEYS = (
    *(keys.PATIENT_ID, keys.IMAGE, keys.CLINICAL),
    *(keys.CT_SHAPE, keys.CT_AFFINE, keys.BOX_AFFINE, keys.CROP_METHOD, keys.CROP_FLAG),
)
# in addition: the native PET, the checks, the clinical values, the start time
INFERENCE_KEYS = (*ITEM_KEYS, keys.PET, keys.QUALITY, keys.CLINICAL_VALUES, keys.STARTED)
LABEL_KEYS = (
    *(keys.CENTRE, keys.SEG, keys.SEG_KNOWN, keys.SEG_CLASSES_KNOWN, keys.SEG_INSIDE),
    *(keys.HPV, keys.HPV_KNOWN, keys.TIME, keys.EVENT, keys.SURV_KNOWN),
)
TRAINING_KEYS = (*ITEM_KEYS, *LABEL_KEYS, keys.QUALITY)


class LoadScansd(MapTransform):
    """Read CT, PET and mask, or use them as they are if they are in memory.

    An entry may be a path, a ``MetaTensor`` of (X, Y, Z) or (1, X, Y, Z), a pair (array, affine), or an object whose
    method ``read()`` gives such a pair (a DICOM series). It becomes a ``MetaTensor`` (1, X, Y, Z) in the file's own
    data type, with its affine to world mm (RAS+). The scans are read in parallel. Also sets ``started``, the clock, and
    ``doubts``, what is doubtful in the headers of files and objects, a text each.

    Args:
        keys: what to load. The mask may be absent or None, the others may not.

    Raises:
        ValueError: when the CT or the PET is missing, or cannot be a scan of a body by its size, naming the patient.
        scripts.imaging.images.ImageReadError: when a file cannot be used.
    """

    def __init__(self, keys: KeysCollection = (keys.CT, keys.PET, keys.MASK)) -> None:
        super().__init__(keys, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load the case's scans."""
        d = dict(data)
        d[keys.STARTED] = torch.tensor(time.monotonic(), dtype=torch.float64)
        for key in self.keys:
            if d.get(key) is None and key != keys.MASK:
                raise ValueError(f"patient {d.get(keys.PATIENT_ID, '?')}: no {str(key).upper()} image")
        present = [key for key in self.key_iterator(d) if d[key] is not None]
        with ThreadPoolExecutor(max_workers=max(1, len(present))) as pool:
            loaded = list(pool.map(_load, present, [d[key] for key in present]))
        d[keys.DOUBTS] = []
        for key, (scan, doubts) in zip(present, loaded, strict=True):
            if fault := field_of_view_fault(scan.shape[1:], np.asarray(scan.affine)):
                raise ValueError(f"patient {d.get(keys.PATIENT_ID, '?')}: the {str(key).upper()} has {fault}")
            d[key] = scan
            d[keys.DOUBTS] += doubts
        return d


class LocaliseBoxd(Transform):
    """Determine the position of the network's box.

    Sets the box's affine, the CT's shape and affine (plain tensors), and the rule and its doubts as text.

    Args:
        roi_size: voxels of the box along x, y, z.
        spacing_mm: voxel size of the box in mm.
        use_mask: centre on the tumour's mask where there is a non-empty one (training); otherwise on the head and neck.
        proposer: proposes tumours where there is no mask, as :class:`.CoarsePass`; None for the rules only.
    """

    def __init__(
        self,
        roi_size: int | Sequence[int],
        spacing_mm: float | Sequence[float],
        use_mask: bool = False,
        proposer: Proposer | None = None,
    ) -> None:
        self.roi_size, self.spacing_mm, self.use_mask, self.proposer = roi_size, spacing_mm, use_mask, proposer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Place the box."""
        d = dict(data)
        ct, ct_grid = array_and_grid(d[keys.CT])
        mask = d.get(keys.MASK) if self.use_mask else None
        if mask is not None and array_and_grid(mask)[0].any():
            where = locate_mask(*array_and_grid(mask), self.roi_size, self.spacing_mm)
        else:
            pet, pet_grid = array_and_grid(d[keys.PET])
            where = locate_head_neck(ct, ct_grid, pet, pet_grid, self.roi_size, self.spacing_mm, self.proposer)
        d[keys.BOX_AFFINE] = torch.from_numpy(box_grid(where.centre_mm, self.roi_size, self.spacing_mm).affine)
        d[keys.CT_SHAPE] = torch.tensor(ct_grid.shape, dtype=torch.int64)
        d[keys.CT_AFFINE] = torch.from_numpy(ct_grid.affine)
        d[keys.CROP_METHOD], d[keys.CROP_FLAG] = where.method, where.flag
        return d


class ResampleToBoxd(Transform):
    """Resample CT, PET and mask to the network's box, each in one interpolation, and drop the native CT and mask.

    Sets ``image`` (2, R, R, R) float32, CT in HU and PET in SUV, by cubic spline; ``seg`` (1, R, R, R) float32, 2
    where the nearest mask voxel is GTVn, 1 where it is GTVp (or any other value but 0), zeros without a mask;
    ``seg_known``; ``seg_classes_known``, whether the mask holds GTVn anywhere, so that it tells primary tumour and
    nodes apart; and ``seg_inside``, the share of the mask's voxels that lie in the box.
    """

    def __init__(self, roi_size: int | Sequence[int]) -> None:
        self.roi_size = roi_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample the case's scans onto the box."""
        d = dict(data)
        box = _box(d[keys.BOX_AFFINE], self.roi_size)
        ct, pet, mask = d.pop(keys.CT), d[keys.PET], d.pop(keys.MASK, None)
        image = np.stack(
            [resample(*array_and_grid(ct), box, fill=CT_FILL), resample(*array_and_grid(pet), box, fill=PET_FILL)]
        )
        found, inside, apart = np.zeros(box.shape, dtype=np.float32), float("nan"), False
        if mask is not None:
            labels, grid = array_and_grid(mask)
            nearest = resample(labels, grid, box, "nearest")
            found = np.where(nearest == keys.GTVN, keys.GTVN, np.where(nearest != 0, keys.GTVP, 0)).astype(np.float32)
            inside, apart = share_inside(labels, grid, box), bool((labels == keys.GTVN).any())
        d[keys.IMAGE] = MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(box.affine))
        d[keys.SEG] = MetaTensor(torch.from_numpy(found[None]), affine=torch.from_numpy(box.affine))
        d[keys.SEG_KNOWN], d[keys.SEG_CLASSES_KNOWN], d[keys.SEG_INSIDE] = mask is not None, apart, inside
        return d


class ScaleIntensityPETCTd(Transform):
    """Scale the two channels of the image (2, R, R, R) to [0, 1].

    CT: clipped to the window, then (value - min) / (max - min) over the box, as in the paper. PET: the same without
    clipping, or, with ``pet_window``, the fixed SUV window mapped to [0, 1], which keeps SUV comparable between
    patients. A channel without contrast becomes zeros.

    Args:
        ct_window: lowest and highest HU kept.
        pet_window: lowest and highest SUV kept, None for the paper's min-max.

    Raises:
        ValueError: when a channel holds NaN or infinity, naming the patient and the image.
    """

    def __init__(
        self, ct_window: Sequence[float] = (-1000.0, 1000.0), pet_window: Sequence[float] | None = None
    ) -> None:
        for name, window in (("ct_window", ct_window), ("pet_window", pet_window)):
            if window is not None and not (len(window) == 2 and window[0] < window[1]):
                raise ValueError(f"{name} must be (lowest, highest), got {window}")
        self.ct_window, self.pet_window = tuple(ct_window), None if pet_window is None else tuple(pet_window)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale the image."""
        d = dict(data)
        given = d[keys.IMAGE]
        image = given.as_tensor() if isinstance(given, MetaTensor) else given
        for channel, name in zip(image, ("CT", "PET"), strict=True):
            if not bool(torch.isfinite(channel).all()):
                patient = d.get(keys.PATIENT_ID, "?")
                raise ValueError(f"patient {patient}: the {name} holds values that are not finite numbers")
        ct = _min_max(image[0].clamp(*self.ct_window))
        pet = _min_max(image[1]) if self.pet_window is None else _to_window(image[1], *self.pet_window)
        scaled = torch.stack([ct, pet])
        d[keys.IMAGE] = MetaTensor(scaled, meta=given.meta) if isinstance(given, MetaTensor) else scaled
        return d


class CodeClinicald(Transform):
    """Code the clinical values for the network, (F,) float32 in the order of ``features``, by :func:`.code_clinical`.

    A dictionary of raw values is coded; None or an absent key means that all are missing; a coded vector is kept. Also
    sets ``clinical_values``: a JSON text, which can be collated, with a list of ``name``, ``value`` (None where
    missing), ``coded`` (None for those in ``clinical_others``, which the network does not read) and ``missing``.

    Raises:
        ValueError: when a coded vector has another length than ``features``.
    """

    def __init__(self, features: Sequence[str] = DEFAULT_FEATURES) -> None:
        self.features = tuple(features)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Code the values."""
        d = dict(data)
        given = d.get(keys.CLINICAL)
        raw = given is None or isinstance(given, Mapping)
        coded = torch.as_tensor(code_clinical(given, self.features) if raw else given, dtype=torch.float32)
        if coded.shape != (len(self.features),):
            raise ValueError(
                f"patient {d.get(keys.PATIENT_ID, '?')}: coded clinical values have shape {tuple(coded.shape)}, "
                f"expected ({len(self.features)},) for {', '.join(self.features)}"
            )
        d[keys.CLINICAL] = coded
        sources, others = d.get(keys.CLINICAL_SOURCE) or {}, d.get(keys.CLINICAL_OTHERS) or {}
        rows = _clinical_rows(self.features, coded.tolist(), (given or {}) if raw else None)
        rows += [{"name": name, "value": value, "coded": None, "missing": False} for name, value in others.items()]
        rows = [{**row, "source": sources[row["name"]]} if row["name"] in sources else row for row in rows]
        d[keys.CLINICAL_VALUES] = json.dumps(rows, allow_nan=False)
        return d


class ToNetworkItemd(MapTransform):
    """Keep only the keys that network, loss and writer need; numbers become float32 tensors, flags bool ones."""

    def __init__(self, keys: KeysCollection = TRAINING_KEYS) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pick the network's item."""
        return {key: _as_tensor(data[key]) for key in self.key_iterator(dict(data))}


class RestoreMaskd(Transform):
    """Convert the tumour probability on the box into a mask on the CT's grid, and measure its volume.

    Reads ``seg_prob`` (1, R, R, R), the box's affine and the CT's shape and affine. Sets ``pred`` (1, X, Y, Z) uint8,
    a ``MetaTensor`` with the CT's affine, and ``volume_ml``, the mask's volume. With the classes' probabilities
    ``class_prob`` (C, R, R, R) the mask holds k where the k-th class is the most probable on the CT's grid, otherwise
    1. A case without the probability (a model without the segmentation task) is unchanged.

    Args:
        threshold: probability above which a voxel is tumour.
        peak: probability that some voxel of a lesion must exceed (:func:`.without_faint_lesions`).
    """

    def __init__(self, threshold: float = HALF, peak: float = HALF) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        if not 0 < peak < 1:
            raise ValueError(f"peak must lie in (0, 1), got {peak}")
        self.threshold, self.peak = threshold, peak

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore the mask."""
        d = dict(data)
        if d.get(keys.SEG_PROB) is None:
            return d
        prob = _plain(d[keys.SEG_PROB]).float()
        prob = torch.from_numpy(without_faint_lesions(prob[0].cpu().numpy(), self.peak, self.threshold))[None]
        if d.get(keys.CLASS_PROB) is not None:
            prob = torch.cat([prob, _plain(d[keys.CLASS_PROB]).float()])
        shape = [int(n) for n in d[keys.CT_SHAPE]]
        ct = Grid((shape[0], shape[1], shape[2]), _plain(d[keys.CT_AFFINE]).numpy())
        box = _box(d[keys.BOX_AFFINE], prob.shape[1:])
        (window, tumour), *classes = (to_ct_window(channel.numpy(), box, ct) for channel in prob)
        each = torch.from_numpy(np.stack([values for _, values in classes])) if classes else None
        mask = np.zeros(ct.shape, dtype=np.uint8, order="F")  # the order of a NIfTI file
        mask[window] = label_map(torch.from_numpy(tumour)[None], each, dim=0, threshold=self.threshold)[0].numpy()
        d[keys.PRED] = MetaTensor(torch.from_numpy(mask[None]), affine=torch.from_numpy(ct.affine))
        d[keys.VOLUME_ML] = float(np.count_nonzero(mask[window])) * ct.voxel_ml
        return d


def array_and_grid(scan: MetaTensor) -> tuple[np.ndarray, Grid]:
    """The (X, Y, Z) array of a loaded volume (1, X, Y, Z), sharing its memory, and its grid."""
    array = _plain(scan)[0].numpy()
    return array, Grid(array.shape, np.asarray(scan.affine))


def _load(key: Hashable, item: Any) -> tuple[MetaTensor, list[str]]:
    """One scan as a channel-first MetaTensor, and what is doubtful in its headers."""
    if isinstance(item, (str, Path)):
        array, affine, doubts = read_scan(item)
        named = [f"{str(key).upper()}: {doubt}" for doubt in doubts]
        return _meta_tensor(array, affine, filename_or_obj=str(item)), named
    if isinstance(item, MetaTensor):
        return (item if item.ndim == 4 else MetaTensor(item.as_tensor()[None], meta=item.meta)), []
    found = list(getattr(item, "doubts", ()))
    if callable(getattr(item, "read", None)):
        item = item.read()
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return _meta_tensor(*map(np.asarray, item)), found
    kinds = "a path, a MetaTensor, a pair (array, affine) or an object whose read() gives such a pair"
    raise ValueError(f"a scan is {kinds}, got {type(item).__name__}")


def _meta_tensor(array: np.ndarray, affine: np.ndarray, **meta: str) -> MetaTensor:
    """Wrap an array without copying it."""
    values = torch.from_numpy(_Shared.of(array if array.ndim == 4 else array[None]))
    return MetaTensor(values, affine=torch.as_tensor(affine, dtype=torch.float64), meta=dict(meta))


class _Shared:
    """A view of a read-only array (of a decoded file) that torch accepts without a warning; nothing writes to it.

    The warning cannot be filtered here, since Python's warning filters are shared by all threads.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}

    @classmethod
    def of(cls, array: np.ndarray) -> np.ndarray:
        """The array itself if it is writable."""
        return array if array.flags.writeable else np.asarray(cls(array))


def _plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU without metadata."""
    return (value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)).detach().cpu()


def _clinical_rows(
    features: Sequence[str], coded: Sequence[float], given: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Clinical values and their coding; for ``given`` None the values are derived from the coding."""
    rows = []
    for name, code in zip(features, coded, strict=True):
        if given is not None:
            value = parse_value(name, given.get(name))
        else:  # 0 is missing, levels are shifted by one (see code_clinical)
            value = None if code == 0 else code - (1.0 if feature_named(name).levels else 0.0)
        rows.append({"name": name, "value": value, "coded": code, "missing": value is None})
    return rows


def _box(affine: torch.Tensor, roi_size: int | Sequence[int]) -> Grid:
    x, y, z = np.broadcast_to(np.asarray(roi_size, dtype=int), 3).tolist()
    return Grid((x, y, z), _plain(affine).numpy())


def _min_max(values: torch.Tensor) -> torch.Tensor:
    return _to_window(values, float(values.min()), float(values.max()))


def _to_window(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (values.clamp(low, high) - low) / (high - low) if high > low else torch.zeros_like(values)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return torch.tensor(bool(value))
    if isinstance(value, (int, float, np.number)):
        return torch.tensor(float(value), dtype=torch.float32)
    return value
