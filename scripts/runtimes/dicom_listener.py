"""A DICOM node: receives PET/CT studies, predicts them, and sends back results or the reason why there are none.

The node is an SCP of C-ECHO and C-STORE (pynetdicom). Received images go to the disk (:mod:`runtimes.dicom_queue`)
before they are acknowledged. One study at a time is predicted by ``scripts/predict.py`` in a process of its own, which
can neither block nor end the node.
"""

from __future__ import annotations

import csv
import ipaddress
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from command_line import BUNDLE, ROOT, UsageError

from runtimes.dicom_queue import Status, StudyQueue
from scripts.cohorts.files import sha256_of
from scripts.cohorts.scans import counted
from scripts.dicom.refusal import write_refusal
from scripts.dicom.seg import Model
from scripts.dicom.tags import DicomError, needed_module, text_of
from scripts.dicom.web import INSTALL, DicomWeb

logger = logging.getLogger("serve")

SUCCESS, NO_ROOM, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
IMAGES = (  # storage classes whose objects are kept
    *("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"),
    *("1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1"),
)
PLAIN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")  # transfer syntaxes: explicit and implicit VR, little endian
PACKED = (  # lossless ones, taken where they can be decoded
    *("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"),
    "1.2.840.10008.1.2.5",
)
AE_TITLE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?")
MOST_ASSOCIATIONS, TIMEOUT_S = 10, 60
RETRY_S = 60.0  # until an answer that could not be sent is sent again
LONGEST_PREDICTION_S = 3600.0
MOST_ATTEMPTS = 5
POLL_S = 0.5
MOST_BYTES = 2**30  # of one object
MOST_MESSAGE_BYTES = 2**20  # of one message (PDU): requests are shorter, and pieces of an object have 16 kB


@dataclass(frozen=True)
class Peer:
    """Another DICOM node.

    Args:
        ae_title: its AE title.
        host: its address; "" for any (of a sender).
        port: where it listens; 0 for a sender.
    """

    ae_title: str
    host: str = ""
    port: int = 0


def sender(text: str) -> Peer:
    """A node that may send: ``AE_TITLE@ADDRESS``, or ``AE_TITLE`` from any address."""
    title, at, host = text.partition("@")
    try:
        host = str(ipaddress.ip_address(host)) if at else ""
    except ValueError:
        title = ""
    if not AE_TITLE.fullmatch(title):
        raise UsageError(f"--peers: {text!r} is neither AE_TITLE nor AE_TITLE@IP_ADDRESS (16 letters at most)")
    return Peer(title, host)


def receiver(text: str) -> Peer:
    """A node that gets the answers: ``AE_TITLE@HOST:PORT``."""
    found = re.fullmatch(r"(.+)@([\w.:-]+):(\d{1,5})", text)
    if not found or not AE_TITLE.fullmatch(found[1]) or not 0 < int(found[3]) < 2**16:
        raise UsageError(f"--send is AE_TITLE@HOST:PORT, got {text!r}")
    return Peer(found[1], found[2], int(found[3]))


def pynetdicom() -> Any:
    """The library."""
    try:
        return needed_module("pynetdicom")
    except ImportError as error:
        raise ImportError(f"the DICOM listener needs pynetdicom: {INSTALL}") from error


