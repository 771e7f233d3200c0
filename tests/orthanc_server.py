"""A real archive for tests: Orthanc with its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb)."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
LOGIN = ("doctor", "secret of the test")


def is_installed() -> bool:
    return shutil.which("Orthanc") is not None and PLUGIN.is_file()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Orthanc:
    """The archive; ``node`` is the port at which it knows a listener."""

    def __init__(self, folder: Path) -> None:
        self.web, self.dicom, self.node = free_port(), free_port(), free_port()
        self.url, self.log = f"http://127.0.0.1:{self.web}", folder / "orthanc.txt"
        settings = {
            **{"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": self.web},
            **{"DicomPort": self.dicom, "DicomAet": "ORTHANC", "DicomCheckCalledAet": True, "Plugins": [str(PLUGIN)]},
            **{"AuthenticationEnabled": True, "RegisteredUsers": dict([LOGIN]), "DicomWeb": {"Enable": True}},
            "DicomModalities": {"node": ["HNPETCT", "127.0.0.1", self.node]},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        with self.log.open("wb") as log:
            command = ["Orthanc", str(folder / "orthanc.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(self, method: str, path: str, **options) -> object:
        answer = requests.request(method, self.url + path, auth=LOGIN, timeout=60, **options)
        answer.raise_for_status()
        return answer.json()

    def runs(self) -> bool:
        try:
            return bool(self.ask("GET", "/system"))
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def upload(self, folder: Path) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.ask("POST", "/instances", data=path.read_bytes())

    def send(self, study: str) -> None:
        """Send a study to the listener, whatever is in it."""
        self.ask("POST", "/modalities/node/store", json={"Resources": [self.study(study)]})

    def study(self, study: str) -> str:
        query = {"Level": "Study", "Query": {"StudyInstanceUID": study}}
        (found,) = self.ask("POST", "/tools/find", json=query)
        return found

    def objects(self, study: str) -> list[pydicom.Dataset]:
        """The objects of a study that are no images of the phantom."""
        found = []
        for series in self.ask("GET", f"/studies/{self.study(study)}/series"):
            if series["MainDicomTags"]["Modality"] not in ("CT", "PT"):
                for instance in series["Instances"]:
                    file = requests.get(f"{self.url}/instances/{instance}/file", auth=LOGIN, timeout=60).content
                    found.append(pydicom.dcmread(io.BytesIO(file)))
        return found

    def modalities(self, study: str) -> set[str]:
        return {dataset.Modality for dataset in self.objects(study)}


@contextmanager
def running(folder: Path) -> Iterator[Orthanc]:
    """An archive in a folder, which ends with the block."""
    archive = Orthanc(folder)
    try:
        wait(archive.runs, archive.process, archive.log, 60)
        yield archive
    finally:
        archive.stop()


def wait(until: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-5000:]
        time.sleep(0.3)
