"""MONAI Label's own Python environment: it needs other versions than this project (pydicom below 3)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from command_line import ROOT

from runtimes.environments import make_environment, packages_of, pip_install, run_step

ENVIRONMENT = ROOT / ".label_env"

# Without their own requirements: MONAI Label asks for sam2, mlflow and more that this needs not, torchvision for CUDA.
ALONE = ("monailabel==0.8.5", "torchvision==0.28.0", "pydicom-seg==0.4.1", "dcmqi==1.5.7")
REQUIREMENTS = (
    *("torch==2.13.0", "monai==1.6.1", "pytorch-ignite==0.5.5", "numpy==1.26.4", "scipy==1.17.1", "pandas==2.3.3"),
    # what MONAI Label imports
    *("uvicorn==0.54.0", "fastapi==0.165.0", "pydantic==2.14.3", "pydantic-settings==2.16.3", "python-dotenv==1.2.4"),
    *("python-multipart==0.0.34", "httpx==0.28.1", "requests==2.34.2", "requests-toolbelt==1.0.0", "filelock==4.2.11"),
    *("schedule==1.2.2", "timeloop==1.0.2", "expiringdict==1.2.2", "expiring-dict==1.1.2", "cachetools==7.3.2"),
    *("watchdog==7.1.0", "psutil==7.2.2", "PyJWT==2.15.1", "passlib==1.7.4", "bcrypt==5.0.0", "google-auth==2.62.2"),
    *("pydicom==2.4.5", "pynetdicom==2.1.1", "dicomweb-client==0.59.3", "jsonschema==3.2.0", "girder-client==5.0.21"),
    *(
        "itk-core==5.4.7",
        "itk-io==5.4.7",
        "itk-numerics==5.4.7",
        "pynrrd==1.1.3",
        "numpymaxflow==0.0.7",
        "scikit-image==0.26.0",
        "scikit-learn==1.9.1",
    ),
    *("pillow==13.0.0", "shapely==2.2.0", "setuptools==84.2.1"),
    # what the bundle imports, and its tests
    *("nibabel==5.4.2", "SimpleITK==2.5.7", "isal==1.9.1", "connected-components-3d==4.1.1", "lifelines==0.30.3"),
    *("tensorboard==2.21.0", "tqdm==4.70.1", "fire==0.7.1", "pytest==9.2.0"),
)
# On a build of torch without CUDA, importing torchvision fails for want of two operators that nothing here calls.
OPERATORS = """import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def make_label_environment(place: Path) -> Path:
    """The Python of MONAI Label's environment, as :func:`.make_environment` makes it."""
    contents = "\n".join((*ALONE, *REQUIREMENTS, OPERATORS))
    return make_environment(place, "MONAI Label (some minutes, about 2.5 GB)", contents, install_label)


def install_label(python: Path) -> None:
    """Install MONAI Label, and try whether it can be imported."""
    pip_install(python, *REQUIREMENTS)
    pip_install(python, "--no-deps", *ALONE)
    if subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, check=False).returncode:
        packages = packages_of(python)
        (packages / "torchvision_operators.py").write_text(OPERATORS)
        (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")  # at every start
    run_step([str(python), "-c", "import torchvision, monailabel.app, monailabel.tasks.train.bundle"])
