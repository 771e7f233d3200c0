"""Patients of a cohort, predicted by processes on the nodes of a Ray cluster.

Each process loads the model once and has one patient at a time. A patient whose process died is given to another one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from command_line import BUNDLE, ROOT

from cluster.nodes import ClusterError, Share, mark, node_name, places, see_software, software, unseen
from scripts import keys
from scripts.cohorts.cohort import Case
from scripts.cohorts.scans import counted
from scripts.prediction.description import Model
from scripts.prediction.outputs import PredictionWriter

logger = logging.getLogger("predict")

MOST_DEATHS = 3  # of processes with the same patient
MOST_STARTS = 3  # without success, a process
WAIT_SECONDS = 30.0
TABLE_SECONDS = 10.0  # between two writings of the table so far
NODE, PROBLEM, UNSEEN, FAILURE = "node", "problem", "unseen", "failure"


class Predictor:
    """A process on a node, made by Ray.

    Args:
        code: folder of the commands of this software.
        paths: that the node has to see.
        settings: arguments of :class:`cluster.worker.Worker`.
    """

    def __init__(self, code: str, paths: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.code, self.paths, self.settings = code, paths, settings
        self.worker: Any = None

    def start(self) -> dict[str, str]:
        """Load the model.

        Returns:
            The name of the ``node``, and the ``problem`` because of which no patient can be predicted there, or "".
        """
        answer = {"node": node_name(), "problem": ""}
        if missing := unseen(self.paths):
            return {**answer, "problem": f"does not see {', '.join(missing)}"}
        see_software(self.code)
        try:
            from cluster.worker import Worker

            self.worker = Worker(**self.settings)
        except Exception as error:  # of any kind: the other nodes may be sound
            return {**answer, "problem": f"cannot predict: {type(error).__name__}: {error}"}
        return answer

    def predict(self, case: Case, folder: str, paths: Sequence[str]) -> Mapping[str, Any]:
        """Predict a patient, as :meth:`cluster.worker.Worker.predict`.

        Args:
            case: of the patient.
            folder: name of the patient's folder.
            paths: that exist where the run was started.

        Returns:
            Of the patient; or ``unseen``: those of the paths that the node does not see.
        """
        missing = unseen(paths)
        return {"unseen": missing} if missing else self.worker.predict(case, folder)


def scan_paths(case: Case) -> list[str]:
    """A path of each scan of a case; of a DICOM series its first file."""
    choice = case.get(keys.DICOM)
    scans = [choice.ct.paths[0], choice.pet.paths[0]] if choice else [case.get(keys.CT), case.get(keys.PET)]
    return [os.fspath(scan) for scan in scans if isinstance(scan, str | os.PathLike)]


def predict_on_nodes(writer: PredictionWriter, cases: Sequence[Case], share: Share, **settings: Any) -> None:
    """Predict the cases on the cluster that this process is connected to.

    Their paths are absolute; the writer gets rows, lesions and audit.

    Raises:
        ClusterError: no node can predict; the message names them.
    """
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a node may not see this software
    settings |= {
        "output": str(writer.output_dir),
        "device": "cuda:0" if share.gpus else "cpu",
        "threads": share.cores,
        "model": Model.of(str(writer.checkpoint)).sha256,
        "code": software(),
    }
    count = min(places(share), len(cases))
    logger.info("%d processes of %d cores, %g GPUs on the cluster", count, share.cores, share.gpus)
    with mark(writer.output_dir) as marker, logging_redirect_tqdm():
        paths = [str(ROOT / "scripts"), str(BUNDLE), str(marker), str(Path(settings["ckpt_dir"], "model.pt"))]
        paths += [settings["viewer"]] if settings["viewer"] else []
        remote = ray.remote(Predictor).options(**share.options())
        pool = Pool(lambda: remote.remote(str(ROOT / "scripts"), paths, settings), count, writer.folders)
        written = time.monotonic()
        for patient, answer in tqdm(pool.predict(cases), total=len(cases), desc="predicting", unit="patient"):
            if FAILURE in answer:
                logger.error("%s: no prediction: %s", patient, answer[FAILURE])
                writer.fail(patient, answer[FAILURE])
            else:
                writer.take_result(patient, **answer)
            if time.monotonic() > written + TABLE_SECONDS:  # a large table is not written for every patient
                writer.write_partial()
                written = time.monotonic()
    seconds = time.monotonic() - pool.began
    logger.info("%s in %.1f s: %.2f a second", counted(len(cases), "patient"), seconds, len(cases) / seconds)


class Pool:
    """Processes of a cluster, each with one patient at a time.

    Args:
        make: starts a :class:`Predictor`.
        count: number of processes.
        folders: name of each patient's folder.

    Attributes:
        began: the monotonic clock when the first process was ready, in seconds.
    """

    def __init__(self, make: Callable[[], Any], count: int, folders: Mapping[str, str]) -> None:
        self.make, self.count, self.folders = make, count, folders
        self.waiting: deque[Case] = deque()
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Case | None]] = {}  # by what Ray will answer; None: it starts
        self.unfit: list[Any] = []  # kept, so that Ray starts no other process in their place
        self.nodes: dict[Any, str] = {}
        self.deaths: Counter[str] = Counter()
        self.fruitless = 0
        self.told: set[str] = set()
        self.began = 0.0

    def predict(self, cases: Sequence[Case]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Patient and answer of each, in the order in which they end; an answer may be ``{"failure": why}``.

        Raises:
            ClusterError: no process is left.
        """
        import ray

        self.waiting.extend(cases)
        for _ in range(self.count):
            self._start()
        while self.waiting or any(case is not None for _, case in self.busy.values()):
            while self.waiting and self.idle:
                self._give(self.idle.pop(), self.waiting.popleft())
            if not self.busy:
                raise ClusterError("no node of the cluster can predict: " + "; ".join(sorted(self.told)))
            ready, _ = ray.wait(list(self.busy), timeout=WAIT_SECONDS)
            if not ready and all(case is None for _, case in self.busy.values()):
                logger.warning("waiting for the cluster, which starts no process: are its cores or GPUs in use?")
            for ref in ready:
                actor, case = self.busy.pop(ref)
                answer = self._answer(ref, actor, case)
                if case is not None and answer is not None:
                    yield case[keys.PATIENT_ID], answer

    def _start(self) -> None:
        actor = self.make()
        self.busy[actor.start.remote()] = (actor, None)

    def _give(self, actor: Any, case: Case) -> None:
        seen_here = [path for path in scan_paths(case) if Path(path).exists()]
        self.busy[actor.predict.remote(case, self.folders[case[keys.PATIENT_ID]], seen_here)] = (actor, case)

    def _answer(self, ref: Any, actor: Any, case: Case | None) -> Mapping[str, Any] | None:
        """What a process said of its patient; None where there is nothing to hand on."""
        import ray

        try:
            answer = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # raised by the process, which goes on
            why = f"{type(error.cause).__name__}: {error.cause}"
            if case is None:
                self._refuse(actor, f"cannot predict: {why}")
                return None
            self.idle.append(actor)
            return {FAILURE: why}
        except ray.exceptions.RayError as error:
            return self._died(actor, case, error)
        self.fruitless = 0
        problem = f"does not see {', '.join(answer[UNSEEN])}" if UNSEEN in answer else answer.get(PROBLEM)
        if case is None:
            self.nodes[actor] = answer[NODE]
        if problem:
            self._refuse(actor, problem)
            self.waiting.extendleft([case] if case else [])
            return None
        self.idle.append(actor)
        self.began = self.began or time.monotonic()
        return answer

    def _refuse(self, actor: Any, problem: str) -> None:
        """Give a process no patient any more."""
        self.unfit.append(actor)
        said = f"node {self.nodes.get(actor, 'not known')} {problem}"
        if said not in self.told:
            logger.error("%s; it predicts no patients", said)
        self.told.add(said)

    def _died(self, actor: Any, case: Case | None, error: Exception) -> Mapping[str, Any] | None:
        """Start another process for one that died, and give its patient to another one; the answer after too many."""
        import ray

        ray.kill(actor)  # should it live and only be out of reach
        node, why = self.nodes.pop(actor, "not known"), " ".join(str(error).split())[:300]
        if case is None:
            self.fruitless += 1
            if self.fruitless >= MOST_STARTS * self.count:
                raise ClusterError(f"processes end while they start: {why}")
        self._start()
        if case is None:
            return None
        patient = case[keys.PATIENT_ID]
        self.deaths[patient] += 1
        if self.deaths[patient] == MOST_DEATHS:
            return {FAILURE: f"its process died {MOST_DEATHS} times, last on node {node}: {why}"}
        logger.warning("%s: its process on node %s died, another one predicts this patient: %s", patient, node, why)
        self.waiting.append(case)
        return None
