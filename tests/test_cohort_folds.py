"""Folds of a cohort: balanced, the same for any order of cases, and refused where they cannot be."""

from __future__ import annotations

import itertools

import pytest

from scripts import keys
from scripts.cohorts import cohort
from scripts.cohorts.cohort import CohortError


def ids(cases) -> list[str]:
    return [case[keys.PATIENT_ID] for case in cases]


def make_cohort(count: int = 60, full_every: int = 3) -> cohort.Cohort:
    """Cases with a mix of events, centres and missing labels; every ``full_every``-th lacks mask or HPV status."""
    cases = []
    for number in range(count):
        known = number % 10 != 9
        cases.append(
            {
                keys.PATIENT_ID: f"P-{number:03d}",
                keys.CENTRE: ("CHUM", "MDA", "MDA", "USZ")[number % 4],
                keys.SURV_KNOWN: known,
                keys.EVENT: known and number % 5 == 0,
                keys.SEG_KNOWN: number % full_every != 0,
                keys.HPV_KNOWN: number % full_every != 1 or number % 2 == 0,
            }
        )
    return cohort.Cohort("made up", cases)


@pytest.mark.parametrize("num_folds", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_partial_folds_validate_every_case_once_and_are_balanced(num_folds, seed):
    made = make_cohort()
    splits = [made.split("partial", num_folds, fold, seed) for fold in range(num_folds)]
    assert sorted(itertools.chain(*(ids(split.validation) for split in splits))) == ids(made.cases)
    for split in splits:
        assert sorted(ids(split.training) + ids(split.validation)) == ids(made.cases)
    for count in (
        len,
        lambda cases: sum(case[keys.EVENT] for case in cases),
        lambda cases: sum(not case[keys.SURV_KNOWN] for case in cases),
    ):
        counts = [count(split.validation) for split in splits]
        assert max(counts) - min(counts) <= 1
    for centre in ("CHUM", "MDA", "USZ"):
        counts = [sum(case[keys.CENTRE] == centre for case in split.validation) for split in splits]
        assert max(counts) - min(counts) <= 3, "at most one for each of event, censored and unknown"


def test_full_folds_train_on_full_labels_and_validate_the_rest_in_every_fold():
    made = make_cohort()
    full = {case[keys.PATIENT_ID] for case in made.cases if case[keys.SEG_KNOWN] and case[keys.HPV_KNOWN]}
    others = set(ids(made.cases)) - full
    splits = [made.split("full", 5, fold, 0) for fold in range(5)]
    assert others
    for split in splits:
        assert set(ids(split.training)) <= full
        assert others <= set(ids(split.validation))
        assert not set(ids(split.training)) & set(ids(split.validation))
        assert ids(split.validation) == sorted(ids(split.validation))
        assert set(ids(split.training)) | set(ids(split.validation)) == set(ids(made.cases))
    folded = [patient for split in splits for patient in ids(split.validation) if patient in full]
    assert sorted(folded) == sorted(full)


def test_folds_depend_on_the_seed_but_not_on_the_order_of_cases():
    made = make_cohort()
    turned = cohort.Cohort("made up", made.cases[::-1])
    first = set(ids(made.split("partial", 3, 0, 7).validation))
    assert first == set(ids(made.split("partial", 3, 0, 7).validation))
    assert first == set(ids(turned.split("partial", 3, 0, 7).validation))
    assert first != set(ids(made.split("partial", 3, 0, 8).validation))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [10, 57, 60, 301])
def test_the_ablation_split_is_60_30_10_in_cases_and_in_events(count, seed):
    made = make_cohort(count)
    split = made.split("ablation", 3, 0, seed)
    parts = (split.training, split.validation, split.test)
    assert sorted(itertools.chain(*map(ids, parts))) == ids(made.cases)
    assert all(ids(part) == sorted(ids(part)) and part for part in parts)
    for share, part in zip((0.6, 0.3, 0.1), parts, strict=True):
        assert abs(len(part) - share * count) <= 1
        events = sum(case[keys.EVENT] for case in made.cases)
        assert abs(sum(case[keys.EVENT] for case in part) - share * events) <= 1
    assert [split.part(name) for name in ("training", "validation", "test")] == list(parts)
    assert ids(split.test) == ids(cohort.Cohort("made up", made.cases[::-1]).split("ablation", 1, 0, seed).test[::-1])


def test_each_centre_is_left_out_once():
    made = make_cohort()
    assert made.centres == ["CHUM", "MDA", "USZ"]
    for fold, centre in enumerate(made.centres):
        split = made.split("leave_one_centre_out", 3, fold, seed=fold)
        assert {case[keys.CENTRE] for case in split.validation} == {centre}
        assert centre not in {case[keys.CENTRE] for case in split.training}
        assert sorted(ids(split.training) + ids(split.validation)) == ids(made.cases)
        assert split.test == []


def test_leaving_out_the_only_centre_is_refused():
    made = cohort.Cohort("made up", [case for case in make_cohort().cases if case[keys.CENTRE] == "MDA"])
    with pytest.raises(CohortError, match="needs two centres; every case is of MDA"):
        made.split("leave_one_centre_out", 1, 0)


@pytest.mark.parametrize(
    ("protocol", "part", "message"),
    [
        pytest.param("partial", "test", "has no test cases", id="none"),
        pytest.param("ablation", "valid", "evaluate_on is 'valid'; the parts of a split are", id="name"),
    ],
)
def test_parts_that_a_split_does_not_have(protocol, part, message):
    with pytest.raises(CohortError, match=message):
        make_cohort().split(protocol, 3, 0).part(part)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param(lambda case: case.update({keys.EVENT: not case[keys.EVENT]}), False, id="event"),
        pytest.param(lambda case: case.update({keys.PATIENT_ID: "P-999"}), False, id="patient"),
        pytest.param(lambda case: case.update({keys.CT: "elsewhere"}), True, id="place"),
        pytest.param(lambda case: None, True, id="nothing"),
    ],
)
def test_the_fingerprint_tells_other_patients_and_labels_but_not_other_places(change, same):
    made, changed = make_cohort(), make_cohort()
    change(changed.cases[3])
    assert (made.fingerprint == changed.fingerprint) == same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("half", 3, 0), "unknown protocol 'half'; known are partial, full", id="protocol"),
        pytest.param(("partial", 1, 0), "num_folds is 1; at least 2", id="one_fold"),
        pytest.param(("partial", 3, 3), "fold is 3; with num_folds = 3 it must be from 0 to 2", id="fold_too_high"),
        pytest.param(("full", 3, -1), "fold is -1; with num_folds = 3", id="fold_negative"),
        pytest.param(("partial", 5, 0), "4 cases cannot be divided into 5 folds", id="too_few_cases"),
        pytest.param(("ablation", 3, 1), "fold is 1; protocol 'ablation' is one split, which is fold 0", id="ablation"),
        pytest.param(("ablation", 1, 0), "4 cases cannot be split 60/30/10.*at least 10 needed", id="small_ablation"),
        pytest.param(
            ("leave_one_centre_out", 5, 0),
            r"num_folds is 5; .* each of the 3 centres \(CHUM, MDA, USZ\): set it to 3",
            id="folds_of_centres",
        ),
        pytest.param(("leave_one_centre_out", 3, 3), "fold is 3; it must be from 0 to 2", id="no_such_centre"),
        pytest.param(("full", 3, 0), "of which there are 1 among 4.*use protocol 'partial'", id="too_few_full"),
    ],
)
def test_impossible_splits(arguments, message):
    with pytest.raises(CohortError, match=message):
        make_cohort(40 if "fold is" in message else 4).split(*arguments, seed=0)
