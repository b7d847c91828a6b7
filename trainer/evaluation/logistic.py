"""Multinomial logistic regression by scikit-learn's L-BFGS, and the choice of its C.

In: float32 rows with labels. Out: a classifier on rows that were standardised by what it was fitted
on. C is the inverse strength of the L2 penalty, as scikit-learn has it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


class Standardisation(NamedTuple):
    """Mean and deviation of each column; a column that never varies becomes 0."""

    mean: NDArray[np.float64]  # (F,)
    deviation: NDArray[np.float64]  # (F,)

    def __call__(self, rows: Rows) -> Rows:
        """(N, F) with the columns moved and scaled."""
        return np.asarray((rows - self.mean) / self.deviation, np.float32)


@dataclass(frozen=True)
class Fitted:
    """A classifier of (N, F) rows into the classes it was fitted on."""

    standardisation: Standardisation
    model: Any  # sklearn's LogisticRegression

    @property
    def iterations(self) -> int:
        """That the fit took."""
        return int(self.model.n_iter_.max())

    def scores(self, rows: Rows) -> NDArray[np.float32]:
        """(N, C) log-odds, the column of a class at its seat among the fitted ones."""
        found = self.model.decision_function(self.standardisation(rows))
        if found.ndim == 1:  # of two classes scikit-learn gives the second's alone
            found = np.stack([-found, found], axis=1)
        return np.asarray(found, np.float32)


class Choice(NamedTuple):
    """The C that did best on the validation rows, the smallest of equals."""

    c: float
    accuracies: dict[str, float]  # of each C, as text


def standardised_by(rows: Rows) -> Standardisation:
    """What moves the columns of (N, F) to mean 0 and scales them to deviation 1."""
    mean = rows.mean(axis=0, dtype=np.float64)
    deviation = rows.std(axis=0, dtype=np.float64)
    # Sums of equal float32 numbers are exact in float64: a constant column's deviation is 0.
    return Standardisation(mean, np.where(deviation > 0, deviation, np.inf))


def fit_logistic(rows: Rows, labels: Labels, *, c: float, max_iter: int, seed: int) -> Fitted:
    """Fit (N, F) rows to (N,) labels; one that ends before it converged is told by `iterations`."""
    standardisation = standardised_by(rows)
    model = LogisticRegression(C=c, max_iter=max_iter, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the report says so instead
        model.fit(standardisation(rows), labels)
    return Fitted(standardisation, model)


def choose_c(
    rows: Rows,
    labels: Labels,
    held_rows: Rows,
    held_labels: Labels,
    *,
    cs: Sequence[float],
    max_iter: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Choice:
    """Fit with each C and count on rows that were held out."""
    found: dict[float, float] = {}
    for c in sorted(cs):
        fitted = fit_logistic(rows, labels, c=c, max_iter=max_iter, seed=seed)
        seats = fitted.scores(held_rows).argmax(axis=1)
        found[c] = float(np.mean(fitted.model.classes_[seats] == held_labels))
        advance()
    best = max(found, key=lambda c: (found[c], -c))
    return Choice(best, {f"{c:g}": accuracy for c, accuracy in found.items()})
