"""Checks of names that a config, a command line or a checkpoint gives: tasks, inputs, classes, clinical values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.keys import TASK_SEG, TASKS
from scripts.model.errors import SpecError

SURVIVAL_INPUTS = ("deep", "burden")
HPV_INPUTS = ("image", "clinical")
SHOWN = 100  # characters of a wrong value in a message


def checked_names(name: str, given: Any, known: Sequence[str]) -> tuple[str, ...]:
    """Some of the known names, each once, in the given order; none is allowed.

    Args:
        name: of the setting, for the message.
        given: a list, or text such as ``"seg,surv"``.
        known: the names that are accepted.

    Raises:
        SpecError: anything else.

    Example:
        >>> checked_names("tasks", "surv, seg", ("seg", "surv"))
        ('surv', 'seg')
    """
    chosen = [item.strip() for item in given.split(",") if item.strip()] if isinstance(given, str) else given
    listed = isinstance(chosen, list | tuple) and all(isinstance(item, str) for item in chosen)
    if not listed or not set(chosen) <= set(known) or len(set(chosen)) != len(chosen):
        raise SpecError(f"{name} are some of {list(known)}, each once; got {shown(given)}")
    return tuple(chosen)


def in_order(name: str, given: Any, known: Sequence[str]) -> tuple[str, ...]:
    """At least one of the known names, each once, in their fixed order; arguments and errors as :func:`checked_names`.

    Example:
        >>> in_order("tasks", ["surv", "seg"], ("seg", "hpv", "surv"))
        ('seg', 'surv')
    """
    chosen = checked_names(name, given, known)
    if not chosen:
        raise SpecError(f"{name} are some of {list(known)}, at least one; got {shown(given)}")
    return tuple(item for item in known if item in chosen)


def checked_tasks(tasks: Any) -> tuple[str, ...]:
    """The tasks in their fixed order.

    Raises:
        SpecError: no, unknown or repeated tasks.
    """
    return in_order("tasks", tasks, TASKS)


def checked_inputs(survival_inputs: Any, tasks: Sequence[str]) -> tuple[str, ...]:
    """The input of the log hazard.

    Raises:
        SpecError: not exactly one known input, or "burden" without the segmentation.

    Example:
        >>> checked_inputs(["burden"], ("seg", "surv"))
        ('burden',)
    """
    chosen = in_order("survival_inputs", survival_inputs, SURVIVAL_INPUTS)
    if len(chosen) != 1:
        raise SpecError(f"survival_inputs is {list(chosen)}; it must be ['deep'] or ['burden'], not both")
    if "burden" in chosen and TASK_SEG not in tasks:
        raise SpecError(
            f"survival_inputs is {list(chosen)} and tasks is {list(tasks)}: without the task 'seg' there is no tumour "
            "whose volume and uptake could be measured; set survival_inputs to ['deep']"
        )
    return chosen


def checked_hpv_inputs(hpv_inputs: Any) -> tuple[str, ...]:
    """The inputs of the HPV logit, in their fixed order.

    Raises:
        SpecError: unknown or repeated inputs, or no image.

    Example:
        >>> checked_hpv_inputs(["clinical", "image"])
        ('image', 'clinical')
    """
    chosen = in_order("hpv_inputs", hpv_inputs, HPV_INPUTS)
    if "image" not in chosen:
        raise SpecError(f"hpv_inputs is {list(chosen)}; it must be ['image'] or ['image', 'clinical']")
    return chosen


def shown(value: Any) -> str:
    """A wrong value for a message: on one line, printable and short."""
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