class Receiver:
    """The node's network side.

    Associations for another AE title, or of one that is not among the peers, are rejected; those from other addresses
    are aborted.
    """

    def __init__(self, queue: StudyQueue, ae_title: str, peers: Sequence[Peer]) -> None:
        self.queue, self.peers = queue, tuple(peers)
        net = pynetdicom()
        self.node = net.AE(ae_title)
        self.node.require_called_aet = True
        self.node.require_calling_aet = [peer.ae_title for peer in peers]
        self.node.maximum_associations = MOST_ASSOCIATIONS
        self.node.network_timeout = self.node.dimse_timeout = self.node.acse_timeout = TIMEOUT_S
        syntaxes = [*PLAIN, *filter(can_decode, PACKED)]
        self.node.add_supported_context("1.2.840.10008.1.1")  # C-ECHO
        for context in net.AllStoragePresentationContexts:
            self.node.add_supported_context(context.abstract_syntax, syntaxes)
        self._received: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # bytes of the object that is coming
        self._server: Any = None

    def start(self, host: str, port: int) -> int:
        """Listen; gives the port, which the system chooses where ``port`` is 0."""
        events = pynetdicom().evt
        handlers = [
            (events.EVT_CONN_OPEN, self.limit_messages),
            (events.EVT_REQUESTED, self.check_peer),
            (events.EVT_PDU_RECV, self.check_size),
            (events.EVT_C_STORE, self.store),
        ]
        self._server = self.node.start_server((host, port), block=False, evt_handlers=handlers)
        return int(self._server.socket.getsockname()[1])

    def stop(self) -> None:
        """End listening."""
        if self._server is not None:
            self._server.shutdown()

    def limit_messages(self, event: Any) -> None:
        """Close a connection on which a longer message is announced than there are.

        The library reads up to 4 GB into memory, from anybody, before it knows who sends.
        """
        connection = event.assoc.dul.socket
        receive = connection.recv

        def limited(size: int) -> bytearray:
            if size <= MOST_MESSAGE_BYTES:
                return receive(size)
            logger.warning("closed a connection: a message of %.0f MB is announced", size / 2**20)
            connection.close()
            return bytearray()

        connection.recv = limited

    def check_peer(self, event: Any) -> None:
        """Abort an association that comes from another address than that of its AE title."""
        requestor = event.assoc.requestor
        title, host = str(requestor.primitive.calling_ae_title).strip(), requestor.address
        if any(peer.ae_title == title and peer.host in ("", host) for peer in self.peers):
            return
        logger.warning("refused: %r at %s is not among --peers", title, host)
        if any(peer.ae_title == title for peer in self.peers):
            event.assoc.abort()  # an unknown title is rejected by the library

    def check_size(self, event: Any) -> None:
        """Close the connection of a sender whose object is larger than any image: it is in memory until it is whole."""
        size = self._received.get(event.assoc, 0) + getattr(event.pdu, "pdu_length", 0)
        self._received[event.assoc] = size
        if size > MOST_BYTES:
            logger.warning("closed a connection: an object of more than %.0f MB", MOST_BYTES / 2**20)
            event.assoc.dul.socket.close()

    def store(self, event: Any) -> int:
        """Keep one object; gives the status of DICOM that the sender gets.

        Objects other than CT and PET are accepted and not kept: archives send whole studies, and would end at the first
        that is refused.
        """
        self._received.pop(event.assoc, None)
        try:
            instance = str(event.request.AffectedSOPInstanceUID)
            if str(event.request.AffectedSOPClassUID) not in IMAGES:
                logger.info("not kept: %s of class %s", instance, event.request.AffectedSOPClassUID)
                return SUCCESS
            content = event.encoded_dataset()
            tags = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"]
            header = needed_module("pydicom").dcmread(BytesIO(content), stop_before_pixels=True, specific_tags=tags)
            study = text_of(header, "StudyInstanceUID")
            announced = (str(event.request.AffectedSOPClassUID), instance)
            if (text_of(header, "SOPClassUID"), text_of(header, "SOPInstanceUID")) != announced:
                raise ValueError("its SOP Class UID or SOP Instance UID is not the one that was announced")
        except Exception as error:  # damaged or hostile bytes end in nearly any error
            logger.warning("refused an object that cannot be read: %s", error)
            return NOT_UNDERSTOOD
        try:
            self.queue.receive(study, instance, content)
        except ValueError as error:
            logger.warning("refused an object: %s", error)
            return NOT_UNDERSTOOD
        except OSError as error:
            logger.error("refused an image, the disk has no room for it or cannot be written: %s", error)
            return NO_ROOM
        return SUCCESS


def can_decode(syntax: str) -> bool:
    """Whether images of a transfer syntax can be read here."""
    decoder = needed_module("pydicom.pixels").get_decoder(needed_module("pydicom.uid").UID(syntax))
    return bool(decoder.is_available)


class NotSentError(Exception):
    """An answer has not arrived; the message says why."""


