"""The tracer of a PET from its header: FDG, another one, or not stated."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from scripts.dicom.tags import items_of, needed_module, numbers_of, tag_name, text_of

if TYPE_CHECKING:
    from pydicom import Dataset

FDG = "FDG"
F18 = "F-18"
# In seconds; sources round differently (F-18: 6582 to 6600 s).
HALF_LIFE_S = {
    **{F18: 6586.2, "Ga-68": 4062.6, "C-11": 1221.8, "N-13": 597.9, "O-15": 122.24, "Rb-82": 76.4},
    **{"Cu-62": 580.0, "Cu-64": 45724.0, "Sc-44": 14292.0, "Y-86": 53064.0, "Zr-89": 282276.0, "I-124": 360806.0},
}
HALF_LIFE_TOLERANCE = 0.01
MASS_NUMBERS = {nuclide.split("-")[1]: nuclide for nuclide in HALF_LIFE_S}  # each occurs once
# Words within a text without spaces and punctuation; and abbreviations, which must be separate words.
TRACER_WORDS = {
    FDG: r"fdg(?!al$|alact)|gl[uiy][ck]os|glukoz",
    "FMISO": r"fmiso|misonidazol",
    "FAZA": r"faza|azomycin",
    "FETNIM": r"fetnim|etanidazol",
    "ATSM": r"atsm",
    "PSMA": r"psma|dcfpyl|dcfbc|piflufolastat|flotufolastat|gozetotid|pylarify|posluma",
    "DOTATATE, DOTATOC or DOTANOC": r"dotatat|dotatoc|dotanoc|edotreotid|netspot|sstr|somatostatin",
    "FAPI": r"fapi",
    "choline": r"ch?olin",
    "FLT": r"thymidin|alovudin",
    "FET": r"ethyll?tyrosin",
    "DOPA": r"dopa",
    "methionine": r"meth?ionin",
    "fluciclovine": r"fluciclovin|axumin|facbc",
    "sodium fluoride": r"fluorid|fluorur",
    "FES": r"estradiol",
    "acetate": r"acetat",
    "pentixafor": r"pentixa",
    "an amyloid or tau tracer": r"florbeta|flutemetamol|flortaucipir|pittsburgh",
    "a perfusion tracer": r"rubidium|ammonia|flurpiridaz",
}
TRACER_TOKENS = {
    **{"FLT": r"f?flt", "FET": r"f?fet", "sodium fluoride": r"naf", "choline": r"fch", "FES": r"f?fes"},
    **{"FMISO": r"miso", "an amyloid or tau tracer": r"pib"},
}
OLD_SNOMED = ("SRT", "SNM3", "99SDM")  # coding schemes of the earlier SNOMED codes


@dataclass(frozen=True)
class Tracer:
    """The tracer of a PET.

    Args:
        name: :data:`FDG`, another tracer's name, or "" where it is not stated or not known here.
        problem: why it cannot be used as FDG, "" if it can.
        doubt: a doubt, "" where there is none.
        order: among several PETs, lower for the one that is more certainly FDG.
    """

    name: str = ""
    problem: str = ""
    doubt: str = ""
    order: int = 0


def tracer_of(header: Dataset) -> Tracer:
    """The tracer of a PET, from all radiopharmaceutical items (0054,0016) in the header of an image.

    Problems are: a code or a text with another tracer than FDG, or FDG and another one; a nuclide or a half-life other
    than that of F-18. Doubts are: a tracer that is not stated or not known here; a series description with another
    tracer. No text of the header is quoted.
    """
    names: set[str] = set()
    problems: list[str] = []
    where = tag_name("RadiopharmaceuticalInformationSequence")
    for item in items_of(header, "RadiopharmaceuticalInformationSequence"):
        names |= _named(text_of(item, "Radiopharmaceutical"))
        for concept in items_of(item, "RadiopharmaceuticalCodeSequence"):
            names |= _named_by_code(concept)
        problems += [_nuclide_problem(item, where), _half_life_problem(item)]
    others = ", ".join(sorted(names - {FDG}))
    if others:
        both = "both FDG and " if FDG in names else ""
        return Tracer(others, f"the tracer is {both}{others} by {where}; FDG is needed")
    name, problem = FDG if FDG in names else "", next(filter(None, problems), "")
    if problem:
        return Tracer(name, problem)
    hint = _named(text_of(header, "SeriesDescription"), abbreviations=False)
    if hint - {FDG}:
        stated = "says FDG" if name else "names no tracer that is known here"
        doubt = f"the series description names {', '.join(sorted(hint - {FDG}))}, and {where} {stated}: is it FDG?"
        return Tracer(name, doubt=doubt, order=1 if name else 4)
    if name:
        return Tracer(name)
    return Tracer(doubt=f"{where} names no tracer that is known here: is it FDG?", order=2 if hint else 3)


def _named(text: str, abbreviations: bool = True) -> set[str]:
    """The tracers that a text names."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    joined = re.sub(r"[^a-z0-9]", "", plain)
    found = {name for name, words in TRACER_WORDS.items() if re.search(words, joined)}
    if abbreviations:
        tokens = re.findall(r"[a-z]+", f"{plain} {re.sub(r'[^a-z]*18[^a-z]*f', 'f', plain)}")  # Na18F is NaF
        found |= {name for name, short in TRACER_TOKENS.items() if any(re.fullmatch(short, t) for t in tokens)}
    return found


