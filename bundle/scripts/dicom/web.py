"""Studies from a DICOMweb server, and results back to it: QIDO-RS, WADO-RS and STOW-RS.

``dicomweb-client`` is imported when it is needed; ``requirements-dicom.txt`` of the repository names it. User and
password are never part of an address or a command line: they come from the environment (:data:`USER`,
:data:`PASSWORD`, or :data:`TOKEN`), or else from the user's ``.netrc`` file.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from scripts.cohorts.scans import counted, printable
from scripts.dicom.tags import DicomError, integer_of, items_of, lenient, needed_module, text_of

logger = logging.getLogger(__name__)

USER, PASSWORD, TOKEN = "DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
LONGEST_UID = 64
WAIT_S = (10, 300)  # to connect, and for the next bytes
INSTALL = "pip install -r requirements-dicom.txt"
CREDENTIALS = f"set {USER} and {PASSWORD}, or {TOKEN}, in the environment, or write an entry into ~/.netrc"
LOCAL = ("localhost", "127.0.0.1", "::1")


def is_uid(text: str) -> bool:
    """Whether a text is a DICOM UID: digits and dots, 64 letters at most.

    Leading zeros of a component, which the standard forbids, are let pass, since archives hold such UIDs.

    Example:
        >>> is_uid("1.2.840.10008"), is_uid("1.2/../3"), is_uid("1")
        (True, False, False)
    """
    return len(text) <= LONGEST_UID and UID.fullmatch(text) is not None


def checked_address(url: str) -> SplitResult:
    """The parts of a DICOMweb server's address.

    Raises:
        DicomError: it is no such address, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise DicomError(f"{url!r} is no address of a DICOMweb server, such as https://HOST/dicom-web")
    if parts.username or parts.password:
        raise DicomError(f"the address of the DICOMweb server holds a user or password; {CREDENTIALS}")
    return parts


@dataclass(frozen=True)
class WebSeries:
    """A series as the server lists it.

    Args:
        uid: SeriesInstanceUID.
        modality: "CT", "PT", ...; "" where it is not stated.
        instances: their number; 0 where it is not stated.
    """

    uid: str
    modality: str
    instances: int


