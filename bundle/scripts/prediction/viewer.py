"""A patient's scans in the browser: ``viewer.html``, one file with CT, PET, mask and the viewer niivue.

niivue (https://github.com/niivue/niivue, BSD-2-Clause) is not part of this software: its npm package is read from a
file, see :data:`HOW_TO_GET`. The page shows what ``prediction.json`` says; nothing is computed here.
"""

from __future__ import annotations

import base64
import gzip
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from markupsafe import Markup

from scripts import keys
from scripts.cohorts.files import write_text
from scripts.imaging.geometry import Grid, bounding_window, box_grid, resample
from scripts.imaging.lesions import COLOURS, MERGED
from scripts.prediction.figures import CT_WINDOW_HU, FUSION, PET_WINDOW_SUV, PLANES, TUMOUR_COLOURS, Scan
from scripts.prediction.findings import lesion_name, notice_of, verdict_of, warnings_of
from scripts.prediction.pages import render
from scripts.prediction.report import class_masks, lesion_rows, scans_of
from scripts.prediction.summary import VIEWER as VIEWER_HTML

NIIVUE_VERSION = "0.69.0"
HOW_TO_GET = (
    f"get niivue-niivue-{NIIVUE_VERSION}.tgz with: npm pack @niivue/niivue@{NIIVUE_VERSION}; then give its path"
)
CODE = "package/dist/niivue.umd.js"  # in the npm package
LIMIT_BYTES = 8_000_000  # of the page
PET_BYTES = 1_600_000  # of the PET in it
REST_BYTES = 100_000  # of text, style and mask
SMALLEST_BOX_MM, MARGIN_MM = 240.0, 20.0
CT_STEP_HU, PET_STEP_SUV = 2.0, 0.02  # of values: no more than a grey level on the screen
CT_VOXELS_MM = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # if its own are too many
PET_VOXELS_MM = (2.0, 2.5, 3.0, 4.0)  # niivue does not interpolate what it lays over the CT
AIR_HU = -1024.0
CT_WINDOWS_HU = {"soft tissue": CT_WINDOW_HU, "bone": (-450.0, 1050.0)}
NIFTI_LABELS = 1002  # intent code
FALLBACK_VIEWS = tuple((FUSION, plane) for plane in range(len(PLANES)))


class ViewerError(ValueError):
    """The page cannot be made; the message says why and what to do."""


def read_niivue(path: str | Path) -> Markup:
    """The code in the npm package of niivue (``.tgz``), fit to stand in a page.

    Raises:
        ViewerError: there is no such file, or it is another one; says how to get it.
    """
    try:
        with tarfile.open(Path(path).expanduser()) as package:
            member = package.extractfile(CODE)
            code = "" if member is None else member.read().decode("utf-8")
    except (OSError, tarfile.TarError, KeyError, UnicodeDecodeError, EOFError) as error:
        raise ViewerError(f"niivue cannot be read from {path} ({error}); {HOW_TO_GET}") from error
    # within strings, where alone these stand, an escaped letter is the same
    return Markup(re.sub(r"<(?=/?script|!--)", r"\\x3c", code, flags=re.IGNORECASE))


