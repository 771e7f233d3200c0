"""Round trips with a real archive: Orthanc with its DICOMweb plugin. Run by ``run_checks.py --runtime orthanc``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_study import write_pet_ct

from conftest import ROOT, make_tiny_cohort

if not os.environ.get("ORTHANC_TESTS"):
    pytest.skip("run by scripts/run_checks.py --runtime orthanc", allow_module_level=True)
from orthanc_server import LOGIN, Orthanc, is_installed, running, wait

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NETRC": os.devnull}
RESULTS = {"SEG", "SR", "RTSTRUCT"}


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory) -> Iterator[Orthanc]:
    assert is_installed()
    with running(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@pytest.fixture
def phantom(tmp_path, request) -> tuple[str, Path]:
    """StudyInstanceUID and folder of a phantom's PET/CT, another one for each test."""
    number = 1 + [item.name for item in request.session.items].index(request.node.name)
    scans = make_tiny_cohort(tmp_path, 1) / "Task 1" / "CHUM-001" / "CHUM-001"
    ct, pet = (np.asarray(nibabel.load(f"{scans}__{kind}.nii.gz").dataobj) for kind in ("CT", "PT"))
    write_pet_ct(tmp_path / "dicom", ct, pet, 8.0, {"PatientID": f"PHANTOM-{number}"}, number)
    return f"1.2.3.4.10{number}", tmp_path / "dicom"


@pytest.fixture
def listener(orthanc, model, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start ``serve.py dicom``; ``log`` of the function is what it says."""
    started: list[subprocess.Popen] = []
    log = tmp_path / "listener.txt"

    def start(stable: float = 2, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
        options = options or {"send": f"ORTHANC@127.0.0.1:{orthanc.dicom}"}
        options |= {"spool": tmp_path / "spool", "peers": "ORTHANC@127.0.0.1", "port": orthanc.node, "stable": stable}
        options |= {"ckpt_dir": model, "device": "cpu", "min_free_gb": 0}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "dicom", *words]
        before = log.read_text().count(" listens on ") if log.exists() else 0
        with log.open("ab") as out:
            started.append(
                subprocess.Popen(command, stdout=out, stderr=out, env={**ENVIRONMENT, **(environment or {})})
            )
        wait(lambda: log.read_text().count(" listens on ") > before, started[-1], log, 60)
        return started[-1]

    start.log = log
    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()


def test_results_come_back_in_the_same_study_though_the_listener_is_killed(orthanc, listener, phantom):
    study, folder = phantom
    orthanc.upload(folder)
    process = listener(stable=600)
    orthanc.send(study)
    process.kill()
    process.wait()
    assert orthanc.objects(study) == []
    process = listener()
    wait(lambda: orthanc.modalities(study) >= RESULTS, process, listener.log)
    wait(lambda: f"study {study}: sent to ORTHANC" in listener.log.read_text(), process, listener.log)
    objects = orthanc.objects(study)
    assert {dataset.StudyInstanceUID for dataset in objects} == {study}
    assert len({(dataset.PatientID, dataset.PatientName) for dataset in objects}) == 1
    orthanc.send(study)  # with its results, as an archive does that sends whole studies
    time.sleep(6)
    assert len(orthanc.objects(study)) == len(objects)
    assert listener.log.read_text().count(f"study {study}: sent to") == 1


def test_results_come_back_by_stow(orthanc, listener, phantom):
    study, folder = phantom
    orthanc.upload(folder)
    login = {"DICOMWEB_USER": LOGIN[0], "DICOMWEB_PASSWORD": LOGIN[1]}
    process = listener(stow=f"{orthanc.url}/dicom-web", environment=login)
    orthanc.send(study)
    wait(lambda: orthanc.modalities(study) >= RESULTS, process, listener.log)


def test_a_ct_alone_is_answered_by_a_reason(orthanc, listener, phantom):
    study, folder = phantom
    orthanc.upload(folder / "CT")
    process = listener()
    orthanc.send(study)
    wait(lambda: orthanc.modalities(study) == {"SR"}, process, listener.log)
    (report,) = orthanc.objects(study)
    said = [item.TextValue for item in report.ContentSequence if item.ValueType == "TEXT"]
    assert any("no PET among its DICOM series" in text for text in said)
    assert report.PatientID.startswith("PHANTOM-")


def test_predict_from_dicomweb_and_store(orthanc, model, phantom, tmp_path):
    study, folder = phantom
    orthanc.upload(folder)
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), str(tmp_path / "out"), "--store", "--device=cpu"]
    command += ["--report=False", f"--ckpt_dir={model}", f"--dicomweb={orthanc.url}/dicom-web"]

    def predict(study: str, **login: str) -> tuple[int, str]:
        environment = {**ENVIRONMENT, **{f"DICOMWEB_{name}": value for name, value in login.items()}}
        ended = subprocess.run([*command, "--study", study], env=environment, capture_output=True, text=True)
        return ended.returncode, ended.stderr

    code, said = predict(study)
    assert code == 1 and "refuses access (401); set DICOMWEB_USER and DICOMWEB_PASSWORD" in said
    code, said = predict("1.2.3.4.999", USER=LOGIN[0], PASSWORD=LOGIN[1])
    assert code == 1 and "has no study 1.2.3.4.999" in said
    code, said = predict(study, USER=LOGIN[0], PASSWORD=LOGIN[1])
    assert code == 0, said
    assert LOGIN[1] not in said
    assert orthanc.modalities(study) >= RESULTS
