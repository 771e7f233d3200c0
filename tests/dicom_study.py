"""Synthetic DICOM series, as several modules' tests need them."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from conftest import make_tiny_cohort
from scripts.dicom.seg import write_seg
from scripts.imaging.lesions import MERGED, find_lesions

SOP_CLASS = {"CT": "1.2.840.10008.5.1.4.1.1.2", "PT": "1.2.840.10008.5.1.4.1.1.128"}
AXIAL = (1, 0, 0, 0, 1, 0)
# MONAI Label has pydicom 2, where the option has another name
WHOLE_FILE = {"write_like_original": False} if pydicom.__version__ < "3" else {"enforce_file_format": True}
SECRETS = ("Doe", "Jane", "ID-4711", "19991231", "ACC-0815", "1.2.3.4.")


def pet_tags(**changes):
    """Header of a PET in Bq/ml: 70 kg, 370 MBq injected at 10:00, scanned from 11:50, half-life 6600 s = 110 min."""
    item = Dataset()
    item.Radiopharmaceutical = "FDG"
    item.RadiopharmaceuticalStartTime = "100000"
    item.RadionuclideTotalDose = 370e6
    item.RadionuclideHalfLife = 6600
    tags = {
        **{"Units": "BQML", "DecayCorrection": "START", "CorrectedImage": ["DECY", "ATTN", "SCAT"]},
        **{"SeriesDate": "20200102", "SeriesTime": "115000", "PatientWeight": 70},
        **{"AcquisitionDate": "20200102", "AcquisitionTime": "115000.000000", "SeriesType": ["STATIC", "IMAGE"]},
        "RadiopharmaceuticalInformationSequence": [item],
    }
    for name, value in changes.items():
        if name.startswith("Radi") and not name.endswith("Sequence"):
            _set(item, name, value)
        else:
            tags[name] = value
    return tags


def _set(dataset, name, value):
    if value is None:
        if name in dataset:
            delattr(dataset, name)
    elif name.startswith("private"):
        group, creator, offset, vr, content = value
        dataset.private_block(group, creator, create=True).add_new(offset, vr, content)
    else:
        setattr(dataset, name, value)


def pet_header(**changes):
    dataset = Dataset()
    with disable_value_validation():  # odd values on purpose
        for name, value in pet_tags(**changes).items():
            _set(dataset, name, value)
    return dataset


def slice_dataset(modality, values, position, tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", SOP_CLASS.get(modality, SOP_CLASS["CT"]))
    meta.MediaStorageSOPInstanceUID = generate_uid(prefix="1.2.3.4.")
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    defaults = {
        **{"Modality": modality, "PatientName": "Doe^Jane", "PatientID": "ID-4711", "PatientBirthDate": "19991231"},
        **{"StudyInstanceUID": "1.2.3.4.1", "FrameOfReferenceUID": "1.2.3.4.2", "AccessionNumber": "ACC-0815"},
        **{"PatientSex": "F", "StudyDate": "20200102", "StudyTime": "100000", "StudyID": "1"},
        **{"SeriesDescription": "Doe Jane", "ReferringPhysicianName": "", "Manufacturer": "GE MEDICAL SYSTEMS"},
        **{"SeriesNumber": 1, "PositionReferenceIndicator": "", "Laterality": "", "PatientPosition": "HFS"},
        **{"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PixelSpacing": [2.5, 2.0], "SliceThickness": 3},
        **{"ImageOrientationPatient": list(AXIAL), "RescaleSlope": 1, "RescaleIntercept": 0, "InstanceNumber": 1},
        **{"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16},
        **{"HighBit": 15, "PixelRepresentation": int(values.dtype.kind == "i"), "SeriesInstanceUID": "1.2.3.4.3"},
    }
    for name, value in {**defaults, **tags}.items():
        _set(dataset, name, value)
    dataset.ImagePositionPatient = [round(float(p), 6) for p in position]
    dataset.Rows, dataset.Columns = values.shape
    dataset.PixelData = values.tobytes()
    return dataset


def write_series(
    folder, modality="CT", *, uid="1.2.3.4.3", depths=None, shape=(6, 5), origin=(-20.0, -30.0, 100.0), tags=None,
    each=None, edit=None, seed=0, syntax=None, stored=None,
):  # fmt: skip
    """A series of slices at ``depths`` mm along their normal, filed in no particular order; returns its stored values.

    ``each`` gives further tags by slice; ``edit`` changes a slice's position; ``syntax`` compresses; ``stored``
    (N, rows, columns) are the values, random ones by default.
    """
    depths = np.arange(12) * 3.0 if depths is None else np.asarray(depths, dtype=float)
    tags = {**(pet_tags() if modality == "PT" else {}), **(tags or {}), "SeriesInstanceUID": uid}
    axes = np.array(tags.get("ImageOrientationPatient", AXIAL), dtype=float)
    normal = np.cross(axes[:3], axes[3:])
    rng = np.random.default_rng(seed)
    dtype = tags.pop("dtype", np.int16)
    low, high = (-1000, 1000) if np.dtype(dtype).kind == "i" else (0, 4000)
    if stored is None:
        stored = rng.integers(low, high, (len(depths), *shape)).astype(dtype)
    names = rng.permutation(len(depths))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with disable_value_validation():
        for k, depth in enumerate(depths):
            position = np.array(origin) + depth * normal
            if edit is not None:
                position = edit(k, position)
            own = {**tags, "InstanceNumber": int(names[k]) + 1, **(each(k) if each else {})}
            dataset = slice_dataset(modality, stored[k], position, own)
            if syntax is not None:
                dataset.compress(syntax, generate_instance_uid=False)
            dataset.save_as(Path(folder) / f"IM{names[k]:04d}", **WHOLE_FILE)
    return stored


def write_pet_ct(folder, ct_hu, pet_suv, spacing_mm, tags=None, number=1, pet=None):
    """A patient's CT and PET (X, Y, Z) as two series of one study, both on one grid with its origin in world zero.

    The PET is stored in steps of 0.01 SUV, as Bq/ml. ``tags`` go into both, ``pet`` into the PET alone.
    """
    frame = {"FrameOfReferenceUID": f"1.2.3.4.20{number}", "StudyInstanceUID": f"1.2.3.4.10{number}", **(tags or {})}
    depths = np.arange(ct_hu.shape[2]) * spacing_mm
    geometry = {"depths": depths, "origin": (0.0, 0.0, 0.0)}
    common = {"PixelSpacing": [spacing_mm, spacing_mm], **frame}
    flipped = [np.ascontiguousarray(volume[::-1, ::-1].transpose(2, 1, 0)) for volume in (ct_hu, pet_suv)]
    origin = (-(ct_hu.shape[0] - 1) * spacing_mm, -(ct_hu.shape[1] - 1) * spacing_mm, 0.0)  # LPS+ of the flipped array
    geometry["origin"] = origin
    write_series(
        Path(folder) / "CT", uid=f"1.2.3.4.30{number}", tags={**common, "SeriesNumber": 2},
        stored=flipped[0].astype(np.int16), **geometry,
    )  # fmt: skip
    dose_at_scan = 370e6 * 2.0 ** (-6600 / 6600)  # as pet_tags() has it: 110 min of 110 min half-life
    slope = 0.01 * dose_at_scan / 70_000
    write_series(
        Path(folder) / "PET", "PT", uid=f"1.2.3.4.40{number}",
        tags={**common, "SeriesNumber": 3, "RescaleSlope": slope, "dtype": np.uint16, **(pet or {})},
        stored=np.round(flipped[1] * 100).astype(np.uint16), **geometry,
    )  # fmt: skip


def write_tiny_study(folder, patient):
    """Write the first patient of the tiny cohort as DICOM under this PatientID, and return its CT."""
    with tempfile.TemporaryDirectory() as images:
        scans = make_tiny_cohort(Path(images), 1) / "Task 1" / "CHUM-001" / "CHUM-001"
        ct, pet = (np.asarray(nibabel.load(f"{scans}__{kind}.nii.gz").dataobj) for kind in ("CT", "PT"))
    write_pet_ct(folder, ct, pet, 8.0, {"PatientID": patient})
    return ct


def write_mask(path, mask, ct, model, classes=MERGED):
    """The lesions of a mask on a CT as DICOM SEG."""
    lesions = find_lesions(mask, ct.grid, classes)
    return write_seg(path, lesions.on(mask.shape), lesions.found, ct, model=model)


def dciodvfy_errors(path):
    """What the validator of dicom3tools calls an error; None where it is not installed."""
    if shutil.which("dciodvfy") is None:
        return None
    result = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith(("Error", "Abort"))]