class Worker:
    """Predicts what is complete with the ``options`` of ``scripts/predict.py``, and sends the answers."""

    def __init__(
        self, queue: StudyQueue, ae_title: str, destination: Peer | DicomWeb, options: Mapping[str, str], model: Model
    ) -> None:
        self.queue, self.ae_title, self.destination = queue, ae_title, destination
        self.options, self.model = dict(options), model
        self.stopped = threading.Event()

    def run(self) -> None:
        """Work until :attr:`stopped` is set."""
        while not self.stopped.is_set():
            if not self.step():
                self.stopped.wait(POLL_S)

    def step(self) -> bool:
        """Send one answer or predict one study; False where there is nothing to do."""
        if (study := self.queue.next_to_send()) is not None:
            self.send(study)
        elif (study := self.queue.next_complete()) is not None:
            self.predict(study)
        else:
            self.queue.forget_old()
            return False
        return True

    def predict(self, study: str) -> None:
        """Predict one study; its answer is results, or a report of the reason."""
        place = self.queue.work / f"{study}-{time.time_ns()}"
        try:
            status = self.queue.begin(study, place / "study")
            images = counted(len(self.queue.images(study)), "image")
            logger.info("study %s: %s, attempt %d", study, images, status.attempts)
            if status.attempts > MOST_ATTEMPTS:
                files, reason = list[Path](), f"its prediction was begun {MOST_ATTEMPTS} times and never ended"
            else:
                files, reason = self._predicted(place)
            if self.stopped.is_set():
                self.queue.interrupt(study, status)
                return
            self._answer(study, status, files, reason, place)
        except OSError as error:  # such as a full disk: further images are refused until there is room
            logger.error("study %s: put off for %.0f s: %s", study, RETRY_S, error)
            self.queue.retry(study, RETRY_S)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _answer(self, study: str, status: Status, files: list[Path], reason: str, place: Path) -> None:
        if reason:
            logger.warning("study %s: no prediction: %s", study, reason)
            try:
                write_refusal(place / "refusal_sr.dcm", reason, sorted((place / "study").iterdir()), model=self.model)
                files.append(place / "refusal_sr.dcm")
            except OSError:
                raise
            except Exception as error:  # headers are whatever the sender wrote; the node goes on
                logger.error("study %s: the reason cannot be sent: %r", study, error)
        self.queue.answer(study, status, "reason" if reason else "results", reason, files)

    def _predicted(self, place: Path) -> tuple[list[Path], str]:
        """DICOM files of the results in a folder ``study``, and what has none and why."""
        out, options = place / "out", [word for name, value in self.options.items() for word in (f"--{name}", value)]
        command = [sys.executable, str(ROOT / "scripts" / "predict.py"), str(place / "study"), str(out), *options]
        with (place / "log.txt").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            end, late = time.monotonic() + LONGEST_PREDICTION_S, False
            while process.poll() is None and not self.stopped.is_set() and not late:
                self.stopped.wait(POLL_S / 5)
                late = time.monotonic() > end
            if process.poll() is None:
                process.kill()
            code = process.wait()
        if late:
            return [], f"its prediction did not end in {LONGEST_PREDICTION_S / 60:.0f} minutes"
        try:
            rows = list(csv.DictReader((out / "predictions.csv").read_text(encoding="utf-8").splitlines()))
        except OSError:
            lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            # names of folders hold the patient's id
            said = re.sub(rf"{re.escape(str(place))}\S*", "(a file)", lines[-1]) if lines else "it said nothing"
            return [], f"the prediction ended with code {code}: {said}"
        files = [path.parent / name for path in sorted(out.glob("*/prediction.json")) for name in dicom_files(path)]
        reasons = [without_id(row) for row in rows if row["status"] == "failed"]
        if not files and not reasons:
            reasons = [without_id(row) for row in rows] or ["there is no patient in it"]
        return files, "; ".join(dict.fromkeys(reasons))

    def send(self, study: str) -> None:
        """Send an answer; one that does not arrive is sent again later."""
        paths, to = self.queue.to_send(study), self.destination
        where = to.url if isinstance(to, DicomWeb) else to.ae_title
        try:
            if paths and isinstance(to, DicomWeb):
                to.store(paths)
            elif paths and isinstance(to, Peer):
                send_files(self.ae_title, to, paths)
        except (NotSentError, DicomError, OSError) as error:
            logger.error("study %s: not sent, again in %.0f s: %s", study, RETRY_S, error)
            self.queue.postpone(study, str(error), RETRY_S)
            return
        self.queue.finish(study, where)
        logger.info("study %s: sent to %s: %s", study, where, ", ".join(path.name for path in paths) or "nothing")


