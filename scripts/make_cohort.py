"""Make the demonstration cohort: digital PET/CT phantoms in the folder layout of HECKTOR 2025.

``python scripts/make_cohort.py --out DIR --cases 300 --seed 0`` writes the files of :mod:`phantom.cohort`. The phantoms
are for software demonstration only. The same seed gives the same bytes, for any number of cases and processes.
"""

from __future__ import annotations

from pathlib import Path

from command_line import run_tool

from phantom.cohort import MakeCohortError, describe, write_cohort


def make_cohort(out: str, cases: int = 300, seed: int = 0, scale: str = "small", jobs: int = 0) -> None:
    """Write a phantom cohort and print a summary. If interrupted, rerun the same command to complete it.

    Args:
        out: folder to write; new, empty, or holding the same cohort.
        cases: number of patients.
        seed: a whole number, 0 or more; patient k depends on the seed and on k only.
        scale: small (6 to 7 mm voxels, some tens of kB a case) or full (voxel sizes and extents of hospitals).
        jobs: processes; 0: one for each core.
    """
    if not write_cohort(Path(out), cases, seed, scale, jobs):
        print("This cohort is complete already.")
    print(describe(Path(out)))


if __name__ == "__main__":
    run_tool(make_cohort, MakeCohortError, OSError)
