"""Cohorts: folders and tables of patients, clinical values, folds, files that are written whole."""
