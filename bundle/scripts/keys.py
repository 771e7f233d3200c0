"""Names shared by every module: dictionary keys of a case, label values, task names.

A *case* is one patient's dictionary on its way from :mod:`scripts.cohorts.cohort` to the network. The keys below
are spelled here and nowhere else.
"""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]

# --- identity ------------------------------------------------------------------------------------------
PATIENT_ID = "patient_id"  # str
CENTRE = "centre"  # str, e.g. "CHUM"
FINGERPRINT = "fingerprint"  # str, size and time of the case's files: tells a cache when they changed
PROBLEM = "problem"  # str, "" or why the case cannot be predicted; only in lists made for inference
DICOM = "dicom"  # dicom.choice.Choice, the series of a case given as DICOM; only in lists made for inference

# --- scans as found (paths), then as loaded (MetaTensor, channel first) ----------------------------------
CT = "ct"  # HU
PET = "pet"  # SUV
MASK = "mask"  # 0 background, 1 GTVp, 2 GTVn, on the CT grid; None where the case has no mask

# --- what the network reads ------------------------------------------------------------------------------
IMAGE = "image"  # (2, *roi_size) float32: channel 0 CT, channel 1 PET
CLINICAL = "clinical"  # dict of raw values in a datalist; (F,) float32 once coded
SEED = "augmentation_seed"  # int, of this case in this epoch (training/augmentation.py)
CLINICAL_OTHERS = "clinical_others"  # dict of known clinical values that the network does not read
CLINICAL_FOUND = "clinical_found"  # bool, False where no CSV row belongs to the patient
CLINICAL_SOURCE = "clinical_source"  # dict, clinical value -> where it comes from, where that is not a table

# --- what it learns from: each label with a flag of its own ---------------------------------------------
SEG = "seg"  # (1, *roi_size) float32, the mask's values (BACKGROUND, GTVP, GTVN); zeros where unknown
SEG_KNOWN = "seg_known"  # bool; True for an empty mask, False for a missing one
# bool; True where the mask tells primary tumour and nodes apart: it or another mask of its centre holds GTVN
# (training/sampling.py). False: GTVP is any tumour.
SEG_CLASSES_KNOWN = "seg_classes_known"
SEG_INSIDE = "seg_inside"  # float, share of the mask's voxels that lie in the box; NaN where unknown or empty
HPV = "hpv"  # float in {0, 1}; 0 where unknown
HPV_KNOWN = "hpv_known"  # bool
TIME = "time"  # float, days to relapse or to the last visit; 0 where unknown
EVENT = "event"  # bool, True = relapse
SURV_KNOWN = "surv_known"  # bool

# --- geometry ----------------------------------------------------------------------------------------------
CT_SHAPE = "ct_shape"  # (3,) int64, voxels of the CT as read
CT_AFFINE = "ct_affine"  # (4, 4) float64, voxel -> world mm (RAS+) of the CT as read
BOX_AFFINE = "box_affine"  # (4, 4) float64, voxel -> world mm (RAS+) of the network's grid
CROP_METHOD = "crop_method"  # str, how the box was placed
CROP_FLAG = "crop_flag"  # str, "" or what makes the box doubtful
QUALITY = "quality"  # str, the checks of the scans as JSON (imaging/quality.py)
CLINICAL_VALUES = "clinical_values"  # str, the clinical values as given and as coded, as JSON (imaging/transforms.py)
DOUBTS = "doubts"  # list of str, what is doubtful in the headers of the scans, until quality control
STARTED = "started"  # float64, the monotonic clock in seconds when reading the case began
REQUEST = (
    "request"  # dict, what a server was asked, as it came; only in cases that a server asks for (runtimes/label.py)
)

# --- network output ----------------------------------------------------------------------------------------
SEG_LOGITS = "seg_logits"  # (B, 1, *roi_size), of tumour of any class
SEG_PROB = "seg_prob"  # (B, 1, *roi_size), of tumour of any class
CLASS_LOGITS = "class_logits"  # (B, C, *roi_size), of each class against background; only of C > 1 classes
CLASS_PROB = "class_prob"  # (B, C, *roi_size), of each class; their sum is SEG_PROB; only of C > 1 classes
HPV_LOGIT = "hpv_logit"  # (B,)
HPV_PROB = "hpv_prob"  # (B,)
LOG_HAZARD = "log_hazard"  # (B,)
HPV_PROB_STD = "hpv_prob_std"  # (B,), spread over the folds
LOG_HAZARD_STD = "log_hazard_std"  # (B,), spread over the folds
HPV_PROB_FOLDS = "hpv_prob_folds"  # (B, K), of each fold
LOG_HAZARD_FOLDS = "log_hazard_folds"  # (B, K), of each fold
FOLD_COLUMN = "log_hazard_fold_"  # of a table of cases, then the number of the fold
FEATURES = "features"  # (B, F) of one network, (B, K, F) of an ensemble: the deep features z1 and z2
PRED = "pred"  # (1, X, Y, Z) uint8, the tumour mask on the CT's own grid: k is the k-th class of the model
VOLUME_ML = "volume_ml"  # float, volume of that mask
MEASURES = "measures"  # dict of plain numbers, what was measured on mask and PET (prediction/measures.py)
PREDICTION = "prediction"  # dict, all that is said of a patient, as prediction.json has it (prediction/description.py)

# --- tasks -------------------------------------------------------------------------------------------------
TASK_SEG, TASK_HPV, TASK_SURV = "seg", "hpv", "surv"
TASKS = (TASK_SEG, TASK_HPV, TASK_SURV)

# --- mask values -------------------------------------------------------------------------------------------
BACKGROUND, GTVP, GTVN = 0, 1, 2

# --- status of a prediction ------------------------------------------------------------------------------
OK, INCOMPLETE, FAILED = "ok", "incomplete", "failed"

# --- what every output says --------------------------------------------------------------------------------
RESEARCH_USE_ONLY = "Research use only. Not a medical device; not for clinical decisions."
