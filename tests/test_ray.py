"""Patients and folds on the nodes of a Ray cluster. All of it is run by ``run_checks.py --runtime ray``."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from dicom_study import write_pet_ct
from test_train_folds import calls, fake, wait_for  # noqa: F401, the fixture is used by its name

import cluster.patients
import train_folds
from cluster.nodes import ClusterError, Share, node_name, places, software
from cluster.worker import Worker
from conftest import exit_code, make_tiny_cohort
from experiments.experiment import ExperimentError, read_experiment, read_fold
from phantom.cohort import write_cohort
from predict import UsageError, predict
from scripts.prediction.description import Model
from scripts.prediction.inputs import find_cases

IN_RAY = os.environ.get("RAY_TESTS") == "1"  # set by run_checks.py --runtime ray: there nothing may be skipped for it
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None and not IN_RAY, reason="needs Ray: pip install -r requirements-ray.txt"
)
PHANTOMS = 60
TIMES = ("created", "seconds")


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Four patients, the CT of the third damaged."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("patients"), 4)
    (folder / "Task 1" / "CHUM-003" / "CHUM-003__CT.nii.gz").write_bytes(b"no image")
    return folder


@pytest.fixture
def options(model) -> dict[str, Any]:
    return {"ckpt_dir": str(model), "report": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each process on the nodes has: the last digit depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Nodes:
    """A cluster of a head without cores and nodes of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        few = {"num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=0, **few)
        self.few = few
        self.nodes: dict[str, Any] = {}
        self.add("one")
        self.add("two")

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, name: str) -> None:
        self.nodes[name] = self.cluster.add_node(num_cpus=1, node_name=name, **self.few)

    def remove(self, name: str) -> None:
        """As if its power failed."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.cluster.shutdown()


def run(*arguments: Path, code: int = 0, **options) -> None:
    """Run the command in this process and check its exit code."""
    assert exit_code(predict, *map(str, arguments), **options) == code


def rows_of(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "predictions.csv").read_text().splitlines()))


def prediction_of(folder: Path) -> dict[str, Any]:
    """What a patient's ``prediction.json`` says, without the times of the run."""
    said = json.loads((folder / "prediction.json").read_text())
    return {name: value for name, value in said.items() if name not in TIMES}


def audit_of(output: Path) -> list[dict[str, Any]]:
    """The lines of the audit, without their times and in an order of their own."""
    lines = [json.loads(line) for line in (output / "audit.jsonl").read_text().splitlines()]
    return sorted(({name: line[name] for name in line if name != "time"} for line in lines), key=str)


