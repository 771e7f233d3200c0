"""The benchmark's own logic, and its stages on small images, where the quick path meets the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from research import benchmark, benchmark_profile
from research import benchmark_stages as at
from scripts import keys
from scripts.imaging.geometry import Grid, box_grid


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> at.Setup:
    setup = at.Setup(tmp_path_factory.mktemp("benchmark"), roi=32, shrink=4, cohort=2)
    at.make_inputs(setup)
    return setup


@pytest.mark.parametrize("name", ["preprocessing", "network", "ensemble", "mask", "patient", "cohort"])
@pytest.mark.filterwarnings("ignore")  # stock MONAI warns of its own
def test_quick_and_plain_agree(setup: at.Setup, name: str) -> None:
    stage = benchmark.STAGES[name]
    answers = {way: stage.ways[way](setup)() for way in (benchmark.PLAIN, benchmark.PRODUCT)}
    assert stage.check(setup, answers[benchmark.PLAIN], answers[benchmark.PRODUCT])


@pytest.mark.filterwarnings("ignore")
def test_training_agrees_with_and_without_checkpoints(setup: at.Setup) -> None:
    stage = benchmark.STAGES["training"]
    answers = {way: stage.ways[way](setup)() for way in (benchmark.PLAIN, benchmark.PRODUCT, "frugal")}
    for way in (benchmark.PRODUCT, "frugal"):
        assert stage.check(setup, answers[benchmark.PLAIN], answers[way])


SCORES = {
    keys.SEG_PROB: np.full((1, 1, 4, 4, 4), 0.9),
    keys.HPV_PROB: np.array([0.5]),
    keys.LOG_HAZARD: np.array([0.1]),
}
WRONG = [
    pytest.param(at.check_network, SCORES, {**SCORES, keys.SEG_PROB: 1 - SCORES[keys.SEG_PROB]}, "Dice 0", id="mask"),
    pytest.param(at.check_network, SCORES, {**SCORES, keys.LOG_HAZARD: np.array([0.2])}, "log hazard", id="hazard"),
    pytest.param(at.check_mask, {"mask": np.array([1]) > 0}, {"mask": np.array([0]) > 0}, "Dice 0", id="written_mask"),
    pytest.param(at.check_training, {"loss": np.array([1.0])}, {"loss": np.array([1.1])}, "loss differs", id="loss"),
    pytest.param(
        at.check_cohort,
        {keys.LOG_HAZARD: np.array([1.0, 2.0])},
        {keys.LOG_HAZARD: np.array([2.0, 1.0])},
        "log hazard",
        id="patients_in_another_order",
    ),
]


@pytest.mark.parametrize(("check", "plain", "product", "message"), WRONG)
def test_another_answer_ends_the_benchmark(setup: at.Setup, check, plain, product, message) -> None:
    assert check(setup, plain, plain)
    with pytest.raises(at.DisagreementError, match=message):
        check(setup, plain, product)


def test_lattice_holds_the_scan_and_the_box() -> None:
    scan, box = Grid((50, 40, 30), np.diag([-2.0, -2.0, 3.0, 1.0])), box_grid((-40.0, -35.0, 60.0), 16, 4.0)
    affine, size, start = at.lattice(scan, box)
    whole = Grid((size[0], size[1], size[2]), affine)
    np.testing.assert_allclose(whole.crop([slice(s, s + 16) for s in start]).affine, box.affine)
    assert (whole.bounds[0] < scan.bounds[0] + 4).all()
    assert (whole.bounds[1] > scan.bounds[1] - 4).all()


def test_a_run_writes_table_and_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    benchmark.benchmark(str(out), "mask", quick=True, threads=1, workdir=str(tmp_path))
    result = json.loads(out.read_text())
    product = result["stages"]["mask"]["ways"]["bundle"]
    assert product["times_plain"] > 0
    assert product["peak_mib"] > 100
    assert result["machine"]["threads"] == 1
    assert "| mask back on the CT's grid and written (32^3) | bundle |" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("profile", "part"),
    [
        pytest.param(benchmark_profile.profile_patient, "LocaliseBoxd", id="patient"),
        pytest.param(benchmark_profile.profile_network, "convolutions, forward", id="network"),
        pytest.param(benchmark_profile.profile_training, "convolutions, backward", id="training"),
    ],
)
def test_parts_of_a_profile_make_the_whole(setup: at.Setup, profile, part: str) -> None:
    spent = profile(setup)
    whole = spent.pop("whole")
    assert spent[part] > 0
    assert sum(spent.values()) == pytest.approx(whole, rel=0.1)
    assert min(spent.values()) >= 0


def test_an_error_in_a_worker_is_told(tmp_path: Path) -> None:
    worker = benchmark.Worker(at.restore, at.Setup(tmp_path / "nowhere", roi=32))
    with pytest.raises(RuntimeError, match="mask bundle:"):
        worker.run()
    worker.close()


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="no stage 'lunch'"):
        benchmark.benchmark(stages="mask,lunch")
