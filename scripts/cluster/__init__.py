"""Patients of ``predict.py`` and folds of ``train_folds.py`` on the nodes of a Ray cluster."""
