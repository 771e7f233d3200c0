"""Clinical values: column names, accepted cell values, and their coding for the network.

The table :data:`FEATURES` defines all of them. There are two codings: that of the paper (:func:`code_clinical`, for the
network) and indicators (:func:`code_indicators`, for linear models such as the clinical-only Cox comparator).
"""

from __future__ import annotations

import difflib
import logging
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.cohorts.scans import printable

logger = logging.getLogger(__name__)

NUMBER, ORDINAL, CATEGORY = "number", "ordinal", "category"

DEFAULT_FEATURES = ("age", "gender", "tobacco", "alcohol", "treatment", "performance_status", "m_stage")
"""The clinical vector z3 of the paper, in its order."""

_MISSING = frozenset(
    ("", "nan", "na", "n/a", "#n/a", "n.a.", "none", "null", "unknown", "unk", "missing", "notavailable", "?", ".")
)
_NEAR = 0.75  # of difflib's ratio: a name is taken for a misspelling
_TIME_UNIT = r"(?<![a-z])(?:d|days?|w|wks?|weeks?|m|mos?|mths?|months?|y|yrs?|years?)(?![a-z])"
_NO = ("no", "false", "n")
_YES = ("yes", "true", "y")


class ClinicalValueError(ValueError):
    """A clinical value that cannot be read; the message says where it is and what is accepted."""


@dataclass(frozen=True)
class Feature:
    """One clinical value: its column names, accepted spellings and coding."""

    name: str  # name used in configs and as key of a case's clinical values
    column: str  # column name in HECKTOR 2025
    kind: str  # "number" (a measurement), "ordinal" (levels with an order) or "category"
    aliases: tuple[str, ...] = ()  # further column names; upper case, spaces and punctuation do not matter
    # level -> accepted words, besides the level's own number; empty for numbers
    levels: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    prefix: str = ""  # regular expression of an optional prefix (ECOG in ECOG 2)
    stage: str = ""  # letter of a stage (T in T2) in AJCC notation, see _stage_level
    unknown: tuple[str, ...] = ()  # words that mean missing, in addition to the common ones
    low: float = -math.inf  # smallest accepted number
    high: float = math.inf  # largest accepted number
    unit: str = ""  # unit of a number
    usual: tuple[float, float] = (0.0, 1.0)  # typical value and standard deviation, for scaling
    doubts: tuple[tuple[Callable[[float], bool], str], ...] = ()  # see doubt_about

    @property
    def accepted(self) -> str:
        """The accepted cell values, in words."""
        if self.kind == NUMBER:
            limits = f" from {self.low:g} to {self.high:g}" if math.isfinite(self.low + self.high) else ""
            return f"a number{limits}{' in ' + self.unit if self.unit else ''}, or empty"
        levels = ", ".join(
            f"{level} ({'/'.join(words)})" if words else f"{level}" for level, words in self.levels.items()
        )
        return f"{levels}, or empty{''.join(f'/{word}' for word in self.unknown)}"


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(
            "age",
            "Age",
            NUMBER,
            ("Age at diagnosis",),
            low=0,
            high=120,
            unit="years",
            usual=(60, 10),
            doubts=((lambda years: years == 0, "0 years"),),  # an artefact of de-identification
        ),
        Feature("gender", "Gender", CATEGORY, ("Sex",), {0: ("female", "f"), 1: ("male", "m")}),
        Feature("tobacco", "Tobacco Consumption", CATEGORY, ("Tobacco", "Smoking"), {0: _NO, 1: _YES}),
        Feature("alcohol", "Alcohol Consumption", CATEGORY, ("Alcohol",), {0: _NO, 1: _YES}),
        # HECKTOR 2022 has the column Chemotherapy (0/1): equivalent, since every patient had radiotherapy.
        Feature(
            "treatment",
            "Treatment",
            CATEGORY,
            ("Chemotherapy",),
            {
                0: ("radiotherapy", "rt", *_NO),
                1: ("chemoradiotherapy", "chemoradiation", "radiochemotherapy", "crt", *_YES),
            },
        ),
        Feature(
            "performance_status",
            "Performance Status",
            ORDINAL,
            ("ECOG", "ECOG PS", "ECOG Performance Status", "WHO Performance Status"),
            {level: () for level in range(5)},
            prefix="ecog(-pt)?|who|ps",  # -pt: patient-reported
        ),
        Feature(
            "m_stage",
            "M-stage",
            CATEGORY,
            ("M", "M category"),
            {0: ("M0",), 1: ("M1",)},
            stage="m",
            unknown=("Mx", "x"),
        ),
        Feature(
            "t_stage",
            "T-stage",
            ORDINAL,
            ("T", "T category"),
            {0: ("T0", "Tis"), 1: ("T1", "T1a", "T1b"), 2: ("T2", "T2a", "T2b"), 3: ("T3",), 4: ("T4", "T4a", "T4b")},
            stage="t",
            unknown=("Tx", "x"),
        ),
        Feature(
            "n_stage",
            "N-stage",
            ORDINAL,
            ("N", "N category"),
            {0: ("N0",), 1: ("N1",), 2: ("N2", "N2a", "N2b", "N2c"), 3: ("N3", "N3a", "N3b")},
            stage="n",
            unknown=("Nx", "x"),
        ),
        Feature(
            "hpv",
            "HPV Status",
            CATEGORY,
            ("HPV",),
            # the last of each: tested, with the result
            {0: ("negative", "neg", "-", *_NO, "yes, negative"), 1: ("positive", "pos", "+", *_YES, "yes, positive")},
        ),
        Feature(
            "site",
            "Primary Site",
            CATEGORY,
            ("Site", "Tumour Site", "Tumor Site", "Disease Site"),
            {
                0: ("oropharynx",),
                1: ("larynx",),
                2: ("nasopharynx",),
                3: ("hypopharynx",),
                4: ("oral cavity", "lip and oral cavity", "lip & oral cavity"),
                5: ("other",),
            },
        ),
    )
}
"""Clinical features by name; the order of a clinical vector is the caller's list, not this table's."""

