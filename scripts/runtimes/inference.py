"""The bundle's ``inference.json`` for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from command_line import BUNDLE

from scripts.cohorts.files import in_config


def inference_config(checkpoint: Path, **changes: Any) -> ConfigParser:
    """The config with a checkpoint and other changes.

    Args:
        checkpoint: the weights.
        **changes: ids of the config and their values; texts are taken as they are, not as expressions.
    """
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.json"))
    parser.read_meta(str(BUNDLE / "configs" / "metadata.json"))
    values = {"bundle_root": str(BUNDLE), "checkpoint": str(checkpoint.resolve()), **changes}
    parser.update({name: in_config(value) if isinstance(value, str) else value for name, value in values.items()})
    return parser
