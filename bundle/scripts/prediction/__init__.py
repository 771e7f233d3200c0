"""Prediction: cases in, results out, reports, explanations, DICOM results."""
