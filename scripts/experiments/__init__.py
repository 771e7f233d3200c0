"""Experiments of several folds: plan and record, evaluation, references, another cohort, ensemble, page."""
