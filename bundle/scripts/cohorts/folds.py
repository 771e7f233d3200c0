"""Splits of a cohort into training, validation and test cases, stratified by event and centre."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts import keys
from scripts.cohorts.scans import CohortError, patient_key
from scripts.keys import Case

# of ten cases 6 for training (0), 3 for validation (1), 1 for test (2)
_ABLATION_PARTS = (0, 1, 0, 0, 1, 0, 0, 1, 0, 2)


@dataclass(frozen=True)
class Split:
    """Cases of one fold; no patient is in two of the lists."""

    training: list[Case]  # for the weights
    validation: list[Case]  # to choose the best epoch
    test: list[Case] = field(default_factory=list)  # for neither; empty where the protocol has no such part

    def part(self, name: str) -> list[Case]:
        """The cases of ``training``, ``validation`` or ``test``, or ``all`` of a cohort that was not used for training.

        Raises:
            CohortError: there is no such part, or it is empty.
        """
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        everyone = {case[keys.PATIENT_ID]: case for cases in parts.values() for case in cases}
        parts["all"] = [everyone[patient] for patient in sorted(everyone)]
        if name not in parts:
            raise CohortError(f"evaluate_on is '{name}'; the parts of a split are {', '.join(parts)}")
        if not parts[name]:
            raise CohortError(f"this split has no {name} cases; evaluate on another part of it")
        return parts[name]


def _assign(cases: Sequence[Case], parts: Sequence[int], seed: int) -> list[int]:
    """A part for each case: ``parts`` in turn over the cases, sorted by stratum and shuffled within each.

    The order in which cases are given does not matter.
    """
    by_id = sorted(range(len(cases)), key=lambda index: patient_key(cases[index][keys.PATIENT_ID]))
    shuffled = [by_id[index] for index in np.random.default_rng(seed).permutation(len(cases))]
    shuffled.sort(key=lambda index: _stratum(cases[index]))
    assigned = [0] * len(cases)
    for position, index in enumerate(shuffled):
        assigned[index] = parts[position % len(parts)]
    return assigned


def _stratum(case: Case) -> tuple[str, str]:
    state = "unknown" if not case[keys.SURV_KNOWN] else "event" if case[keys.EVENT] else "censored"
    return state, case[keys.CENTRE]


def _in_part(cases: Sequence[Case], assigned: Sequence[int], *parts: int) -> list[Case]:
    return [case for case, part in zip(cases, assigned, strict=True) if part in parts]


def _held_out(cases: Sequence[Case], assigned: Sequence[int], num_folds: int, fold: int) -> Split:
    """The split that validates on the cases assigned to ``fold``."""
    others = [part for part in range(num_folds) if part != fold]
    return Split(_in_part(cases, assigned, *others), _in_part(cases, assigned, fold))


def _split_partial(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """All cases are divided into folds."""
    if num_folds < 2:
        raise CohortError(f"num_folds is {num_folds}; at least 2 are needed")
    if len(cases) < num_folds:
        raise CohortError(f"{len(cases)} cases cannot be divided into {num_folds} folds")
    if not 0 <= fold < num_folds:
        raise CohortError(f"fold is {fold}; with num_folds = {num_folds} it must be from 0 to {num_folds - 1}")
    return _held_out(cases, _assign(cases, range(num_folds), seed), num_folds, fold)


def _split_full(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Cases with mask and HPV status are divided into folds; the others are validated in every fold."""
    full = [case for case in cases if case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN]]
    if len(full) < num_folds:
        raise CohortError(
            f"protocol 'full' needs cases with mask and HPV status, of which there are {len(full)} among {len(cases)}, "
            f"for {num_folds} folds; use protocol 'partial'"
        )
    split = _split_partial(full, num_folds, fold, seed)
    others = [case for case in cases if not (case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN])]
    validation = sorted([*split.validation, *others], key=lambda case: patient_key(case[keys.PATIENT_ID]))
    return Split(split.training, validation)


def _split_ablation(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """One split into 60 % training, 30 % validation and 10 % test cases."""
    if fold != 0:
        raise CohortError(f"fold is {fold}; protocol 'ablation' is one split, which is fold 0")
    if len(cases) < len(_ABLATION_PARTS):
        raise CohortError(
            f"{len(cases)} cases cannot be split 60/30/10 (protocol 'ablation'): at least {len(_ABLATION_PARTS)} needed"
        )
    assigned = _assign(cases, _ABLATION_PARTS, seed)
    return Split(*(_in_part(cases, assigned, part) for part in range(3)))


def _split_by_centre(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Fold k validates on the cases of the k-th centre."""
    centres = sorted({case[keys.CENTRE] for case in cases})
    listed = ", ".join(centres)
    if len(centres) < 2:
        raise CohortError(f"protocol 'leave_one_centre_out' needs two centres; every case is of {listed}")
    if num_folds != len(centres):
        raise CohortError(
            f"num_folds is {num_folds}; protocol 'leave_one_centre_out' has a fold for each of the "
            f"{len(centres)} centres ({listed}): set it to {len(centres)}"
        )
    if not 0 <= fold < num_folds:
        raise CohortError(f"fold is {fold}; it must be from 0 to {num_folds - 1}, one of the centres {listed}")
    return _held_out(cases, [centres.index(case[keys.CENTRE]) for case in cases], num_folds, fold)


PROTOCOLS: dict[str, Callable[[Sequence[Case], int, int, int], Split]] = {
    "partial": _split_partial,
    "full": _split_full,
    "ablation": _split_ablation,
    "leave_one_centre_out": _split_by_centre,
}
"""Ways to split a cohort: (cases, num_folds, fold, seed) -> split."""