def _named_by_code(concept: Dataset) -> set[str]:
    """The tracers that a coded concept names, by its code and by its meaning."""
    meaning = _known_meaning("CID4021", concept)
    names = _named(meaning) | _named(text_of(concept, "CodeMeaning"))
    return names or ({meaning} if meaning else set())


def _known_meaning(group: str, concept: Dataset) -> str:
    """The meaning of a code in a DICOM context group (CID 4020 nuclides, CID 4021 tracers), "" for others."""
    scheme = text_of(concept, "CodingSchemeDesignator")
    value = text_of(concept, "CodeValue") or text_of(concept, "LongCodeValue")
    return _dictionary_meaning(group, "SRT" if scheme.upper() in OLD_SNOMED else scheme, value)


@lru_cache
def _dictionary_meaning(group: str, scheme: str, value: str) -> str:
    known = getattr(needed_module("pydicom.sr.codedict").codes, group)
    given = needed_module("pydicom.sr.coding").Code(value, scheme, "")
    return next((code.meaning for code in (getattr(known, name) for name in known.dir()) if code == given), "")


def _nuclide_problem(item: Dataset, where: str) -> str:
    """Why the nuclide of an item is not F-18, "" where it is or is not stated."""
    for concept in items_of(item, "RadionuclideCodeSequence"):
        meanings = f"{_known_meaning('CID4020', concept)} {text_of(concept, 'CodeMeaning')}"
        stated = {MASS_NUMBERS[number] for number in re.findall(r"\d+", meanings) if number in MASS_NUMBERS}
        if stated - {F18}:
            return f"the nuclide is {', '.join(sorted(stated))} by {where}; FDG has F-18"
    return ""


def _half_life_problem(item: Dataset) -> str:
    """Why the half-life is not that of F-18, "" where it is or is not stated."""
    number = numbers_of(item, "RadionuclideHalfLife", 1)
    if number is None or number[0] <= 0:
        return ""
    near = [name for name, known in HALF_LIFE_S.items() if abs(number[0] / known - 1) <= HALF_LIFE_TOLERANCE]
    if F18 in near:
        return ""
    whose = f", that of {near[0]}" if near else ""
    return (
        f"{tag_name('RadionuclideHalfLife')} is {number[0]:g} s{whose}; F-18, of FDG, has {HALF_LIFE_S[F18]:.0f} s: "
        "check tracer and unit"
    )
