"""A prediction and scans for the tests of the report."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from scripts.imaging.geometry import Grid
from scripts.keys import RESEARCH_USE_ONLY

DAYS = [0.0, 200.0, 400.0, 800.0, 1200.0]
SURVIVAL = [1.0, 0.95, 0.9, 0.8, 0.7]
PREDICTION: dict[str, Any] = {
    "schema_version": "1",
    "patient_id": "CHUM-001",
    "notice": RESEARCH_USE_ONLY,
    "created": "2026-11-23T09:00:00+00:00",
    "model": {
        "name": "Network",
        "version": "0.2.0",
        "sha256": "ab12" * 16,
        "folds": 5,
        "tasks": ["seg", "hpv", "surv"],
        "trained_on": "300 digital phantoms, not for clinical use",
    },
    "survival": {
        "log_hazard": 0.831,
        "log_hazard_std": 0.21,
        "log_hazard_folds": [0.5, 0.7, 0.9, 1.0, 1.1],
        "percentile": 81.2,
        "risk_group": "high",
        "recurrence_free_survival": [
            {"years": 1, "days": 365.25, "survival": 0.91, "low": 0.88, "high": 0.93, "at_risk": 96},
            {"years": 2, "days": 730.5, "survival": 0.83, "low": 0.77, "high": 0.86, "at_risk": 80},
            {"years": 3, "days": 1095.75, "survival": 0.72, "low": 0.66, "high": 0.79, "at_risk": None},
        ],
        "beyond_follow_up": [5],
        "curve": {"days": DAYS, "survival": SURVIVAL, "low": SURVIVAL, "high": SURVIVAL},
        "doubt": "",
        "unavailable": "",
    },
    "hpv": {
        "inputs": ["image", "clinical"],
        "probability": 0.734,
        "probability_std": 0.06,
        "probability_folds": [0.7] * 5,
        "threshold": 0.55,
        "positive": True,
        "unavailable": "",
    },
    "tumour": {
        "volume_ml": 18.3,
        "lesions": 2,
        "suv_max": 14.2,
        "suv_mean": 7.3,
        "mtv_ml": 9.8,
        "tlg_g": 93.1,
        "classes": ["GTVp", "GTVn"],
        "mtv_rule": "41 % of the lesion's SUVmax",
        "lesion_list": [
            {
                **{"name": "GTVp", "label": "GTVp", "volume_ml": 12.1, "suv_max": 14.2, "suv_mean": 8.0},
                **{"suv_peak": 12.6, "mtv_ml": 6.1, "tlg_g": 66.4, "longest_diameter_mm": 38.4},
                "centre_mm": [-84.0, 92.0, 76.0],
            },
            {
                **{"name": "GTVn", "label": "GTVn", "volume_ml": 6.2, "suv_max": 9.0, "suv_mean": 6.0},
                **{"suv_peak": None, "mtv_ml": 3.7, "tlg_g": 26.7, "longest_diameter_mm": 21.0},
                "centre_mm": [-48.0, 116.0, 116.0],
            },
        ],
    },
    "clinical": [
        {"name": "age", "value": 61.0, "coded": 61.0, "missing": False},
        {"name": "gender", "value": 1.0, "coded": 2.0, "missing": False},
        {"name": "tobacco", "value": None, "coded": 0.0, "missing": True},
    ],
    "crop": {"method": "pet_brain", "flag": "", "centre_mm": [3.2, -11.0, 54.0], "size_mm": [224.0, 224.0, 224.0]},
    "quality": {
        "verdict": "warn",
        "forced": False,
        "checks": [
            {"name": "overlap", "value": 99.0, "unit": "%", "limit": "", "verdict": "ok", "message": "overlap is fine"},
            {
                "name": "ct_slice",
                "value": 6.0,
                "unit": "mm",
                "limit": "at most 3.34",
                "verdict": "warn",
                "message": "CT slice spacing: 6 mm: beyond the training range",
            },
        ],
    },
    "seconds": {"total": 12.7},
    "fingerprint": None,
    "files": {"mask": "CHUM-001__tumour.nii.gz"},
}


def prediction(**changes: Any) -> dict[str, Any]:
    """A full prediction in which whole parts may be replaced."""
    return {**copy.deepcopy(PREDICTION), **changes}


def uncalibrated() -> dict[str, Any]:
    """A prediction of a single fold that finds no tumour: no calibration, no threshold, nothing to measure."""
    bare = prediction()
    bare["survival"].update(
        log_hazard_folds=[0.4],
        log_hazard_std=None,
        percentile=None,
        risk_group=None,
        recurrence_free_survival=[],
        beyond_follow_up=[],
        curve=None,
        unavailable="no calibration was stored",
    )
    bare["hpv"].update(threshold=None, positive=None, unavailable="no threshold was stored", probability_folds=[0.7])
    bare["hpv"]["probability_std"] = None
    bare["tumour"].update(volume_ml=0.0, lesions=0, suv_max=None, suv_mean=None, mtv_ml=0.0, tlg_g=0.0, lesion_list=[])
    return bare


def without_tasks() -> dict[str, Any]:
    """A prediction in which all that can be null is."""
    return prediction(
        survival=None,
        hpv=None,
        tumour=None,
        clinical=[],
        crop={"method": "scan_centre", "flag": "", "centre_mm": None, "size_mm": None},
        quality={"verdict": "ok", "forced": False, "checks": []},
        seconds={"total": None},
    )


def scans() -> tuple[tuple[np.ndarray, Grid], tuple[np.ndarray, Grid], tuple[np.ndarray, Grid]]:
    """CT, PET on an oblique grid of its own, and a mask with a primary tumour (1) and a node (2)."""
    ct = np.full((24, 24, 24), -1000, dtype=np.int16)
    ct[4:20, 4:20, :] = 40
    mask = np.zeros(ct.shape, dtype=np.uint8)
    mask[9:13, 10:14, 8:12] = 1
    mask[5:8, 13:17, 13:17] = 2
    pet = np.ones((16, 16, 16), dtype=np.float32)
    pet[6:9, 6:9, 5:8] = 12.0
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    grid = Grid(ct.shape, np.diag([-8.0, 8.0, 8.0, 1.0]))
    return (ct, grid), (pet, Grid(pet.shape, turn @ np.diag([12.0, 12.0, 12.0, 1.0]))), (mask, grid)
