"""DICOM: finding series, choosing CT and PET, SUV and tracer, segmentation and structured report objects."""
