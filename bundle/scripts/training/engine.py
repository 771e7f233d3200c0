"""Batch preparation, inferers, evaluators, learning-rate schedule, speed and error messages of the workflows."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import sys
import traceback
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch.nn.parallel import DistributedDataParallel

from scripts import keys
from scripts.model.ensemble import FoldEnsemble
from scripts.model.networks import IN_CHANNELS
from scripts.model.unet import set_checkpointing
from scripts.training.augmentation import Augmentation
from scripts.training.sampling import ERROR, innermost, reason

logger = logging.getLogger(__name__)

TARGET_KEYS = (
    *(keys.SEG, keys.SEG_KNOWN, keys.SEG_CLASSES_KNOWN, keys.HPV, keys.HPV_KNOWN),
    *(keys.TIME, keys.EVENT, keys.SURV_KNOWN),
)


def plain_errors() -> None:
    """Print one line instead of a traceback for errors raised by this package.

    MONAI wraps errors in config expressions several times, which hides the message in a long traceback. An interruption
    (Ctrl-C) also gets one line. Other errors, and all errors with ``TRACEBACK=1`` in the environment, keep their
    traceback. Exceptions themselves are unchanged.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = innermost(error)
        frames = traceback.extract_tb(cause.__traceback__)
        ours = bool(frames) and Path(__file__).parents[1] in Path(frames[-1].filename).parents
        if os.environ.get("TRACEBACK"):
            sys.__excepthook__(kind, error, trace)
        elif isinstance(error, KeyboardInterrupt):
            print(
                "interrupted: rerun the same command to resume training from the last complete epoch", file=sys.stderr
            )
        elif ours and isinstance(cause, ValueError | RuntimeError | OSError):
            print(f"error: {cause}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def default_amp(device: torch.device | str) -> bool:
    """Whether bfloat16 is faster on ``device``: on GPUs that support it, on CPUs with AMX matrix units."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported())


def tune_allocator() -> None:
    """Keep large activations in the heap instead of mapping them anew in every operation (glibc's ``mallopt``).

    About 1.7 times faster in float32 on CPU, for more resident memory. No effect with another C library. Call before
    the first large allocation.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 256 * 1024 * 1024)


def speed_up(
    network: FoldEnsemble, inferer: NetworkInferer | None = None, compiled: bool = False, checkpointing: bool = False
) -> None:
    """Optimise an ensemble for speed or memory, in place; its outputs stay the same.

    For inference, batch norms are folded into the convolutions before them, which changes the weights. With
    ``compiled``, torch compiles each fold: this takes a minute or more at the first batch and for each new batch size,
    so it is worthwhile for cohorts and training only. If it fails, a warning says why and the network runs uncompiled.

    Args:
        network: the ensemble, with its weights, on its device.
        inferer: used for inference; None for training.
        compiled: whether to compile.
        checkpointing: use gradient checkpointing: less memory, more time.
    """
    set_checkpointing(network, checkpointing)
    if inferer is not None:
        network.eval().fold_norms()
    if not compiled:
        return
    device = next(network.parameters()).device
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        logger.warning("compile: there is no C++ compiler (install g++); the network runs uncompiled, which is slower")
        return
    for fold in network.folds:
        fold.compile(options={"freezing": True} if inferer is not None else None)
    if inferer is None:
        return
    image = torch.zeros((1, IN_CHANNELS, *network.settings["roi_size"]), device=device)
    clinical = torch.zeros((1, network.folds[0].clinical_features), device=device)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            inferer(image, network, clinical=clinical)
    except Exception as error:  # compilers raise many kinds
        logger.warning("compile: %s; the network runs uncompiled, which is slower", reason(error))
        for fold in network.folds:
            fold._compiled_call_impl = None


def local_rank() -> int:
    """Number of this process among those of its computer.

    Raises:
        RuntimeError: it was not started by ``torchrun``.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("multi_gpu_train.json is for processes that torchrun starts: see docs/training.md")
    return int(os.environ["LOCAL_RANK"])


def join_ranks(device: torch.device | str) -> None:
    """Join the other processes of a training; this one's GPU becomes its default, which collective calls use."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")


def over_ranks(network: torch.nn.Module, device: torch.device | str) -> DistributedDataParallel:
    """``network``, to be trained by all ranks: gradients are averaged.

    On GPUs batch norms are computed over the batches of all ranks (``SyncBatchNorm``, in place). On CPU, where torch
    cannot, each rank has those of its own, which :class:`scripts.training.handlers.RankStatistics` averages.
    """
    if torch.device(device).type != "cuda":
        return DistributedDataParallel(network, forward_sync_buffers=False)
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device], forward_sync_buffers=False)


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, milestones: Sequence[int], factors: Sequence[float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Piecewise constant learning rate: the base rate times ``factors[k]`` from epoch ``milestones[k]`` on.

    Epochs are counted from 0; to be stepped once an epoch. (torch's ``MultiStepLR`` has one factor for all milestones.)

    Raises:
        ValueError: these are no lists of as many numbers, the milestones do not rise, or a factor is negative.
    """
    if not isinstance(milestones, list | tuple) or not isinstance(factors, list | tuple):
        raise ValueError(
            f"lr_milestones {milestones!r} and lr_factors {factors!r} must be lists, such as [100] and [0.5]"
        )
    if len(milestones) != len(factors) or list(milestones) != sorted(milestones):
        raise ValueError(f"lr_milestones {list(milestones)} must rise and match lr_factors {list(factors)}")
    if not all(factor >= 0 for factor in factors):
        raise ValueError(f"lr_factors {list(factors)} must not be negative")
    steps = [1.0, *factors]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: steps[bisect_right(milestones, epoch)])


def prepare_batch(
    batch: Mapping[str, Any],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    augmentation: Augmentation | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple, dict[str, torch.Tensor | None]]:
    """Image, targets (of :data:`TARGET_KEYS`, if present) and clinical vector of a batch, as MONAI engines expect.

    Image and mask become float32 on the device.

    Args:
        batch: of :class:`scripts.training.sampling.CaseDataset`.
        device: where it goes.
        non_blocking: as for ``Tensor.to``.
        augmentation: changes image and mask on the device; the batch holds the seeds of its cases.
        **kwargs: as for ``Tensor.to``.
    """

    def move(value: torch.Tensor) -> torch.Tensor:
        value = value.as_tensor() if hasattr(value, "as_tensor") else value
        return value.to(device=device, non_blocking=non_blocking, **kwargs)

    image = move(batch[keys.IMAGE]).float()
    targets = {key: move(batch[key]) for key in TARGET_KEYS if isinstance(batch.get(key), torch.Tensor)}
    if keys.SEG in targets:
        targets[keys.SEG] = targets[keys.SEG].float()
    if augmentation is not None:
        image, targets[keys.SEG] = augmentation(image, targets[keys.SEG], batch[keys.SEED].tolist())
    clinical = batch.get(keys.CLINICAL)
    return image, targets, (), {keys.CLINICAL: None if clinical is None else move(clinical)}


class NetworkInferer(Inferer):
    """Calls a :class:`scripts.model.networks.MultitaskNet`, in bfloat16 with ``amp``, and returns float32.

    bfloat16 has the range of float32, so no gradient scaling is needed.

    Raises:
        ValueError: ``amp`` is neither True nor False; a text such as "false" would be taken for True.
    """

    def __init__(self, amp: bool = False) -> None:
        super().__init__()
        if not isinstance(amp, bool):
            raise ValueError(f"amp is {amp!r}; it must be True or False (with a capital)")
        self.amp = amp

    def __call__(
        self, inputs: torch.Tensor, network: Any, clinical: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Output dictionary of ``network``; ``inputs`` (B, 2, *roi_size), ``clinical`` (B, F) or ``None``."""
        # With 3D convolutions, channels-last is about twice as fast on CPU and feeds tensor cores on a GPU.
        inputs = inputs.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            outputs = network(inputs, clinical)
        return {key: value.float() for key, value in outputs.items()}


class EnsembleInferer(NetworkInferer):
    """Calls :meth:`.predict`: every head, as probabilities and averaged over folds."""

    def __call__(
        self, inputs: torch.Tensor, network: Any, clinical: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Predictions of the ensemble ``network``; shapes as in :class:`NetworkInferer`."""
        return super().__call__(inputs, network.predict, clinical)


class PatientEvaluator(SupervisedEvaluator):
    """Evaluator for prediction that reports a patient who fails and continues with the next.

    Batches hold one patient. ``state.failures`` maps patient ids to reasons: of errors during preparation, which
    :class:`scripts.training.sampling.GuardedDataset` passes on as ``{patient_id, "error"}``, and of later ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.failures = {}

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> Any:
        patient = batchdata[keys.PATIENT_ID][0]
        try:
            if ERROR in batchdata:
                raise ValueError(batchdata[ERROR][0])
            return super()._iteration(engine, batchdata)  # type: ignore[arg-type]
        except Exception as error:
            engine.state.failures[patient] = reason(error)
            logger.error("%s: no prediction: %s", patient, engine.state.failures[patient])
            return {}