LONGEST_FOLLOW_UP_DAYS = 50 * 365.25
"""Longer follow-up is implausible after a head and neck cancer."""

LABELS: dict[str, Feature] = {
    "hpv": FEATURES["hpv"],
    "relapse": Feature("relapse", "Relapse", CATEGORY, ("Recurrence",), {0: _NO, 1: _YES}),
    "rfs": Feature(
        "rfs",
        "RFS",
        NUMBER,
        ("RFS days", "Recurrence-free survival", "Relapse-free survival"),
        unit="days",
        doubts=(
            (lambda days: days > LONGEST_FOLLOW_UP_DAYS, "more than 50 years"),
            (lambda days: days >= 9999 and set(f"{days:g}") == {"9"}, "all nines, a code for a missing value"),
        ),
    ),
}
"""Labels, read from the same tables by the same rules."""


def feature_named(name: str) -> Feature:
    """The feature or label called ``name``.

    Raises:
        ValueError: no feature has this name.
    """
    feature = FEATURES.get(name) or LABELS.get(name)
    if feature is None:
        raise ValueError(f"unknown clinical feature '{name}'; known are {', '.join(FEATURES)}")
    return feature


def parse_value(feature: str, raw: object, *, where: str = "") -> float | None:
    """Read one clinical value as it may be written in a CSV, a JSON file or a request.

    Args:
        feature: name of the feature (a key of :data:`FEATURES` or :data:`LABELS`).
        raw: text, number, bool or None: ``1``, ``1.0``, ``"1"``, ``"M1"``, ``"male"``; spaces and case do not matter,
            a decimal comma is accepted.
        where: file, row and column of the value, for the message.

    Returns:
        The value (the level of a category, the number itself otherwise), or None where it is missing.

    Raises:
        ClinicalValueError: the value is not accepted.

    Example:
        >>> {parse_value("m_stage", raw) for raw in (1, 1.0, "1", " 1.0", "M1", "m1", "cM1")}
        {1.0}
        >>> parse_value("m_stage", "Mx") is None
        True
    """
    known = feature_named(feature)
    number = None if known.kind == NUMBER and isinstance(raw, bool | np.bool_) else _plain_number(raw)
    text = "" if raw is None else _plain(str(raw))
    if number is None and (text in _MISSING or text in map(_plain, known.unknown)):
        return None
    if number is not None and math.isnan(number):
        return None
    if number is None:
        number = _level_named(known, text)
    if known.stage and number is not None and math.isnan(number):
        return None
    valid = number is not None and math.isfinite(number)
    if valid and known.levels:
        valid = number in known.levels
    elif valid:
        valid = known.low <= (number or 0.0) <= known.high
    if not valid:
        place = f"{where}: " if where else ""
        shown = printable(str(raw), 60)
        raise ClinicalValueError(f"{place}'{shown}' is no value of {known.name}; accepted: {known.accepted}")
    return number


