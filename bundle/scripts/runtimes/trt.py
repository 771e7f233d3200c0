"""TensorRT for the convolutions of an ensemble, through MONAI's ``trt_compile``.

Each fold's encoder, decoder and HPV branch becomes a TensorRT engine; what is left (summaries, survival branch, the
averages over folds) is small and stays in PyTorch, so all heads and every caller of the network are as before. Engines
are built when they are first used, minutes each, and kept on disk for the next run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from monai.networks import trt_compile

from scripts.model.ensemble import FoldEnsemble

__all__ = ["EXPORT", "TensorRTMissing", "compile_folds", "engine_parts"]

PACKAGES = ("tensorrt", "polygraphy", "onnx")
PARTS = ("encoder", "decoder", "hpv")
# How each part goes to TensorRT. MONAI would take torch's newer exporter, which takes minutes for this network.
EXPORT = {"dynamo": False, "opset_version": 18}


class TensorRTMissing(RuntimeError):  # noqa: N818 - it is named for what the user sees
    """There is nothing here that TensorRT could run with."""


def compile_folds(
    network: FoldEnsemble, folder: str | os.PathLike[str], precision: str, checkpoint: str | os.PathLike[str]
) -> None:
    """Let TensorRT run the convolutions of ``network``, once its weights are loaded.

    Args:
        network: on a GPU, in evaluation; changed in place.
        folder: for the engines; those of older weights are built anew.
        precision: "fp32", or "tf32", "bf16", "fp16" for more speed and other numbers.
        checkpoint: the file that the weights come from.

    Raises:
        TensorRTMissing: without a GPU or one of the packages; MONAI would go on without TensorRT.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing or not torch.cuda.is_available():
        why = f"{', '.join(missing)} not installed" if missing else "no CUDA device"
        raise TensorRTMissing(
            f"inference_trt.json cannot run here ({why}): it needs an NVIDIA GPU and `pip install tensorrt polygraphy "
            "onnx`; without that overlay, inference.json gives the same results"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "precision": precision,
        "timestamp": Path(checkpoint).stat().st_mtime,
        "export_args": dict(EXPORT),
    }
    trt_compile(network, str(Path(folder) / "engine"), args=arguments, submodule=engine_parts(network))


def engine_parts(network: FoldEnsemble) -> list[str]:
    """Names of the modules that become engines: those that the tasks have.

    Example:
        >>> from scripts.model.networks import MultitaskNet
        >>> engine_parts(FoldEnsemble(MultitaskNet(tasks=["seg", "surv"]), {}))
        ['folds.0.encoder', 'folds.0.decoder']
    """
    return [
        f"folds.{number}.{part}"
        for number, fold in enumerate(network.folds)
        for part in PARTS
        if getattr(fold, part) is not None
    ]
