"""Gaussian naive Bayes whose classes share their variances, as a scikit-learn classifier.

scikit-learn's own `GaussianNB` has a variance for every class, which makes it a quadratic
classifier; with shared ones it is linear, like logistic regression, and the two differ only in how
they find their weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from workbench.lab import checks

Array = np.ndarray[Any, np.dtype[Any]]


class SharedVarianceNB(ClassifierMixin, BaseEstimator):
    r"""Gaussian naive Bayes with one diagonal variance for all classes: a linear classifier.

    $s_k(x) = \log\pi_k - \frac12\sum_j (x_j-\mu_{kj})^2/v_j$, of which the part that does not
    depend on $k$ cancels.

    Args:
        eps: added to every variance, in squared units of the features; default 1e-9.

    Attributes:
        classes_: (K,) labels; ``class_count_`` (K,) their weights; ``class_prior_`` (K,) shares.
        theta_: (K, n) class means; ``var_`` (n,) shared variance, eps included.
        coef_, intercept_: weights as of `LogisticRegression`, (K, n) and (K,), or (1, n) and (1,)
            for two classes.

    Reference: Zheng et al. (2023), arXiv 2302.02334, naive Bayes with a shared diagonal covariance.
    """

    def __init__(self, eps: float = 1e-9) -> None:
        self.eps = eps

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SharedVarianceNB:
        """Estimate from (m, n) features and (m,) labels, with weights (m,) or 1 each."""
        return self._update(X, y, None, sample_weight, fresh=True)

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> SharedVarianceNB:
        """Add rows to those seen; the result is that of one fit to all of them.

        Args:
            X: (m, n) features.
            y: (m,) labels.
            classes: all labels that will ever come; needed in the first call.
            sample_weight: (m,) weights, 1 each by default.

        Raises:
            ValueError: no classes in the first call, or a label that is none of them.
        """
        fresh = not hasattr(self, "classes_")
        if classes is None and fresh:
            raise ValueError("classes: expected all labels in the first call of partial_fit")
        return self._update(X, y, classes, sample_weight, fresh=fresh)

    def _update(
        self, X: Any, y: Any, classes: Any, sample_weight: Any, *, fresh: bool
    ) -> SharedVarianceNB:
        checks.positive(self.eps, "eps")
        X, y = validate_data(self, X, y, reset=fresh, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if fresh:
            self.classes_ = unique_labels(y if classes is None else classes)
            if len(self.classes_) < 2:
                raise ValueError(f"y: expected two classes or more, got 1 class: {self.classes_}")
            self.class_count_ = np.zeros(len(self.classes_))
            self.theta_ = np.zeros((len(self.classes_), X.shape[1]))
            self._squares = np.zeros(X.shape[1])
        codes = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if not (self.classes_[codes] == y).all():
            other = np.setdiff1d(y, self.classes_)
            raise ValueError(f"y: expected labels out of {self.classes_}, got {other}")
        self._add(X.astype(np.float64, copy=False), codes, weight)
        self._derive()
        return self

    def _add(self, X: Array, codes: Array, weight: Array) -> None:
        """Merge counts, means and the sum of squares within classes (Chan et al. 1983)."""
        members = sparse.csr_array(
            (weight, (codes, np.arange(len(X)))), shape=(len(self.classes_), len(X))
        )
        count = members.sum(1)
        safe = np.where(count > 0, count, 1.0)[:, None]
        mean = (members @ X) / safe
        total = self.class_count_ + count
        share = np.divide(count, total, out=np.zeros_like(total), where=total > 0)[:, None]
        step = mean - self.theta_
        between = (self.class_count_[:, None] * share * step**2).sum(0)
        self._squares = self._squares + weight @ (X - mean[codes]) ** 2 + between
        self.theta_ = self.theta_ + share * step
        self.class_count_ = total

    def _derive(self) -> None:
        weight = self.class_count_.sum()
        self.class_prior_ = self.class_count_ / weight
        self.var_ = self._squares / weight + self.eps
        with np.errstate(divide="ignore"):
            log_prior = np.log(self.class_prior_)
        if len(self.classes_) == 2:
            centre, means = self.theta_[0], self.theta_[1:]
            log_prior = log_prior[1:] - log_prior[0]
        else:
            centre, means = self.class_prior_ @ self.theta_, self.theta_
        self.coef_ = (means - centre) / self.var_
        self.intercept_ = log_prior - 0.5 * ((means + centre) * self.coef_).sum(1)

    def decision_function(self, X: Any) -> Array:
        """Scores up to a constant of the row, (m, K); for two classes their difference, (m,)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))
        scores: Array = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Array:
        """Label of the largest score, (m,)."""
        scores = self.decision_function(X)
        best = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        labels: Array = self.classes_[best]
        return labels

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of the class probabilities, (m, K)."""
        log_probs: Array = log_softmax(self._full(X), axis=1)
        return log_probs

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities, (m, K)."""
        probs: Array = softmax(self._full(X), axis=1)
        return probs

    def _full(self, X: Any) -> Array:
        scores = self.decision_function(X)
        return np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