def assert_same(one: Path, other: Path) -> None:
    """Tables, predictions, masks and audit are the same to the last digit."""
    assert rows_of(one) == rows_of(other)
    assert (one / "lesions.csv").read_bytes() == (other / "lesions.csv").read_bytes()
    names = {path.relative_to(one) for path in one.rglob("*")}
    assert names == {path.relative_to(other) for path in other.rglob("*")}
    for name in names:
        if name.name == "prediction.json":
            assert prediction_of(one / name.parent) == prediction_of(other / name.parent)
        elif name.name.endswith("__tumour.nii.gz"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
    assert audit_of(one) == audit_of(other)


# --- one process, without Ray ---------------------------------------------------------------------------------------
def settings_of(ckpt_dir: Path, output: Path) -> dict[str, Any]:
    fixed: dict[str, Any] = {"device": "cpu", "threads": 1, "force": False, "report": False, "explain": False}
    weights = Model.of(ckpt_dir / "model.pt").sha256
    return {
        **fixed,
        "viewer": None,
        "model": weights,
        "code": software(),
        "output": str(output),
        "ckpt_dir": str(ckpt_dir),
    }


def test_a_worker_writes_a_patient_and_hands_on_what_belongs_in_the_tables(patients, model, options, tmp_path):
    run(patients, tmp_path / "all", code=1, device="cpu", **options)
    rows = {row["PatientID"]: row for row in rows_of(tmp_path / "all")}
    worker = Worker(**settings_of(model, tmp_path / "out"))
    for case in find_cases(patients, ["age", "gender", "m_stage"]):
        patient = case["patient_id"]
        answer = worker.predict(case, f"folder-{patient}")
        assert {name: str(value) for name, value in answer["row"].items() if name != "mask"} == {
            name: value for name, value in rows[patient].items() if name != "mask"
        }
        assert bool(answer["lesions"]) == (answer["row"]["status"] == "ok") and answer["problems"] == {}
        (line,) = answer["audit"]
        assert json.loads(line)["outcome"] == answer["row"]["status"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"folder-CHUM-00{k}" for k in (1, 2, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"model": "other"}, "holds other weights here", id="weights"),
        pytest.param({"code": "other"}, "this software, or torch, is of another version here", id="software"),
    ],
)
def test_a_worker_refuses_other_weights_and_software(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Worker(**settings_of(model, tmp_path) | changes)


def test_without_ray_a_line_says_how_to_get_it(patients, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"--ray needs Ray: pip install -r requirements-ray\.txt"):
        predict(str(patients), str(tmp_path / "out"), ray="local", **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"device": "cuda:1"}, "--device is cpu or cuda, and Ray chooses the GPU", id="one_gpu_of_many"),
        pytest.param({"device": "cpu", "ray_gpus": 0.5}, "got cpu, 0.5 GPUs", id="cpu_and_gpu"),
    ],
)
def test_options_that_contradict_are_refused(options, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        predict(str(tmp_path), str(tmp_path / "out"), ray="local", **given, **options)


def test_a_study_from_a_server_is_no_cohort(options, tmp_path):
    with pytest.raises(UsageError, match="leave out --ray"):
        predict(str(tmp_path), dicomweb="http://localhost", study="1.2", ray="local", **options)


# --- on a cluster ---------------------------------------------------------------------------------------------------
@needs_ray
def test_a_cluster_gives_the_same_as_one_process(patients, options, nodes, tmp_path, caplog):
    run(patients, tmp_path / "here", code=1, device="cpu", **options)
    with caplog.at_level(logging.INFO):
        run(patients, tmp_path / "there", code=1, ray=nodes.address, **options)
    assert_same(tmp_path / "here", tmp_path / "there")
    assert [row["status"] for row in rows_of(tmp_path / "there")] == ["ok", "ok", "failed", "ok"]
    assert "2 processes of 1 cores, 0 GPUs" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(patients, tmp_path / "there", code=1, ray=nodes.address, resume=True, **options)
    assert "3 of 4 patients done already" in caplog.text and "1 processes of" in caplog.text
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")


@needs_ray
def test_dicom_and_reports(patients, model, nodes, tmp_path):
    scans = patients / "Task 1" / "CHUM-001" / "CHUM-001"
    ct, pet = (np.asarray(nibabel.load(f"{scans}__{kind}.nii.gz").dataobj) for kind in ("CT", "PT"))
    write_pet_ct(tmp_path / "in", ct, pet, 8.0, {"PatientID": "A"})
    run(tmp_path / "in", tmp_path / "here", ckpt_dir=str(model), device="cpu")
    run(tmp_path / "in", tmp_path / "there", ckpt_dir=str(model), ray=nodes.address)
    assert_same(tmp_path / "here", tmp_path / "there")
    assert (tmp_path / "there" / "index.html").is_file() and (tmp_path / "there" / "A" / "report.html").is_file()


@needs_ray
def test_a_node_that_does_not_see_a_path_says_so(patients, model, nodes, tmp_path):
    here_alone = os.open(model, os.O_RDONLY)  # of this process: no other one has /proc/self/fd/N
    seen = f"/proc/self/fd/{here_alone}"
    with pytest.raises(ClusterError) as said:
        predict(str(patients), str(tmp_path / "out"), ckpt_dir=seen, ray=nodes.address, report=False)
    os.close(here_alone)
    for name in ("one", "two"):
        assert f"node {socket.gethostname()} ({name}) does not see {seen}/model.pt" in str(said.value)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".run_")]


