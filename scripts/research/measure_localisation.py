"""Share of the tumour inside the network's box, by each rule and by their combination, on digital phantoms.

``python scripts/research measure_localisation --checkpoint MODEL.pt`` draws patients of the demonstration cohort in
every position and with every fault of :data:`SCENARIOS`, places the box without their masks, and writes
``localisation.json`` (summary), ``localisation.md`` (the table) and ``cases.csv`` (one row for each box). Scans have
the hospitals' extents with voxels of 4 and 5 mm, at which localisation works; ``demonstration`` is the cohort as
``make_cohort`` makes it. Phantoms show how the rules behave, not how often a real scan is difficult.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from command_line import run_tool

import phantom
from phantom import Ellipsoid, Part, Patient, Pose
from phantom.cohort import NOTICE
from scripts.cohorts.files import write_text, written_whole
from scripts.imaging.geometry import Grid, box_grid, share_inside
from scripts.imaging.localise import (
    ALWAYS,
    METHOD_CENTRE,
    METHOD_PET_BRAIN,
    Anchor,
    Candidate,
    anchor_at_body_top,
    find_anchor,
    pet_faults,
    place_box,
)
from scripts.keys import GTVP
from scripts.prediction.coarse import COARSE_SPACING_MM, CoarsePass

CT_MM, PET_MM = 4.0, 5.0
CROPS = {"224 mm": (32, 7.0), "256 mm": (128, 2.0)}
LOST = 0.99  # a box that holds less of the primary tumour has lost it
VERTEX_Z, TRUNK_Z = 192.0, -920.0  # of the phantom's body, see phantom/anatomy.py
BRAIN, TOP, CENTRE, NETWORK = "PET brain", "CT body top", "scan centre", "network alone"
RULES, DOUBT, ALL = "rules", "rules + network in doubt", "rules + network always"

Scans = tuple[np.ndarray, Grid, np.ndarray, Grid]
# the anatomy, None where a rule has no answer; the network's candidates, None where it was not asked; processor seconds
Answer = tuple[Anchor | None, list[Candidate] | None, float]


@dataclass(frozen=True)
class Scene:
    """A patient's scans (X, Y, Z): CT in HU, PET in SUV, tumour mask on the CT grid."""

    ct: np.ndarray
    ct_grid: Grid
    pet: np.ndarray
    pet_grid: Grid
    mask: np.ndarray


@dataclass(frozen=True)
class Scenario:
    """How a phantom is scanned."""

    says: str  # what is special, for the table
    # lowest and highest body coordinate in view, mm; None for the hospital's own extents
    ct_z: tuple[float, float] | None = None
    pet_z: tuple[float, float] | None = None
    parts: tuple[Part, ...] = ()  # painted over the anatomy
    body: tuple[tuple[str, float], ...] = ()  # uptake values that replace the patient's
    tilt_deg: float = 0.0  # angle of the voxel grid to the patient, about x and z
    finish: Callable[[Scene], Scene] | None = None  # what is done to the finished scans


