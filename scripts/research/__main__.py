"""Start of the commands of this room."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

    from command_line import run_room

    names = ("benchmark", "compare_evaluations", "compare_inference", "measure_localisation", "measure_masks")
    run_room("research", *names, "study_learning")
