"""Evaluation: metrics of a table of cases with intervals, survival, plots."""
