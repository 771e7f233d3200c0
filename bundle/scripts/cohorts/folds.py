"""Folds of a cohort: cases dealt by event and centre, and the protocols that split them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts import keys
from scripts.cohorts.scans import CohortError, patient_key
from scripts.keys import Case

_ABLATION_HANDS = (0, 1, 0, 0, 1, 0, 0, 1, 0, 2)  # of ten cases 6 for training (0), 3 for validation, 1 for test


@dataclass(frozen=True)
class Split:
    """Cases of one fold; no patient is in two of the lists.

    Attributes:
        training: what the network learns from.
        validation: what chooses the best epoch.
        test: what neither has seen; empty where the protocol has no such part.
    """

    training: list[Case]
    validation: list[Case]
    test: list[Case] = field(default_factory=list)

    def part(self, name: str) -> list[Case]:
        """The cases of one part.

        Args:
            name: ``training``, ``validation``, ``test``, or ``all`` for those of all three, for a cohort that the
                network has not learnt from.

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


def deal_folds(cases: Sequence[Case], num_folds: int, seed: int) -> list[int]:
    """Fold of each case: sorted by event and centre, shuffled within each group, dealt round robin.

    Args:
        cases: the cases.
        num_folds: number of folds.
        seed: seed of the shuffle; the order in which cases are given does not matter.

    Returns:
        A fold for each case, in the order of ``cases``.

    Raises:
        CohortError: fewer than two folds, or fewer cases than folds.
    """
    if num_folds < 2:
        raise CohortError(f"num_folds is {num_folds}; at least 2 are needed")
    if len(cases) < num_folds:
        raise CohortError(f"{len(cases)} cases cannot be dealt over {num_folds} folds")
    return _deal(cases, range(num_folds), seed)


def _deal(cases: Sequence[Case], hands: Sequence[int], seed: int) -> list[int]:
    """What falls to each case when ``hands`` go round and round over the cases, sorted by stratum and shuffled."""
    by_id = sorted(range(len(cases)), key=lambda index: patient_key(cases[index][keys.PATIENT_ID]))
    shuffled = [by_id[index] for index in np.random.default_rng(seed).permutation(len(cases))]
    shuffled.sort(key=lambda index: _stratum(cases[index]))
    dealt = [0] * len(cases)
    for position, index in enumerate(shuffled):
        dealt[index] = hands[position % len(hands)]
    return dealt


def _stratum(case: Case) -> tuple[str, str]:
    state = "unknown" if not case[keys.SURV_KNOWN] else "event" if case[keys.EVENT] else "censored"
    return state, case[keys.CENTRE]


def _split_partial(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """All cases are dealt over the folds."""
    folds = deal_folds(cases, num_folds, seed)
    if not 0 <= fold < num_folds:
        raise CohortError(f"fold is {fold}; with num_folds = {num_folds} it must be from 0 to {num_folds - 1}")
    training = [case for case, dealt in zip(cases, folds, strict=True) if dealt != fold]
    return Split(training, [case for case, dealt in zip(cases, folds, strict=True) if dealt == fold])


def _split_full(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """Cases with mask and HPV status are dealt over the folds; the others are validated in every fold."""
    full = [case for case in cases if case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN]]
    if len(full) < num_folds:
        raise CohortError(
            f"protocol 'full' deals cases with mask and HPV status, of which there are {len(full)} among {len(cases)}, "
            f"over {num_folds} folds; use protocol 'partial'"
        )
    split = _split_partial(full, num_folds, fold, seed)
    others = [case for case in cases if not (case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN])]
    validation = sorted([*split.validation, *others], key=lambda case: patient_key(case[keys.PATIENT_ID]))
    return Split(split.training, validation)


def _split_ablation(cases: Sequence[Case], num_folds: int, fold: int, seed: int) -> Split:
    """One split into 60 % training, 30 % validation and 10 % test cases."""
    if fold != 0:
        raise CohortError(f"fold is {fold}; protocol 'ablation' is one split, which is fold 0")
    if len(cases) < len(_ABLATION_HANDS):
        raise CohortError(
            f"{len(cases)} cases cannot be split 60/30/10 (protocol 'ablation'): at least {len(_ABLATION_HANDS)} needed"
        )
    dealt = _deal(cases, _ABLATION_HANDS, seed)
    training, validation, test = (
        [case for case, hand in zip(cases, dealt, strict=True) if hand == part] for part in range(3)
    )
    return Split(training, validation, test)


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
    held_out = [case[keys.CENTRE] == centres[fold] for case in cases]
    training = [case for case, out in zip(cases, held_out, strict=True) if not out]
    return Split(training, [case for case, out in zip(cases, held_out, strict=True) if out])


PROTOCOLS: dict[str, Callable[[Sequence[Case], int, int, int], Split]] = {
    "partial": _split_partial,
    "full": _split_full,
    "ablation": _split_ablation,
    "leave_one_centre_out": _split_by_centre,
}
"""Ways to split a cohort: (cases, num_folds, fold, seed) -> split."""