class DicomWeb:
    """A DICOMweb server.

    Args:
        url: its address, such as ``https://pacs.example.org/dicom-web``.
        session: of ``requests``, for tests.

    Raises:
        DicomError: it is no such address, or holds a password.
        ImportError: dicomweb-client is not installed.
    """

    def __init__(self, url: str, session: Any = None) -> None:
        parts = checked_address(url)
        try:
            api = needed_module("dicomweb_client.api")
        except ImportError as error:
            raise ImportError(f"DICOMweb needs dicomweb-client: {INSTALL}") from error
        self.url = url.rstrip("/")
        session = needed_module("requests").Session() if session is None else session
        login = user_and_password()
        session.auth = _bearer(login) if isinstance(login, str) else login
        _wait_at_most(session, WAIT_S)
        if session.auth and parts.scheme == "http" and parts.hostname not in LOCAL:
            logger.warning("%s: the password is sent without encryption; use https", self.url)
        with self._told("use"):
            client = api.DICOMwebClient
            checks_uids = "permissive_uid" in inspect.signature(client).parameters  # not before 0.60
            self._client = client(self.url, session, **({"permissive_uid": True} if checks_uids else {}))
        self._client.set_http_retry_params(retry=False)  # it would try for half a minute before it says what is wrong

    def series(self, study: str) -> list[WebSeries]:
        """The series of a study.

        Raises:
            DicomError: it is no UID, the server cannot be reached or refuses, or it has no such study.
        """
        if not is_uid(study):
            raise DicomError(f"{study!r} is no UID of a study: digits and dots, {LONGEST_UID} at most")
        with self._told(f"list the series of study {study} of"):
            fields = ["Modality", "NumberOfSeriesRelatedInstances"]
            answer = self._client.search_for_series(study, fields=fields)
            headers = [needed_module("pydicom").Dataset.from_json(item) for item in answer]
        found = [
            WebSeries(
                text_of(header, "SeriesInstanceUID"),
                text_of(header, "Modality").upper(),
                integer_of(header, "NumberOfSeriesRelatedInstances"),
            )
            for header in headers
        ]
        if not found:
            raise DicomError(f"{self.url} has no study {study}")
        if bad := [each for each in found if not is_uid(each.uid)]:
            raise DicomError(f"{self.url}: study {study} has {len(bad)} series without a valid SeriesInstanceUID")
        return found

    def study_of(self, series: str) -> str:
        """StudyInstanceUID of a series.

        Raises:
            DicomError: it is no UID, the server cannot be reached or refuses, or it has no such series.
        """
        if not is_uid(series):
            raise DicomError(f"{series!r} is no UID of a series: digits and dots, {LONGEST_UID} at most")
        with self._told(f"look for series {series} on"):
            answer = self._client.search_for_series(search_filters={"SeriesInstanceUID": series})
            headers = [needed_module("pydicom").Dataset.from_json(item) for item in answer]
        mine = [header for header in headers if text_of(header, "SeriesInstanceUID") == series]
        studies = {uid for header in mine if is_uid(uid := text_of(header, "StudyInstanceUID"))}
        if len(studies) != 1:
            found = f"lists series {series} in several studies" if studies else f"has no series {series}"
            raise DicomError(f"{self.url} {found}")
        return studies.pop()

    def wanted(self, study: str, modalities: Sequence[str] = ("CT", "PT")) -> list[WebSeries]:
        """The series of these modalities in a study; arguments and errors as for :meth:`download`."""
        listed = self.series(study)
        lacking = [name for name in modalities if name not in {each.modality for each in listed}]
        if lacking:
            there = ", ".join(sorted({each.modality or "unknown" for each in listed}))
            names = " and no ".join("PET" if name == "PT" else name for name in lacking)
            raise DicomError(f"study {study} of {self.url} has no {names}; its series are of: {there}")
        return [each for each in listed if each.modality in modalities]

    def download(self, study: str, folder: Path, modalities: Sequence[str] = ("CT", "PT")) -> list[WebSeries]:
        """Write the images of a study into a folder, one file an image, uncompressed where the server can; its series.

        The time of each file is made from its SOPInstanceUID, so that ``--resume`` knows the same study again.

        Args:
            study: StudyInstanceUID.
            folder: receives the files.
            modalities: of the series to download; each must be there.

        Raises:
            DicomError: as :meth:`series`; a modality is missing; a series did not come whole; or an image of another
            study or series came.
        """
        wanted = self.wanted(study, modalities)
        for number, series in enumerate(wanted):
            self.fetch(study, series, folder, f"{number:03d}_")
        return wanted

    def fetch(self, study: str, series: WebSeries, folder: Path, prefix: str = "") -> None:
        """Write the images of one series into a folder; see :meth:`download`.

        Raises:
            DicomError: the series did not come whole, or an image of another study or series came.
        """
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        with self._told(f"download series {series.uid} of"), lenient():
            for count, dataset in enumerate(self._client.iter_series(study, series.uid), 1):
                self._require_part(dataset, study, series.uid)
                path = folder / f"{prefix}{count:05d}.dcm"
                dataset.save_as(path)  # as it came, which is a whole file
                digest = hashlib.sha256(text_of(dataset, "SOPInstanceUID").encode()).digest()
                os.utime(path, ns=(0, int.from_bytes(digest[:7], "big")))
        if count < max(series.instances, 1):
            raise DicomError(
                f"{self.url}: series {series.uid} did not come whole: {count} of {series.instances} images"
            )
        logger.info("downloaded: %s, %s", series.modality, counted(count, "image"))

    def _require_part(self, image: Any, study: str, series: str) -> None:
        """Refuse an image of another study or series: it may be of another patient."""
        for name, asked in (("StudyInstanceUID", study), ("SeriesInstanceUID", series)):
            if (got := text_of(image, name)) != asked:
                shown = printable(got or "none", LONGEST_UID)
                raise DicomError(f"{self.url}: an image of series {series} of study {study} has {name} {shown}")

    def store(self, paths: Sequence[Path]) -> None:
        """Store DICOM files.

        Raises:
            DicomError: the server cannot be reached, or refuses any of them.
        """
        dcmread = needed_module("pydicom").dcmread
        with self._told("store results on"), lenient():
            datasets = [dcmread(path) for path in paths]
            answer = self._client.store_instances(datasets)
            stored = {text_of(item, "ReferencedSOPInstanceUID") for item in items_of(answer, "ReferencedSOPSequence")}
            failed = {
                text_of(item, "ReferencedSOPInstanceUID"): integer_of(item, "FailureReason")
                for item in items_of(answer, "FailedSOPSequence")
            }
        names = {text_of(dataset, "SOPInstanceUID"): path.name for dataset, path in zip(datasets, paths, strict=True)}
        refused = [f"{names.get(uid, uid)} (reason {why:04X}H)" for uid, why in failed.items()]
        unsaid = [name for uid, name in names.items() if uid not in stored and uid not in failed]
        if refused or unsaid:
            what = "; ".join(refused + [f"{name} (the answer does not name it)" for name in unsaid])
            raise DicomError(f"{self.url} did not store: {what}")

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn what goes wrong on the way to a server into a sentence."""
        errors = needed_module("requests").exceptions
        start = f"cannot {doing} {self.url}"
        try:
            yield
        except DicomError:
            raise
        except errors.HTTPError as error:
            raise DicomError(f"{start}: {_status(error.response)}") from error
        except errors.SSLError as error:
            why = "its certificate is not trusted; REQUESTS_CA_BUNDLE names the file of the certificates to trust"
            raise DicomError(f"{start}: {why} ({error})") from error
        except errors.Timeout as error:
            raise DicomError(f"{start}: it does not answer in time") from error
        except (errors.ChunkedEncodingError, errors.ContentDecodingError) as error:
            raise DicomError(f"{start}: the connection broke off") from error
        except errors.ConnectionError as error:
            raise DicomError(f"{start}: it cannot be reached; is the address right, and the server running?") from error
        except Exception as error:  # what a server that is none answers ends in nearly any error
            if isinstance(error, OSError) and not isinstance(error, errors.RequestException):
                raise  # of a file, such as a full disk
            raise DicomError(f"{start}: its answer is not that of a DICOMweb server ({error})") from error


def _status(response: Any) -> str:
    """What a status of HTTP means here."""
    code = response.status_code
    if code in (401, 403):
        return f"it refuses access ({code}); {CREDENTIALS}"
    if code == 404:
        return "not found (404); Orthanc's address is http://HOST:8042/dicom-web"
    return f"it answers {code} {response.reason}"


def _wait_at_most(session: Any, seconds: tuple[float, float]) -> None:
    """Let every request of a session end after these times; the dicomweb-client of MONAI Label has no option for it."""
    send = session.send
    session.send = lambda request, **options: send(request, **{**options, "timeout": seconds})


def user_and_password() -> tuple[str, str] | str | None:
    """User and password, or the token, from the environment; None leaves it to ``.netrc``.

    Raises:
        DicomError: one is set without the other, or both ways are.
    """
    user, password, token = (os.environ.get(name) for name in (USER, PASSWORD, TOKEN))
    if token and (user or password):
        raise DicomError(f"{TOKEN} is set, and {USER} or {PASSWORD}, too: which is meant?")
    if bool(user) != bool(password):
        raise DicomError(f"of {USER} and {PASSWORD}, one alone is set in the environment")
    return token or ((user, password) if user and password else None)


def _bearer(token: str) -> Callable[[Any], Any]:
    """Authentication by a token, which ``requests`` takes out where it is sent on to another host."""

    def authenticate(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authenticate
