"""MONAI Deploy application: a DICOM PET/CT study in; tumour segmentation, structured report and PDF out.

``python scripts/runtimes/deploy_app --input STUDY --output OUT --model BUNDLE``. The model is the bundle's directory
as it is: what reads, predicts and writes is the bundle's own package ``scripts``, which this application only
connects. Options come from the environment, where a container's user sets them: ``QUALITY_FORCE=1`` predicts a study
although quality control rejects it. See ``bundle/docs/deploy.md``.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, parse_args

FORCE = "QUALITY_FORCE"
SWITCH = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


class AppError(ValueError):
    """The application cannot start: what is missing and what to do."""


class HeadNeckPetCtApp(Application):
    """The flow: study -> bundle -> results."""

    def compose(self) -> None:
        """Connect the operators.

        Raises:
            AppError: when there is no bundle at the model path, the output folder is in use, or an option has a value
                that is none of its own.
        """
        context = Application.init_app_context(self.argv)
        logging.getLogger("fontTools").setLevel(logging.WARNING)  # tells every letter that goes into the PDF
        bundle = find_bundle(context.model_path)
        sys.path.insert(0, str(bundle))  # the bundle's package is called scripts, as its configs say
        from operators import BundleOperator, ResultOperator, StudyOperator

        output = unused(Path(context.output_path))
        predict = BundleOperator(self, app_context=context, bundle_path=bundle, force=forced(), name="bundle")
        folder = Path(context.input_path)
        study = StudyOperator(self, CountCondition(self, 1), folder=folder, features=predict.features, name="study")
        write = ResultOperator(self, folder=output, name="results")
        self.add_flow(study, predict, {("case", "case")})
        self.add_flow(study, write, {("case", "case")})
        self.add_flow(predict, write, {("result", "result")})


def find_bundle(model_path: str | os.PathLike[str]) -> Path:
    """The bundle's directory: the model path itself, or the only bundle one level below it (as in a container).

    Raises:
        AppError: when there is none, several, or one without weights.
    """
    root = Path(model_path).resolve()
    places = [root, *sorted(root.iterdir())] if root.is_dir() else []
    found = [place for place in places if (place / "configs" / "inference.json").is_file()]
    if len(found) != 1:
        count = f"{len(found)} bundles" if found else "no bundle"
        raise AppError(f"{root}: {count} there; name the bundle's directory with --model or HOLOSCAN_MODEL_PATH")
    weights = found[0] / "models" / "model.pt"
    if not weights.is_file():
        raise AppError(f"{weights} does not exist: put the trained weights there first")
    return found[0]


def unused(folder: Path) -> Path:
    """The output folder, in which no earlier run has left results: nobody shall take those for the new ones."""
    if folder.is_dir() and any(folder.iterdir()):
        raise AppError(f"{folder} is not empty: name another folder with --output, or remove what is in it")
    return folder


def forced() -> bool:
    """Whether the user wants a prediction although quality control rejects the study."""
    value = os.environ.get(FORCE, "").strip().lower()
    if value not in SWITCH:
        raise AppError(f"{FORCE} is 1 or 0, not {value!r}")
    return SWITCH[value]


def check_arguments() -> None:
    """Read the command line as the SDK will, which ends a program with code 2 and its usage."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parse_args(sys.argv)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        why = said.getvalue().strip().rpartition("error: ")[2]
        raise AppError(f"{why}; there are --input STUDY, --output OUT and --model BUNDLE") from None


def main() -> None:
    """Run the application; options or a study that cannot be used end it with one line that says why, and code 1."""
    try:
        check_arguments()
        HeadNeckPetCtApp().run()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        hint = f" (for this application: {FORCE}=1)" if type(error).__name__ == "QualityError" else ""
        sys.exit(f"error: {error}{hint}")


if __name__ == "__main__":
    main()
