"""Errors about a model and its file, apart from torch: whoever only reports them need not wait for its import."""

from __future__ import annotations


class SpecError(ValueError):
    """An invalid setting of a model or entry of a checkpoint; the message says what is accepted."""


class CheckpointError(ValueError):
    """A file or state dict without weights of a :class:`scripts.model.ensemble.FoldEnsemble`."""


class SettingsMismatch(ValueError):  # noqa: N818 - it is named for what the user sees
    """Weights whose settings differ from the configuration in use."""