def turned(scene: Scene, axes: tuple[int, int, int], signs: tuple[int, int, int]) -> Scene:
    """The same images in another order of the array's axes, each of them forwards or backwards."""

    def turn(array: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
        affine = np.eye(4)
        affine[:3, :3] = grid.affine[:3, list(axes)] * signs
        last = np.array([(grid.shape[a] - 1) * (s < 0) for a, s in zip(axes, signs, strict=True)])
        affine[:3, 3] = grid.affine[:3, 3] - affine[:3, :3] @ last
        turned = array.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
        return turned, Grid(turned.shape, affine)

    (ct, ct_grid), (pet, pet_grid) = turn(scene.ct, scene.ct_grid), turn(scene.pet, scene.pet_grid)
    return Scene(ct, ct_grid, pet, pet_grid, turn(scene.mask, scene.ct_grid)[0])


def without_signal(scene: Scene) -> Scene:
    """A PET of zeros."""
    return dataclasses.replace(scene, pet=np.zeros_like(scene.pet))


ARMS_UP = tuple(phantom.raised_arms())
UP, DOWN = (TRUNK_Z, VERTEX_Z + 190), (TRUNK_Z, VERTEX_Z + 15)
INJECTED_UP = Ellipsoid((100, -20, 300), (16, 16, 40), None, 300.0)
INJECTED_DOWN = Ellipsoid((214, -40, -400), (16, 16, 40), None, 300.0)
FLIPPED = partial(turned, axes=(0, 1, 2), signs=(1, 1, -1))
PERMUTED = partial(turned, axes=(2, 0, 1), signs=(-1, 1, -1))
DEFAULT = "demonstration"
SCENARIOS: dict[str, Scenario] = {
    DEFAULT: Scenario("the demonstration cohort as made by make_cohort (0.3 m, 6 to 7 mm voxels)"),
    "native": Scenario("each hospital's extents, 0.3 to 0.9 m long"),
    "whole_body": Scenario("1.1 m: skull to pelvis, with heart, kidneys and bladder", DOWN, DOWN),
    "head_at_low_index": Scenario("slices stored from the head down", finish=FLIPPED),
    "axes_permuted": Scenario("sagittal slices, stored backwards", finish=PERMUTED),
    "oblique": Scenario("voxel grid at 12 degrees to the patient", tilt_deg=12.0),
    "brain_cut_off": Scenario("scan starts in the middle of the brain", (-140, 125), (-140, 125)),
    "no_brain_in_view": Scenario("scan starts below the brain", (-250, 50), (-250, 50)),
    "no_brain_uptake": Scenario("brain as cold as muscle", body=(("brain", 0.8),)),
    "arms_up": Scenario("1.3 m, arms beside and above the head", UP, UP, ARMS_UP),
    "injection_site_up": Scenario("arms up, 300 SUV in the forearm", UP, UP, (*ARMS_UP, INJECTED_UP)),
    "injection_site_down": Scenario("1.1 m, 300 SUV in the arm at the side", DOWN, DOWN, (INJECTED_DOWN,)),
    "blank_pet": Scenario("PET of zeros", finish=without_signal),
    "blank_pet_arms_up": Scenario("PET of zeros, 1.3 m, arms up", UP, UP, ARMS_UP, finish=without_signal),
    "short_field_of_view": Scenario("170 mm: mouth to larynx", (-100, 70), (-100, 70)),
    "long_pet_short_ct": Scenario("CT of the neck, PET of the whole body", (-160, 60), DOWN),
    "long_ct_short_pet": Scenario("CT of the whole body, PET of the neck", DOWN, (-160, 60)),
}


class MeasureError(ValueError):
    """The measurement cannot be made as asked; the message says why and what to do."""


def measure_localisation(
    checkpoint: str | None = None,
    out: str = "output/localisation",
    cases: int = 300,
    cases_each: int = 20,
    seed: int = 0,
    scenarios: Sequence[str] | str | None = None,
    jobs: int = 0,
) -> None:
    """Place the box on phantoms, write what share of their tumours it holds, and print the table.

    Args:
        checkpoint: model whose coarse pass is measured in addition to the rules; None: the rules alone.
        out: folder for ``localisation.json``, ``localisation.md`` and ``cases.csv``.
        cases: patients of the demonstration cohort as it is.
        cases_each: patients in each other scenario.
        seed: of the cohort.
        scenarios: names from :data:`SCENARIOS`, a list or separated by commas; None for all.
        jobs: processes; 0 = one for each core.

    Raises:
        MeasureError: for an unknown scenario, numbers out of range, or a checkpoint that does not exist.
    """
    names = list(SCENARIOS) if scenarios is None else _names(scenarios)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise MeasureError(
            f"no model at {checkpoint}: give a file with --checkpoint, or leave it out for the rules alone"
        )
    if min(cases, cases_each) < 1:
        raise MeasureError("--cases and --cases_each are whole numbers, 1 or more")
    tasks = [(name, index) for name in names for index in range(cases if name == DEFAULT else cases_each)]
    proposer = None if checkpoint is None else CoarsePass(checkpoint, ALWAYS, COARSE_SPACING_MM)
    rows = _run(partial(measure_case, proposer, seed), tasks, jobs or os.cpu_count() or 1)
    table = pd.DataFrame(rows)
    summary = summarise(table)
    model = None if checkpoint is None else {"file": Path(checkpoint).name, "coarse_spacing_mm": COARSE_SPACING_MM}
    record = {"notice": NOTICE, "seed": seed, "cases": cases, "cases_each": cases_each, "model": model}
    folder = Path(out)
    text = as_markdown(summary)
    with written_whole(folder / "cases.csv") as partial_file:
        table.to_csv(partial_file, index=False)
    write_text(folder / "localisation.json", json.dumps({**record, "summary": summary}, indent=2) + "\n")
    write_text(folder / "localisation.md", text)
    print(text)
    print(f"{NOTICE}\nWritten: {folder}")


def measure_case(proposer: CoarsePass | None, seed: int, task: tuple[str, int]) -> list[dict[str, Any]]:
    """A row for each crop size and rule: method, flag, share of the primary and of all tumours, seconds."""
    name, index = task
    torch.set_num_threads(1)
    patient = phantom.draw_patient(seed, index)
    scene = draw_scene(SCENARIOS[name], patient, seed, index, demonstration=name == DEFAULT)
    scans = (scene.ct, scene.ct_grid, scene.pet, scene.pet_grid)
    rows = []
    for rule, (anchor, proposed, seconds) in answers(scans, proposer).items():
        for crop, (roi, spacing) in CROPS.items():
            row: dict[str, Any] = {"scenario": name, "patient": patient.patient_id, "crop": crop, "rule": rule}
            row |= {"method": "", "flag": "no answer", "primary": np.nan, "tumour": np.nan}
            if anchor is not None:
                location = place_box(anchor, scene.ct_grid, roi, spacing, proposed)
                box = box_grid(location.centre_mm, roi, spacing)
                row |= {"method": location.method, "flag": location.flag}
                row["primary"] = share_inside(scene.mask == GTVP, scene.ct_grid, box)
                row["tumour"] = share_inside(scene.mask, scene.ct_grid, box)
            rows.append({**row, "has_primary": bool((scene.mask == GTVP).any()), "seconds": seconds})
    return rows


def answers(scans: Scans, proposer: CoarsePass | None) -> dict[str, Answer]:
    """The result of each rule and of their combinations."""
    ct, ct_grid, pet, pet_grid = scans
    top, top_seconds = _timed(anchor_at_body_top, ct, ct_grid)
    rules, rules_seconds = _timed(find_anchor, *scans)
    middle = Anchor(ct_grid.centre, METHOD_CENTRE)
    found: dict[str, Answer] = {
        BRAIN: (rules if rules.method == METHOD_PET_BRAIN else None, None, rules_seconds),
        TOP: (None if top.method == METHOD_CENTRE else top, None, top_seconds),
        CENTRE: (middle, None, 0.0),
        RULES: (rules, None, rules_seconds),
    }
    if proposer is None:
        return found
    if pet_faults(pet, pet_grid, ct_grid):
        return {**found, NETWORK: (None, None, 0.0), DOUBT: found[RULES], ALL: found[RULES]}
    whole, whole_seconds = _timed(proposer, *scans)
    near, near_seconds = _timed(proposer, *scans, rules)
    found[NETWORK] = (middle if whole else None, whole, whole_seconds)
    found[ALL] = (rules, near, rules_seconds + near_seconds)
    found[DOUBT] = found[ALL] if rules.doubtful else found[RULES]
    return found


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.thread_time()
    return function(*arguments), time.thread_time() - start


def draw_scene(scenario: Scenario, patient: Patient, seed: int, index: int, demonstration: bool = False) -> Scene:
    """Scan a patient in a scenario; ``demonstration`` as ``make_cohort --scale small`` does."""
    if demonstration:
        scan = phantom.scan_patient(patient, seed, index, "small")
        ct_grid, pet_grid = Grid(scan.ct.shape, scan.ct_grid.affine), Grid(scan.pet.shape, scan.pet_grid.affine)
        return Scene(scan.ct, ct_grid, scan.pet * np.float32(scan.pet_slope), pet_grid, scan.mask)
    turn = _rotation(scenario.tilt_deg)
    pose = patient.pose
    tilted = Pose(turn @ pose.rotation, pose.scale, turn @ pose.shift)
    patient = dataclasses.replace(patient, pose=tilted, body={**patient.body, **dict(scenario.body)})
    rng = np.random.default_rng([seed, index])
    native = phantom.scan_grids(patient, rng, "full")
    grids = [
        _coarser(grid, mm) if z is None else _over(patient, grid, z, mm)
        for grid, z, mm in zip(native, (scenario.ct_z, scenario.pet_z), (CT_MM, PET_MM), strict=True)
    ]
    parts = [*phantom.build_anatomy(patient.body, patient.lesions), *scenario.parts]
    ct = phantom.paint_ct(patient, parts, grids[0], 1).T
    pet = phantom.paint_pet(patient, parts, grids[1], 6.5).T
    mask = phantom.paint_mask(patient, grids[0], 1).T
    ct = (ct + rng.normal(0, 12, ct.shape)).astype(np.int16)
    pet = (pet + rng.normal(0, 0.1, pet.shape) * np.sqrt(pet)).clip(0).astype(np.float32)
    back = np.eye(4)
    back[:3, :3] = turn.T  # a patient who lies straight, on a grid that does not
    ct_grid, pet_grid = (Grid(grid.shape, back @ grid.affine) for grid in grids)
    scene = Scene(ct, ct_grid, pet, pet_grid, mask)
    return scene if scenario.finish is None else scenario.finish(scene)


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For each scenario, crop and rule: numbers of cases, mean and lowest shares, processor time."""
    summary = []
    for (scenario, crop, rule), group in rows.groupby(["scenario", "crop", "rule"], sort=False):
        answered = group.dropna(subset="tumour")
        primary = group.loc[group["has_primary"], "primary"]
        summary.append(
            {
                "scenario": scenario,
                "crop": crop,
                "rule": rule,
                "cases": len(group),
                "no_answer": len(group) - len(answered),
                "flagged": int((answered["flag"] != "").sum()),
                "with_primary": len(primary),
                "lost_primary": int((~(primary >= LOST)).sum()),
                "mean_primary": _number(primary.mean()),
                "worst_primary": _number(primary.min()),
                "mean_tumour": _number(answered["tumour"].mean()),
                "worst_tumour": _number(answered["tumour"].min()),
                "methods": answered["method"].value_counts().to_dict(),
                "median_seconds": _number(group["seconds"].median()),
            }
        )
    return summary


def as_markdown(summary: Sequence[dict[str, Any]]) -> str:
    """A table for each crop: a row for each scenario, a column for each rule.

    A cell holds the lowest share of a primary tumour and of all tumour in the box, in percent, and how many cases lost
    more than 1 % of the primary.
    """
    lines = [
        NOTICE,
        "",
        "Each cell: lowest share of a primary / of all tumour inside the box in %, then the cases with more than 1 % "
        "of the primary outside or without an answer.",
    ]
    for crop in dict.fromkeys(item["crop"] for item in summary):
        chosen = [item for item in summary if item["crop"] == crop]
        rules = [
            rule for rule in (BRAIN, TOP, CENTRE, NETWORK, RULES, DOUBT, ALL) if rule in {i["rule"] for i in chosen}
        ]
        lines += ["", f"Box of {crop}:", "", "| scenario | cases | " + " | ".join(rules) + " |"]
        lines.append("|---" * (len(rules) + 2) + "|")
        for scenario in dict.fromkeys(item["scenario"] for item in chosen):
            cells = {item["rule"]: item for item in chosen if item["scenario"] == scenario}
            cases = next(iter(cells.values()))["with_primary"]
            lines.append(f"| {scenario} | {cases} | " + " | ".join(_cell(cells[rule]) for rule in rules) + " |")
    return "\n".join(lines) + "\n"


def _cell(item: dict[str, Any]) -> str:
    if item["no_answer"] == item["cases"]:
        return "no answer"
    shares = " / ".join("-" if v is None else f"{100 * v:.0f}" for v in (item["worst_primary"], item["worst_tumour"]))
    return f"{shares}, {item['lost_primary']}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _names(scenarios: Sequence[str] | str) -> list[str]:
    names = scenarios.split(",") if isinstance(scenarios, str) else [str(name) for name in scenarios]
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown or not names:
        raise MeasureError(f"unknown scenario {', '.join(unknown)}: choose from {', '.join(SCENARIOS)}")
    return names


def _run(
    measure: Callable[[tuple[str, int]], list[dict[str, Any]]], tasks: list[tuple[str, int]], jobs: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    bar = partial(tqdm, total=len(tasks), desc="Placing boxes", unit="case")
    if jobs == 1 or len(tasks) == 1:
        for found in bar(map(measure, tasks)):
            rows += found
        return rows
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        for found in bar(pool.map(measure, tasks)):
            rows += found
    return rows


def _rotation(degrees: float) -> np.ndarray:
    """Rotation about x, then about z, by the same angle."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return about_z @ about_x


def _coarser(grid: phantom.Grid, spacing_mm: float) -> phantom.Grid:
    """About the same field of view in voxels of ``spacing_mm``."""
    extent = np.array(grid.shape) * grid.spacing_mm
    signs = np.array([-1, -1, 1])
    corner = np.array(grid.origin_mm) - signs * np.array(grid.spacing_mm) / 2
    shape = np.maximum(1, np.round(extent / spacing_mm)).astype(int)
    origin = corner + signs * spacing_mm / 2
    return phantom.Grid(tuple(shape.tolist()), (spacing_mm,) * 3, tuple(origin.tolist()))


def _over(patient: Patient, grid: phantom.Grid, body_z: tuple[float, float], spacing_mm: float) -> phantom.Grid:
    """The grid's width, at the patient's heights from ``body_z[0]`` to ``body_z[1]``."""
    coarse = _coarser(grid, spacing_mm)
    low, high = (float(patient.pose.to_world(np.array([[0.0, -8.0, z]]))[0, 2]) for z in body_z)
    shape = (*coarse.shape[:2], round((high - low) / spacing_mm))
    return phantom.Grid(shape, coarse.spacing_mm, (*coarse.origin_mm[:2], low + spacing_mm / 2))


if __name__ == "__main__":
    run_tool(measure_localisation, MeasureError, OSError)