def doubt_about(feature: str, value: float | None) -> str:
    """Why a readable value is implausible (a code for a missing value, or impossible), "" otherwise.

    Example:
        >>> doubt_about("rfs", 99999.0), doubt_about("rfs", 9999.0), doubt_about("rfs", 999.0), doubt_about("age", 0.0)
        ('more than 50 years', 'all nines, a code for a missing value', '', '0 years')
    """
    doubts = feature_named(feature).doubts
    return "" if value is None else next((why for is_doubtful, why in doubts if is_doubtful(value)), "")


def parse_clinical(
    values: Mapping[str, object], features: Sequence[str] = DEFAULT_FEATURES, *, where: str = ""
) -> dict[str, float | None]:
    """Read the clinical values of one patient from a mapping, such as ``ehr.json`` or a request.

    Args:
        values: raw values by feature name or by any column name that a CSV may have; other keys are ignored.
        features: names of the features wanted.
        where: where the mapping comes from, for messages.

    Returns:
        Feature name -> value or None, in the order of ``features``.

    Raises:
        ClinicalValueError: a value cannot be read, or two keys contradict each other.

    Example:
        >>> parse_clinical({"Age": "61", "M-stage": "M0", "Weight": 70}, ("age", "m_stage", "alcohol"))
        {'age': 61.0, 'm_stage': 0.0, 'alcohol': None}
    """
    names = list(values)
    found: dict[str, float | None] = {}
    for feature in features:
        found[feature] = None
        for index in match_columns(names, feature):
            place = f"{where}, {names[index]}" if where else names[index]
            value = parse_value(feature, values[names[index]], where=place)
            if doubt := doubt_about(feature, value):
                logger.warning("%s: %g is %s: read as missing", place, value, doubt)
                value = None
            if value is not None and found[feature] not in (None, value):
                raise ClinicalValueError(
                    f"{place}: {value:g} contradicts another value of {feature}, {found[feature]:g}"
                )
            found[feature] = found[feature] if value is None else value
    return found


def match_columns(header: Sequence[str], feature: str) -> list[int]:
    """Positions of the columns that hold a feature, in order.

    A remark in brackets, as in ``HPV status (0=-, 1=+)``, is allowed and checked: another coding or unit than the one
    used here is an error, since the values would be misread.

    Raises:
        ClinicalValueError: the remark of a matching column contradicts the feature's coding or unit.
    """
    known = feature_named(feature)
    names = {_squeeze(name) for name in (known.name, known.column, *known.aliases)}
    matches = []
    for index, title in enumerate(header):
        if _squeeze(title) in names:
            matches.append(index)
        elif _squeeze(re.sub(r"[(\[].*", "", title)) in names:
            _check_remark(known, title)
            matches.append(index)
    return matches


def counts_from_one(feature: str, cells: Iterable[str]) -> bool:
    """Whether a column codes a category of two levels by 1 and 2 instead of 0 and 1.

    Example:
        >>> counts_from_one("gender", ["1", "2", ""]), counts_from_one("gender", ["0", "1", "2"])
        (True, False)
    """
    codes = {_plain_number(cell) for cell in cells}
    return set(feature_named(feature).levels) == {0, 1} and {1.0, 2.0} <= codes and 0.0 not in codes


