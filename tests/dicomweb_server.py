"""A DICOMweb server in this process, in the place of the network below ``requests``."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path

import pydicom
import requests

ADDRESS = "http://127.0.0.1:8042/dicom-web"
BOUNDARY = "part"


class FakeServer:
    """Holds DICOM files and answers QIDO-RS for series, WADO-RS of a series, and STOW-RS.

    ``faults`` maps a method and a part of the path to a status, an exception, or the bytes of an answer.
    """

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.held = [pydicom.dcmread(path) for path in sorted(folder.rglob("*")) if path.is_file()]
        self.stored: list[pydicom.Dataset] = []
        self.requests: list[requests.PreparedRequest] = []
        self.faults: dict[tuple[str, str], int | Exception | bytes] = {}
        self.refused: set[str] = set()  # SOP classes
        self.changed: dict[str, str] = {}  # tags of retrieved images, as of a server that confuses them
        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", lambda adapter, request, **_: self.send(request))

    def send(self, request: requests.PreparedRequest) -> requests.Response:
        self.requests.append(request)
        for (method, part), fault in self.faults.items():
            if request.method == method and part in request.url:
                if isinstance(fault, Exception):
                    raise fault
                if isinstance(fault, int):
                    return answer(request, fault)
                return answer(request, 200, fault, "application/dicom+json")
        if request.method == "POST":
            return self.store(request)
        series = re.fullmatch(r".*/studies/([\d.]+)/series/([\d.]+)", request.url)
        return self.retrieve(request, series[2]) if series else self.list(request)

    def list(self, request: requests.PreparedRequest) -> requests.Response:
        study = re.search(r"/studies/([\d.]+)/series", request.url)
        series = re.search(r"[?&](?:SeriesInstanceUID|0020000E)=([\d.]+)", request.url)
        numbers: dict[tuple[str, str, str], int] = {}
        for dataset in self.held:
            key = (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality)
            if (study is None or study[1] == key[0]) and (series is None or series[1] == key[1]):
                numbers[key] = numbers.get(key, 0) + 1
        items = [
            {
                "0020000D": {"vr": "UI", "Value": [in_study]},
                "0020000E": {"vr": "UI", "Value": [uid]},
                "00080060": {"vr": "CS", "Value": [modality]},
                "00201209": {"vr": "IS", "Value": [number]},
            }
            for (in_study, uid, modality), number in numbers.items()
        ]
        return answer(request, 200, json.dumps(items).encode(), "application/dicom+json")

    def retrieve(self, request: requests.PreparedRequest, series: str) -> requests.Response:
        body = b""
        for dataset in self.held:
            if dataset.SeriesInstanceUID == series:
                sent = copy.copy(dataset)
                sent.update(self.changed)
                file = io.BytesIO()
                sent.save_as(file)
                head = f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n"
                body += head.encode() + file.getvalue()
        body += f"\r\n--{BOUNDARY}--".encode()
        return answer(request, 200, body, f'multipart/related; type="application/dicom"; boundary={BOUNDARY}')

    def store(self, request: requests.PreparedRequest) -> requests.Response:
        body = request.body if isinstance(request.body, bytes) else b"".join(request.body)
        boundary = re.search(r'boundary="([^"]+)"', request.headers["Content-Type"])[1].encode()
        parts = [part.split(b"\r\n\r\n", 1)[1] for part in body.split(b"--" + boundary)[1:-1]]
        said: dict[str, list] = {"00081199": [], "00081198": []}
        for part in parts:
            dataset = pydicom.dcmread(io.BytesIO(part[:-2]))
            item = {"00081155": {"vr": "UI", "Value": [dataset.SOPInstanceUID]}}
            if dataset.SOPClassUID in self.refused:
                said["00081198"].append({**item, "00081197": {"vr": "US", "Value": [0x0122]}})
            else:
                self.stored.append(dataset)
                said["00081199"].append(item)
        content = {tag: {"vr": "SQ", "Value": items} for tag, items in said.items() if items}
        return answer(request, 202 if self.refused else 200, json.dumps(content).encode(), "application/dicom+json")


def answer(
    request: requests.PreparedRequest, status: int, body: bytes = b"", kind: str = "text/plain"
) -> requests.Response:
    response = requests.Response()
    response.status_code, response.raw, response.request = status, io.BytesIO(body), request
    response.reason, response.url = "as told", request.url
    response.headers["Content-Type"] = kind
    return response
