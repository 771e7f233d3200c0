"""What NVIDIA FLARE runs of a federated training: the executor of a client, the controller of the server.

``federated_job.py`` puts this file into the job folder, beside the bundle's ``configs`` and ``scripts``. All that is
computed is in :mod:`scripts.runtimes.federated`; it needs no NVIDIA FLARE.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monai.fl.utils.exchange_object import ExchangeObject
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.bcast_manager import _KEY_MIN_RESPS
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg

from scripts.cohorts.files import write_text
from scripts.runtimes.federated import (
    CENTRE_LOG,
    LOCAL,
    REASON,
    CentreClient,
    keep_log_here,
    read_weights,
    write_global_model,
)
from scripts.training.sampling import innermost

TRAIN, VALIDATE = "train", "validate"
HERE = Path(__file__).resolve().parent
START, MODEL, HISTORY = "start.pt", "model.pt", "history.json"
logger = logging.getLogger("scripts.runtimes.federated_flare")  # to the centre's own file


class CentreExecutor(Executor):
    """Runs :class:`scripts.runtimes.federated.CentreClient` for the tasks of :class:`GlobalModel`.

    Args:
        by_centre: keep the cases of the centre that has this client's name; else all of ``dataset_dir``.
        **options: of the client.
    """

    def __init__(self, by_centre: bool, **options: Any) -> None:
        super().__init__()
        self.by_centre = by_centre
        self.options = options
        self.client: CentreClient | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Pass the end of the job on."""
        if self.client is not None and event_type == EventType.ABORT_TASK:
            self.client.abort()
        elif self.client is not None and event_type == EventType.END_RUN:
            self.client.finalize()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Train, or evaluate the final model; a fault is described in the centre's own log only."""
        output = Path(fl_ctx.get_prop(FLContextKey.APP_ROOT)) / "output"
        try:
            if self.client is None:
                self.client = self._make(output, fl_ctx.get_identity_name())
            received = FLModelUtils.from_shareable(shareable)
            answer = self._answer(output, task_name, received, abort_signal)
        except Exception as error:  # whose message may name patients
            logger.exception("the task %r failed", task_name)
            logger.error("%s%s", REASON, innermost(error))
            self.log_error(
                fl_ctx, f"the task {task_name!r} failed: see {CENTRE_LOG} in this client's folder of the job"
            )
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.TASK_ABORTED) if abort_signal.triggered else FLModelUtils.to_shareable(answer)

    def _make(self, output: Path, name: str) -> CentreClient:
        keep_log_here(output / CENTRE_LOG)
        centre = name if self.by_centre else None
        client = CentreClient(str(HERE), output_dir=str(output), centre=centre, **self.options)
        client.initialize()
        return client

    def _answer(self, output: Path, task: str, received: FLModel, abort: Signal) -> FLModel:
        client = self.client
        assert client is not None
        weights = ExchangeObject(weights=received.params)
        metrics = dict(client.evaluate(weights).metrics or {})
        if task == VALIDATE and client.norms == LOCAL:
            client.save_own_model(output / MODEL)
        if task == VALIDATE or abort.triggered:
            return FLModel(metrics=metrics)
        client.train(weights, {"round": received.current_round})
        update = client.update()
        return FLModel(
            params_type=ParamsType.DIFF,
            params=update.weights,
            metrics={**metrics, **update.metrics},
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: update.cases},
        )


class GlobalModel(FedAvg):
    """FedAvg over the centres; writes ``model.pt``, a checkpoint of the bundle, and ``history.json`` after each round.

    Every weight is averaged over the centres that sent it, in proportion to their training cases.

    Args:
        min_centres: a round with fewer answers ends the training; the model of the round before is kept.
        wait_s: seconds that others are waited for once so many have answered.
        facts: for the provenance of the model.
        **options: of FedAvg.
    """

    def __init__(self, min_centres: int, wait_s: int, facts: dict[str, Any], **options: Any) -> None:
        super().__init__(persistor_id="", **options)
        self.min_centres = min_centres
        self.wait_s = wait_s
        self.facts = facts
        self.answers: dict[str, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []

    def load_model(self) -> FLModel:
        """The weights to start from."""
        return FLModel(params_type=ParamsType.FULL, params=read_weights(HERE / START))

    def send_model(
        self,
        task_name: str = TRAIN,
        data: FLModel = None,
        targets: list[str] | None = None,
        min_responses: int | None = None,
        timeout: int = 0,
        callback: Callable[[FLModel], Any] | None = None,
    ) -> None:
        """Send the weights of a round; every answer is noted."""
        self.answers = {}

        def noted(result: FLModel) -> Any:
            self.answers[result.meta["client_name"]] = dict(result.metrics or {})
            return callback(result) if callback else None

        least, wait = self.min_centres, self.wait_s
        self.broadcast_model(data, task_name, targets, least, timeout, wait, blocking=False, callback=noted)

    def _process_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Take an answer; NVIDIA FLARE counts that of a centre that failed too, so that one more is needed then."""
        failed = client_task.result.get_return_code() != ReturnCode.OK
        super()._process_result(client_task, fl_ctx)
        if failed:
            client_task.task.props[_KEY_MIN_RESPS] += 1

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """The global model after a round."""
        if len(self.answers) < self.min_centres:
            found = ", ".join(sorted(self.answers)) or "none"
            raise RuntimeError(
                f"round {self.current_round + 1}: {len(self.answers)} centres answered ({found}), "
                f"{self.min_centres} are needed; {MODEL} is of the round before"
            )
        return super().update_model(model, aggr_result)

    def save_model(self, model: FLModel) -> None:
        """Write the model and the numbers of the round."""
        folder = Path(self.get_run_dir())
        self.history.append({"round": self.current_round + 1, "centres": self.answers})
        facts = {"rounds": self.current_round + 1, **self.facts}
        write_global_model(folder / MODEL, HERE / START, model.params, self.answers, facts)
        write_text(folder / HISTORY, json.dumps(self.history, indent=1))
        self.final = model

    def run(self) -> None:
        """Train, then have every centre evaluate the final model."""
        super().run()
        if self.abort_signal.triggered:
            return
        model = FLModel(params_type=ParamsType.FULL, params=self.final.params, current_round=self.current_round + 1)
        results = self.broadcast_model(
            model, VALIDATE, min_responses=self.min_centres, wait_time_after_min_received=self.wait_s
        )
        final = {result.meta["client_name"]: dict(result.metrics or {}) for result in results}
        self.history.append({"round": "final", "centres": final})
        write_text(Path(self.get_run_dir()) / HISTORY, json.dumps(self.history, indent=1))