class ViewerWriter:
    """Writes the viewer of each patient; one of the ``products`` of :class:`.PredictionWriter`."""

    def __init__(self, niivue: str | Path) -> None:
        self.niivue = read_niivue(niivue)

    def __call__(self, case: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
        """Write one patient's viewer; arguments as for :class:`.ReportWriter`.

        Yields:
            Name and file of what was written.
        """
        ct, pet, mask = scans_of(case, result)
        yield "viewer", write_viewer(folder, result[keys.PREDICTION], ct, pet, mask, self.niivue).name


def write_viewer(
    folder: str | Path, prediction: Mapping[str, Any], ct: Scan, pet: Scan, mask: Scan | None, niivue: Markup
) -> Path:
    """Write ``viewer.html``.

    The scans are cropped to the tumour with 20 mm around it, at least 240 mm. The mask keeps its voxels, and the CT,
    too, where the page stays below 8 MB; else it is resampled (linearly) to the smallest of :data:`CT_VOXELS_MM` with
    which it does. The PET is resampled to voxels of 2 mm, or larger ones where it takes more than 1.6 MB.

    Raises:
        ViewerError: the page would be larger than 8 MB.
    """
    tumour = prediction.get("tumour") or {}
    classes, lesions = tumour.get("classes") or MERGED, tumour.get("lesion_list") or []
    pictures = lesion_rows(ct, pet, {} if mask is None else class_masks(mask, classes), lesions, FALLBACK_VIEWS)
    box = shown_box(ct[1], mask)
    volumes = {"pet": packed(pet, box, PET_STEP_SUV, PET_BYTES, [np.full(3, size) for size in PET_VOXELS_MM], 0.0)}
    if mask is not None:
        cropped, grid = crop(*mask, box)
        volumes["mask"] = nifti(cropped.astype(np.uint8), grid, labels=True)
    used = sum(map(len, volumes.values())) + sum(len(png) * 4 // 3 for row in pictures for png, _ in row.tiles)
    room = LIMIT_BYTES - REST_BYTES - len(niivue.encode()) - used
    own = ct[1].spacing[np.abs(ct[1].affine[:3, :3]).argmax(axis=1)]
    volumes["ct"] = packed(ct, box, CT_STEP_HU, room, [None, *(np.maximum(own, size) for size in CT_VOXELS_MM)], AIR_HU)
    middle = (box[0] + box[1]) / 2
    data = {
        "volumes": volumes,
        "windows": [{"name": name, "hu": limits} for name, limits in CT_WINDOWS_HU.items()],
        "suv": PET_WINDOW_SUV,
        "colours": [COLOURS[name] for name in classes],
        "start": lesions[0]["centre_mm"] if lesions else middle.tolist(),
    }
    title = f"PET/CT viewer: {prediction['patient_id'] or 'patient without a name'}"
    page = render(
        "viewer.html",
        title=title,
        sortable=False,
        verdict=verdict_of(prediction),
        warnings=warnings_of(prediction),
        notice=notice_of(prediction),
        windows=list(CT_WINDOWS_HU),
        suv=PET_WINDOW_SUV,
        lesions=[_row(lesion, number) for number, lesion in enumerate(lesions, start=1)],
        pictures=pictures,
        data=data,
        niivue=niivue,
        version=NIIVUE_VERSION,
    )
    if len(page.encode()) > LIMIT_BYTES:
        raise ViewerError(f"{VIEWER_HTML} would have {len(page.encode()) / 1e6:.1f} MB, more than the 8 MB allowed")
    write_text(Path(folder) / VIEWER_HTML, page)
    return Path(folder) / VIEWER_HTML


def _row(lesion: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What the list says of a lesion."""
    uptake = lesion.get("suv_max")
    return {
        "name": lesion_name(lesion, number),
        "colour": TUMOUR_COLOURS[lesion.get("label") or MERGED[0]],
        "volume": f"{lesion['volume_ml']:.1f} ml",
        "uptake": "SUVmax unknown" if uptake is None else f"SUVmax {uptake:.1f}",
        "centre": list(lesion["centre_mm"]),
    }


def shown_box(ct: Grid, mask: Scan | None) -> np.ndarray:
    """Lowest and highest corner of what is shown, world mm (RAS+), (2, 3): the tumour with a margin, within the CT.

    Without a tumour the middle of the CT.

    Example:
        >>> shown_box(Grid((300, 300, 100), np.eye(4)), None).tolist()
        [[29.5, 29.5, -0.5], [269.5, 269.5, 99.5]]
    """
    window = None if mask is None else bounding_window(mask[0])
    low, high = (ct.centre, ct.centre) if window is None or mask is None else mask[1].crop(window).bounds
    half = np.maximum((high - low) / 2 + MARGIN_MM, SMALLEST_BOX_MM / 2)
    middle = (low + high) / 2
    return np.clip([middle - half, middle + half], *ct.bounds)


def crop(array: np.ndarray, grid: Grid, box: np.ndarray) -> Scan:
    """The voxels of a scan between two corners (2, 3) in world mm (RAS+), at least one, and their grid."""
    corners = np.stack(np.meshgrid(*box.T, indexing="ij"), axis=-1).reshape(-1, 3)
    index = grid.to_index(corners)
    last = np.array(grid.shape) - 1
    first, final = (np.clip(end, 0, last).astype(int) for end in (np.floor(index.min(0)), np.ceil(index.max(0))))
    x, y, z = (slice(int(a), int(b) + 1) for a, b in zip(first, final, strict=True))
    return array[x, y, z], grid.crop((x, y, z))


def packed(
    scan: Scan, box: np.ndarray, step: float, most: int, voxels: Sequence[np.ndarray | None], fill: float
) -> str:
    """The part of a scan in a box as :func:`nifti`, of at most ``most`` characters.

    Args:
        scan: array (X, Y, Z) and its grid.
        box: lowest and highest corner, world mm (RAS+), (2, 3).
        step: values are rounded to multiples of it (larger where they do not fit into 16 bits).
        most: characters.
        voxels: sizes along x, y and z in mm, of which the first that is small enough is taken; None: its own voxels.
        fill: value outside the field of view.

    Raises:
        ViewerError: none is.
    """
    part, grid = crop(*scan, box)
    text = ""
    for size in voxels:
        if size is None:
            text = _rounded(part, grid, step)
        else:
            count = np.maximum(1, np.round((box[1] - box[0]) / size)).astype(int)
            target = box_grid(box.mean(axis=0), count.tolist(), size.tolist())
            text = _rounded(resample(part, grid, target, "linear", fill), target, step)
        if len(text) <= most:
            return text
    raise ViewerError(f"a scan takes {len(text) / 1e6:.1f} MB in {VIEWER_HTML}: no room in a page of 8 MB")


def _rounded(array: np.ndarray, grid: Grid, step: float) -> str:
    values = np.nan_to_num(np.asarray(array, dtype=np.float32), posinf=0.0, neginf=0.0)
    slope = max(step, float(np.abs(values).max()) / np.iinfo(np.int16).max)
    return nifti(np.round(values / slope).astype(np.int16), grid, slope)


def nifti(array: np.ndarray, grid: Grid, slope: float = 1.0, labels: bool = False) -> str:
    """A volume as compressed NIfTI in base64.

    Args:
        array: (X, Y, Z) integers.
        grid: of the array.
        slope: the values are ``array * slope``.
        labels: the values are numbers of classes.
    """
    header = nibabel.Nifti1Header()  # nibabel's writer of images would choose the slope itself
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(grid.affine, code=1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, 0.0)
    header["intent_code"] = NIFTI_LABELS if labels else 0
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    header["pixdim"][1:4] = grid.spacing
    raw = header.binaryblock + bytes(4) + array.tobytes(order="F")
    return base64.b64encode(gzip.compress(raw, compresslevel=6, mtime=0)).decode("ascii")