def has_dots_of_thousands(feature: str, cells: Iterable[str]) -> bool:
    """Whether a column of whole numbers has dots between thousands, so that 1.089 would be read as about 1.

    It is suspected where every fraction has three digits behind 1 to 3 others and every whole number is below 1000, in
    a column whose values may be large.

    Example:
        >>> has_dots_of_thousands("rfs", ["1.089", "887", ""]), has_dots_of_thousands("rfs", ["1.089", "88.7"])
        (True, False)
        >>> has_dots_of_thousands("rfs", ["887.000", "1.500"]), has_dots_of_thousands("rfs", ["1.089", "1500"])
        (False, False)
    """
    written = [cell for cell in map(_plain, cells) if _plain_number(cell) is not None]
    dotted = [cell for cell in written if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", cell)]
    whole = [cell for cell in written if re.fullmatch(r"\d{1,3}", cell)]
    known = feature_named(feature)
    may_be_large = known.kind == NUMBER and math.isinf(known.high)
    return may_be_large and bool(dotted and whole) and len(dotted) + len(whole) == len(written)


def unknown_names(names: Iterable[str]) -> dict[str, str]:
    """Names of no clinical value or label, each with the most similar known name, "" where none is similar.

    Example:
        >>> unknown_names(["M-stage", "AgeAtDx", "Tobaco", "Weight"])
        {'AgeAtDx': 'Age', 'Tobaco': 'Tobacco', 'Weight': ''}
    """
    every = (*FEATURES.values(), *LABELS.values())
    known = {_squeeze(name): name for feature in every for name in (feature.name, *feature.aliases, feature.column)}
    found = {}
    for name in names:
        bare = _squeeze(re.sub(r"[(\[].*", "", name, flags=re.DOTALL))
        if bare in known or _squeeze(name) in known:
            continue
        begins = [each for each in known if len(each) > 2 and bare.startswith(each)]
        near = begins or difflib.get_close_matches(bare[:60], known, 1, _NEAR)
        found[name] = known[max(near, key=len)] if near else ""
    return found


def code_clinical(values: Mapping[str, object] | None, features: Sequence[str] = DEFAULT_FEATURES) -> np.ndarray:
    """(F,) float32, the paper's coding of one patient: numbers as they are, levels shifted by one, missing = 0.

    Args:
        values: raw or parsed values by feature name; a feature that is absent, None or NaN is missing.
            None: every value is missing.
        features: names of the features, in the order of the network's clinical vector.

    Raises:
        ClinicalValueError: a value cannot be read.

    Example:
        >>> code_clinical({"age": 61, "gender": 0, "m_stage": "M1"}, ("age", "gender", "alcohol", "m_stage")).tolist()
        [61.0, 1.0, 0.0, 2.0]
    """
    coded = np.zeros(len(features), dtype=np.float32)
    for index, name in enumerate(features):
        value = parse_value(name, (values or {}).get(name), where=f"clinical value '{name}'")
        if value is not None:
            coded[index] = value + (1.0 if feature_named(name).levels else 0.0)
    return coded


def clinical_scales(features: Sequence[str]) -> list[tuple[float, float, float]]:
    """How a linear unit scales the values of :func:`code_clinical`: (known from, centre, scale) each.

    Levels, coded 1, 2, ..., are counted from the lowest one. Numbers are centred on a typical value and divided by a
    typical standard deviation. They are known from four standard deviations below the centre; between that and 0
    (missing) they are partly known, so that the scaling is continuous.

    Raises:
        ValueError: an unknown feature.

    Example:
        >>> clinical_scales(("age", "m_stage"))
        [(20.0, 60.0, 10.0), (1.0, 1.0, 1.0)]
    """
    scales = []
    for known in map(feature_named, features):
        usual, spread = map(float, known.usual)
        scales.append((1.0, 1.0, 1.0) if known.levels else (usual - 4 * spread, usual, spread))
    return scales


def indicator_names(features: Sequence[str]) -> list[str]:
    """Column names of :func:`code_indicators`, in its order."""
    names: list[str] = []
    for name in features:
        known = feature_named(name)
        names += [f"{name}={level}" for level in known.levels] if known.kind == CATEGORY else [name]
    return names


def code_indicators(
    values: Mapping[str, object] | None, features: Sequence[str], missing_number: float = 0.0
) -> np.ndarray:
    """Coding for linear models: one 0/1 column for each level of a category; numbers and stages remain numbers.

    A missing category is zero in all its columns, so that no level is assumed: HPV becomes
    "known negative" and "known positive".

    Args:
        values: raw or parsed values by feature name, as for :func:`code_clinical`.
        features: names of the features.
        missing_number: value for a missing number or stage; NaN for imputation by the caller.

    Returns:
        float32 of shape (columns,), see :func:`indicator_names`.

    Raises:
        ClinicalValueError: a value cannot be read.

    Example:
        >>> code_indicators({"t_stage": "T4a", "hpv": 1}, ("age", "t_stage", "hpv")).tolist()
        [0.0, 4.0, 0.0, 1.0]
    """
    coded: list[float] = []
    for name in features:
        known = feature_named(name)
        value = parse_value(name, (values or {}).get(name), where=f"clinical value '{name}'")
        if known.kind == CATEGORY:
            coded += [float(value == level) for level in known.levels]
        else:
            coded.append(missing_number if value is None else value)
    return np.asarray(coded, dtype=np.float32)


_STAGES_WITHOUT_NUMBER = {"x": math.nan, "is": 0.0}
_STAGE_WORD = r"(?:mi|m|s|sn|f|u|l|i[+-]|mol[+-]|ene(?:[+-]|mi|ma|n)|nos|dcis)"
_STAGE_REMARK = rf"{_STAGE_WORD}|[(\[](?:{_STAGE_WORD}|\d{{1,2}})(?:,(?:{_STAGE_WORD}|\d{{1,2}}))*[)\]]"


def _plain(text: str) -> str:
    """Lower case without spaces and quotes."""
    return re.sub(r"[\s'\"]+", "", text).lower()


def _squeeze(text: str) -> str:
    """Lower-case letters and digits only."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def _plain_number(raw: object) -> float | None:
    """``raw`` as a number, or None; bool is 0/1, a comma is the decimal point.

    ``1,234`` is refused as ambiguous.
    """
    if isinstance(raw, numbers.Real | np.bool_):
        try:
            return float(raw)
        except OverflowError:  # an integer of more than 308 digits
            return math.inf
    text = _plain(str(raw))
    if re.search(r",\d{3}$", text):
        return None
    text = text.replace(",", ".")
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text) else None


def _level_named(feature: Feature, text: str) -> float | None:
    """The level that a word such as ``male`` or ``cT4a`` means, NaN for a stage X, or None."""
    if feature.stage:
        return _stage_level(feature.stage, text)
    for level, words in feature.levels.items():
        if text in map(_plain, words) or re.sub(r"[-_]", "", text) in map(_plain, words):
            return float(level)
    if feature.prefix:
        return _plain_number(re.sub(rf"^({feature.prefix})", "", text))
    return None


def _stage_level(letter: str, text: str) -> float | None:
    """The level of a T, N or M category as AJCC writes it, NaN for X, None for what is none.

    Before the letter: when and how it was staged (``c`` clinically, ``p`` by pathology, ``y`` after treatment, ``r`` at
    recurrence, ``a`` at autopsy, ``u`` by ultrasound). Behind the number: a subcategory (``a`` to ``d``), and what does
    not change the category: ``mi``, ``(m)``, ``(2)`` or ``(s)`` (number of tumours), ``(sn)``, ``(f)`` (how nodes were
    sampled), ``(i+)``, ``(mol-)`` (isolated tumour cells), ``ENE+`` (extranodal extension), ``(U)``, ``(L)`` (level in
    the neck), ``NOS``. Without the letter, the number stands alone.

    Source:
        AJCC Cancer Staging Manual, 8th edition, 2017, chapter 1.
    """
    match = re.fullmatch(
        rf"(?:[acpruy]{{0,3}}{letter}[-_]?)?(is|x|\d)(?:\.0*)?(?:[a-d]\d?)?((?:{_STAGE_REMARK})*)", text
    )
    if match is None or (match[1] == "is" and letter != "t"):
        return None
    return _STAGES_WITHOUT_NUMBER[match[1]] if match[1] in _STAGES_WITHOUT_NUMBER else float(match[1])


def _check_remark(feature: Feature, title: str) -> None:
    """Refuse a column whose remark in brackets states another coding or unit than the feature's."""
    remark = title[re.search(r"[(\[]", title).start() :]  # type: ignore[union-attr]
    units = {unit[0].lower() for unit in re.findall(_TIME_UNIT, remark, re.IGNORECASE)}
    if feature.unit and units - {feature.unit[0]}:
        raise ClinicalValueError(f"column '{title}': {feature.name} is read in {feature.unit}; convert the values")
    for number, word in _codes(feature, remark):
        meant = _level_named(feature, _plain(word)) if feature.levels else None
        if meant is not None and meant != float(number):
            raise ClinicalValueError(
                f"column '{title}' says {number} = {word}, but {feature.name} is read as {feature.accepted}; recode it"
            )


def _codes(feature: Feature, remark: str) -> list[tuple[str, str]]:
    """Numbers in a remark, each with its meaning: ``0=F, 1=M``, ``M: 1``, ``0 female 1 male``, ``F/M=0/1``."""
    number, word = r"(?<![\w.])(\d+)(?![\w.])", r"([^\s\d,;=:()\[\]][^\s,;=:()\[\]]*)"
    codes = re.findall(rf"{number}\s*[=:]\s*{word}", remark)
    codes += [(code, name) for name, code in re.findall(rf"{word}\s*[=:]\s*{number}", remark)]
    if codes and "/" not in remark:
        return codes
    signs = re.findall(r"[^\s,;=:/()\[\]]+", remark)
    numbers = [sign for sign in signs if re.fullmatch(r"[0-9]+", sign)]
    words = [sign for sign in signs if sign not in numbers and _level_named(feature, _plain(sign)) is not None]
    return list(zip(numbers, words, strict=True)) if len(numbers) == len(words) else codes
