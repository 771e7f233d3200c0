"""Digital PET/CT phantom of the head and neck: patients, anatomy, tumours, scans, outcomes. Pure functions.

Nothing here comes from a real patient: the shapes are ellipsoids and tapered tubes of about adult size, the uptake
values are of the order seen with FDG. The cohort serves to try and test software, never to draw a clinical conclusion.

A patient is :func:`draw_patient` of a seed and an index, and nothing else: the same patient can be scanned at either
scale, in any order, in any process. Lengths are millimetres; *body* coordinates are right-anterior-superior with the
origin in the oropharynx; a :class:`Pose` takes them to *world* coordinates (RAS+), in which every image grid lives.

The outcome's formula is that of :mod:`phantom.patients`.
"""

from .anatomy import build_anatomy, raised_arms
from .patients import HAZARD_WEIGHTS, Patient, draw_patient, log_hazard
from .scanners import CENTRES, Centre, Scanner
from .scans import SCALES, VIEWS, Grid, Scan, paint_ct, paint_mask, paint_pet, scan_grids, scan_patient
from .shapes import Ellipsoid, Part, Pose, Tube
from .tumours import Lesion, measure_lesions
