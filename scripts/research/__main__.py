"""Start of the commands of this room."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

    from command_line import run_room

    run_room("research", "benchmark", "compare_inference", "measure_localisation", "measure_masks", "study_learning")
