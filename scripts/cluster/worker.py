"""One patient after another, with a model that is loaded once; tables and audit are written by another process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cluster.nodes import software
from runtimes.inference import CaseList, add_products, configure_log, forget, load_bundle, predict_cases
from scripts import keys
from scripts.cohorts.cohort import Case
from scripts.prediction.description import Model
from scripts.prediction.outputs import PredictionWriter

WRITER = "handlers#0"


class PatientWriter(PredictionWriter):
    """Writes the files of each patient, and keeps the lines of the audit for the process that writes it.

    Attributes:
        lines: of the patient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lines: list[str] = []

    def take_case(self, case: Case, folder: str) -> None:
        """Make this patient the only one; ``folder`` is its name among all patients of the cohort."""
        patient = case[keys.PATIENT_ID]
        self.cases, self.folders = {patient: case}, {patient: folder}
        for kept in (self.rows, self.lesions, self.failures, self.problems, self.lines):
            kept.clear()

    def append_audit(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)

    def write_partial(self) -> None:
        """Nothing: the table is another process's."""

    def write_table(self, engine: Any = None) -> None:
        """Nothing: the tables are another process's."""


class Worker:
    """A model that is ready to predict.

    Arguments as for ``predict.py``; ``output``: folder for the results; ``model``: SHA-256 of the weights; ``code``:
    what :func:`cluster.nodes.software` said where the run was started.

    Raises:
        ValueError: weights or software here are others.
    """

    def __init__(
        self,
        output: str,
        ckpt_dir: str,
        device: str,
        threads: int,
        force: bool,
        report: bool,
        explain: bool,
        viewer: str | None,
        model: str,
        code: str,
    ) -> None:
        configure_log()
        torch.set_num_threads(threads)
        self.parser = load_bundle(output, ckpt_dir, device, force, viewer=viewer)
        if Model.of(self.parser.get_parsed_content("checkpoint")).sha256 != model:
            raise ValueError(f"{ckpt_dir} holds other weights here than where the run was started")
        if software() != code:
            raise ValueError("this software, or torch, is of another version here than where the run was started")
        writer = {**self.parser["handlers"][0], "_target_": f"{__name__}.{PatientWriter.__name__}"}
        self.parser["handlers"] = [writer]
        self.parser["dataset#data"] = CaseList()
        self.writer: PatientWriter = self.parser.get_parsed_content(WRITER)
        add_products(self.parser, self.writer, report or explain, explain)
        self.parser.get_parsed_content("initialize")

    def predict(self, case: Case, folder: str) -> Mapping[str, Any]:
        """Predict a patient and write the files.

        Args:
            case: of the patient.
            folder: name of the patient's folder.

        Returns:
            ``row`` of ``predictions.csv``, ``lesions`` (rows of ``lesions.csv``), ``audit`` (lines), ``problems``.
        """
        patient = case[keys.PATIENT_ID]
        self.writer.take_case(case, folder)
        forget(self.writer.folder(patient))  # a process that died may have left some of it
        predict_cases(self.parser, [case])
        return {
            "row": dict(self.writer.rows[patient]),
            "lesions": list(self.writer.lesions.get(patient, [])),
            "audit": list(self.writer.lines),
            "problems": dict(self.writer.problems),
        }