@pytest.fixture
def faulty(monkeypatch) -> Callable[[Callable], None]:
    """Replace what a node looks for by a function of this module, which is sent to it."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def replace(function: Callable) -> None:
        monkeypatch.setattr(cluster.patients, "unseen", function)

    return replace


def unseen_on_two(paths: list[str]) -> list[str]:
    """Scans of patients are not seen on the node "two"."""
    return [path for path in paths if "CHUM" in path and "(two)" in node_name()]


def killed_by_second(paths: list[str]) -> list[str]:
    """The second patient ends the process."""
    if any("CHUM-002" in path for path in paths):
        os._exit(9)
    return []


@needs_ray
def test_a_node_that_does_not_see_the_scans_predicts_nothing(patients, options, nodes, faulty, tmp_path, caplog):
    faulty(unseen_on_two)
    with caplog.at_level(logging.INFO):
        run(patients, tmp_path / "out", code=1, ray=nodes.address, **options)
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["ok", "ok", "failed", "ok"]
    assert caplog.text.count("(two) does not see") == 1 and "(one) does not see" not in caplog.text


@needs_ray
def test_a_patient_whose_processes_die_costs_no_other_one(patients, options, nodes, faulty, tmp_path):
    faulty(killed_by_second)
    run(patients, tmp_path / "out", code=1, ray=nodes.address, **options)
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert rows[1]["reason"].startswith("its process died 3 times, last on node")


@needs_ray
@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"ray": "127.0.0.1:1"}, "no Ray cluster at '127.0.0.1:1' .*Connection refused", id="no_cluster"),
        pytest.param({"ray": "nowhere"}, "--ray is auto, local or HOST:PORT; got 'nowhere'", id="no_address"),
        pytest.param({"ray_cores": 2}, "none of 3 nodes has 2 cores and 0 GPUs", id="too_many_cores"),
        pytest.param({"device": "cuda"}, "none of 3 nodes has 1 cores and 1 GPUs", id="no_gpu"),
        pytest.param({"ray_cores": 0}, "one core or more", id="no_core"),
        pytest.param({"ray_gpus": 2.0}, "a GPU, a part of one or none", id="several_gpus"),
    ],
)
def test_a_cluster_that_cannot_be_used(patients, options, nodes, tmp_path, given, message):
    with pytest.raises(ClusterError, match=message):
        predict(str(patients), str(tmp_path / "out"), **{"ray": nodes.address, **options, **given})


@needs_ray
def test_a_gpu_is_shared(monkeypatch):
    import ray

    nodes = [{"Alive": alive, "Resources": {"CPU": 16.0, "GPU": 2.0}} for alive in (True, True, False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert [places(Share(cores, gpus)) for cores, gpus in ((1, 0), (4, 1), (4, 0.25), (1, 0.25))] == [32, 4, 8, 16]


@needs_ray
def test_a_node_lost_in_the_middle_costs_no_patient(options, nodes, tmp_path, caplog):
    write_cohort(tmp_path / "in", PHANTOMS, 3, "small", 2)
    run(tmp_path / "in", tmp_path / "here", device="cpu", **options)

    def lose_one() -> None:
        while len(list((tmp_path / "there").glob("*/prediction.json"))) < PHANTOMS // 3:
            time.sleep(0.05)
        nodes.remove("one")

    thread = threading.Thread(target=lose_one)
    thread.start()
    with caplog.at_level(logging.INFO):
        run(tmp_path / "in", tmp_path / "there", ray=nodes.address, **options)
    thread.join()
    nodes.add("one")
    assert "(one) died, another one predicts this patient" in caplog.text
    assert (
        len(rows_of(tmp_path / "there")) == PHANTOMS == len({row["PatientID"] for row in rows_of(tmp_path / "there")})
    )
    assert_same(tmp_path / "here", tmp_path / "there")


# --- folds ----------------------------------------------------------------------------------------------------------
def run_of(folder: Path, cohort: Path, address: str, **changes: Any) -> dict[str, Any]:
    given = {"dataset_dir": str(cohort), "output_dir": str(folder), "num_folds": 2, "epochs": 1}
    return {**given, "ray": address, "ray_cores": 1, **changes}


@needs_ray
def test_folds_run_on_the_nodes(fake, nodes, tiny_cohort, tmp_path):  # noqa: F811
    train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, nodes.address))
    record = read_experiment(tmp_path / "run")
    assert [fold["status"] for fold in record["folds"].values()] == ["finished", "finished"]
    assert {(call["args"]["device"], call["threads"]) for call in calls(fake)} == {("cpu", "1")} and len(
        calls(fake)
    ) == 6
    logs = [(tmp_path / "run" / f"fold_{fold}" / "log.txt").read_text() for fold in (0, 1)]
    assert all(f" on {socket.gethostname()} (" in log for log in logs)
    train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, nodes.address))
    assert len(calls(fake)) == 6  # finished folds are kept


@needs_ray
def test_a_fold_that_fails_stops_no_other_one(fake, nodes, tiny_cohort, tmp_path, capsys):  # noqa: F811
    (fake / "fail_0").touch()
    with pytest.raises(SystemExit):
        train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, nodes.address))
    assert [read_fold(tmp_path / "run", fold)["status"] for fold in (0, 1)] == ["failed", "finished"]
    assert "fold 0 failed in training (exit code 3)" in capsys.readouterr().err


@needs_ray
def test_a_fold_whose_node_is_lost_goes_on_elsewhere(fake, nodes, tiny_cohort, tmp_path):  # noqa: F811
    (fake / "hang").touch()
    log = tmp_path / "run" / "fold_0" / "log.txt"
    lost = []

    def lose_its_node() -> None:
        assert wait_for(lambda: (fake / "pids_0").exists(), 60)
        (fake / "hang").unlink()
        lost.append(next(name for name in nodes.nodes if f"({name})" in log.read_text()))
        nodes.remove(lost[0])

    thread = threading.Thread(target=lose_its_node)
    thread.start()
    train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, nodes.address, folds=0))
    thread.join()
    nodes.add(lost[0])
    assert read_fold(tmp_path / "run", 0)["status"] == "finished"
    where = re.findall(r"^== \S+ \S+ training on .* \((\w+)\)", log.read_text(), re.MULTILINE)
    assert where == [*lost, *(name for name in ("one", "two") if name not in lost)]


@needs_ray
def test_a_node_that_does_not_see_the_cohort_says_so(fake, nodes, tiny_cohort, tmp_path, monkeypatch):  # noqa: F811
    import ray

    import cluster.folds

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(cluster.folds, "unseen", unseen_cohort)
    with pytest.raises(ClusterError, match=f"node {socket.gethostname()} .* does not see {tiny_cohort}"):
        train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, nodes.address))
    assert not (fake / "calls.txt").exists()


def unseen_cohort(paths: list[str]) -> list[str]:
    return [path for path in paths if "cohort" in Path(path).name]


@pytest.mark.parametrize("given", [{"jobs": 2}, {"devices": "0,1"}, {"device": "cpu"}])
def test_ray_places_the_folds(tiny_cohort, tmp_path, given):
    with pytest.raises(ExperimentError, match="Ray places the folds"):
        train_folds.train_folds(**run_of(tmp_path / "run", tiny_cohort, "local", **given))