def without_id(row: Mapping[str, str]) -> str:
    """The reason in a row of ``predictions.csv`` without the patient's id.

    Example:
        >>> without_id({"PatientID": "ID-1", "reason": "patient ID-1: no PET beside ID-1"})
        'no PET beside (the patient)'
    """
    patient, reason = row["PatientID"], row["reason"]
    return reason.replace(f"patient {patient}: ", "").replace(patient, "(the patient)") if patient else reason


def dicom_files(prediction: Path) -> list[str]:
    """Names of the DICOM files of a prediction."""
    files = json.loads(prediction.read_text(encoding="utf-8"))["files"]
    return [file for name, file in files.items() if file and name.startswith("dicom_")]


def send_files(ae_title: str, peer: Peer, paths: Sequence[Path]) -> None:
    """Send DICOM files by C-STORE."""
    node = pynetdicom().AE(ae_title)
    node.network_timeout = node.dimse_timeout = node.acse_timeout = node.connection_timeout = TIMEOUT_S
    dcmread = needed_module("pydicom").dcmread
    for path in paths:
        header = dcmread(path, stop_before_pixels=True)
        node.add_requested_context(header.SOPClassUID, header.file_meta.TransferSyntaxUID)
    association = node.associate(peer.host, peer.port, ae_title=peer.ae_title)
    if not association.is_established:
        why = "rejects the association" if association.is_rejected else "cannot be reached"
        raise NotSentError(f"{peer.ae_title} at {peer.host}:{peer.port} {why}")
    try:
        for path in paths:
            try:
                answer = association.send_c_store(path)
            except (ValueError, RuntimeError) as error:
                raise NotSentError(f"{path.name}: {error}") from error
            status = answer.get("Status")
            if status is None:
                raise NotSentError(f"{path.name}: the connection to {peer.ae_title} broke off")
            if status not in (0x0000, 0x0001) and status & 0xF000 != 0xB000:  # warnings are stored
                raise NotSentError(f"{path.name}: {peer.ae_title} refuses it with status {status:04X}H")
    finally:
        association.release()


def software(weights: Path) -> Model:
    """What a reason says of the software."""
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return Model(metadata["name"], metadata["version"], metadata["authors"], sha256_of(weights))


def listen(
    spool: Path,
    destination: Peer | DicomWeb,
    peers: Sequence[Peer],
    ae_title: str,
    address: tuple[str, int],
    limits: tuple[float, float, float],
    options: Mapping[str, str],
) -> None:
    """Receive, predict and answer until SIGTERM or SIGINT.

    Args:
        spool: folder of the queue.
        destination: of the answers.
        peers: who may send.
        ae_title: of this node.
        address: host and port to listen on.
        limits: of :class:`.StudyQueue`: seconds until a study is complete, seconds for which it is kept, free bytes.
        options: of ``scripts/predict.py``; ``ckpt_dir`` among them.

    Raises:
        OSError: the folder or the address cannot be used, or there are no weights.
    """
    model = software(Path(options["ckpt_dir"]) / "model.pt")
    queue = StudyQueue(spool.expanduser().resolve(), *limits)
    worker = Worker(queue, ae_title, destination, options, model)
    network = Receiver(queue, ae_title, peers)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stopped.set())
    port = network.start(*address)
    logger.info("%s listens on %s:%d; research use only", ae_title, address[0], port)
    try:
        worker.run()
    finally:
        network.stop()
        queue.close()
    logger.info("stopped; what was received is kept in %s", spool)
