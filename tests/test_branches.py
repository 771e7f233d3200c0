"""What the branches compute, by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from scripts.model.branches import ClinicalTerm, tumour_burden

# --- burden of the tumour ----------------------------------------------------------------------------------


def test_burden_by_hand():
    """Half a probability in 8 of 4096 voxels, one of which takes up twice as much."""
    probability, pet = torch.zeros(1, 16, 16, 16), torch.full((1, 16, 16, 16), 0.3)
    probability[0, :2, :2, :2] = 0.5
    pet[0, 0, 0, 0] = 0.6
    volume, mean, highest = tumour_burden(probability, pet)[0].tolist()
    assert volume == pytest.approx(math.log(1000 * 4 / 4096 + 0.1))
    assert mean == pytest.approx(0.5 * (7 * 0.3 + 0.6) / (1 + 4))
    assert highest == pytest.approx(0.5 * 0.6)


def test_burden_where_there_is_no_tumour_is_finite():
    burden = tumour_burden(torch.zeros(2, 16, 16, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 16, 16))
    assert burden.dtype == torch.float32
    assert burden.isfinite().all()


# --- HPV status from clinical values -----------------------------------------------------------------------

AGE, TWO_LEVELS, THREE_LEVELS = (20, 60, 10), (1, 1, 1), (1, 1, 1)
TERMS = [  # coded values, weights of known and of value, the term by hand
    pytest.param([0, 0, 0], 0, id="nothing_known_adds_nothing"),
    pytest.param([60, 0, 0], 0.5, id="usual_age"),
    pytest.param([75, 0, 0], 0.5 + 1.5 * 2, id="older"),
    pytest.param([10, 0, 0], 0.5 / 2 + (10 - 30) / 10 * 2, id="half_known"),
    pytest.param([0, 1, 0], 0.25, id="first_level"),
    pytest.param([0, 2, 0], 0.25 + 3, id="second_level"),
    pytest.param([0, 0, 3], -1 + 2 * 0.5, id="third_level"),
    pytest.param([75, 2, 3], 3.5 + 3.25 + 0, id="all"),
]


@pytest.mark.parametrize(("coded", "expected"), TERMS)
def test_clinical_term_by_hand(coded, expected):
    term = ClinicalTerm([AGE, TWO_LEVELS, THREE_LEVELS])
    term.weight.data = torch.tensor([[0.5, 0.25, -1], [2, 3, 0.5]])
    assert term(torch.tensor([coded], dtype=torch.float32)).tolist() == pytest.approx([expected])


def test_clinical_term_is_a_logistic_regression_of_indicators():
    """Fitted to categories with gaps it finds what scikit-learn finds with a column for each level."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 3, (400, 2))  # 0 is missing
    log_odds = np.take([0.0, -1.0, 1.5], levels[:, 0]) + np.take([0.0, 0.5, -0.5], levels[:, 1])
    status = rng.random(400) < 1 / (1 + np.exp(-log_odds))
    columns = np.concatenate([levels == 1, levels == 2], axis=1).astype(float)
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(columns, status)
    term = ClinicalTerm([TWO_LEVELS, TWO_LEVELS]).double()
    coded, target = torch.tensor(levels).double(), torch.tensor(status).double()
    optimizer = torch.optim.LBFGS(term.parameters(), max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(term(coded), target)
        loss.backward()
        return loss

    optimizer.step(step)
    np.testing.assert_allclose(term(coded).detach(), oracle.decision_function(columns), atol=1e-4)
