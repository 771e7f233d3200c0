"""Python side of the bundle, imported as ``scripts`` with the bundle's root on ``sys.path``.

Each room imports only from those before it:

cohorts     cohorts, clinical values, folds, files
imaging     scans, their geometry, the box, quality control, transforms
dicom       DICOM in and DICOM objects out
model       network, losses, specification, checkpoint
training    configuration of a run, datasets, engine, handlers
evaluation  metrics of a table of cases, survival, plots
prediction  cases to predict, results, reports, explanations
runtimes    MONAI Label, TensorRT, federated training

:mod:`scripts.keys` holds the names that all of them share.
"""
