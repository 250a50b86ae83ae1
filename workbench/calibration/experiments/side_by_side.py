"""All repairs of class probabilities on one task: the same halves of real predictions."""

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB

from workbench import lab
from workbench.calibration import measures, released
from workbench.calibration.correctness_aware import CAcalibrator, fit_calibrator, view_features
from workbench.calibration.recalibrate import FLOOR, RECALIBRATORS
from workbench.calibration.tempnet import TempNet, fit_tempnet

LEARNED = ("correctness-aware", "tempnet")
METHODS = ("none", *RECALIBRATORS, *LEARNED)
RHOS = (0.75, 0.85, 0.95)
"""Radii of TempNet's robust loss as shares of log k; the best by NLL on a held-out fifth wins."""


def predictions() -> tuple[np.ndarray, np.ndarray, str]:
    """Log-probabilities, labels, and in words where they come from.

    The released CIFAR-10 predictions; where they are not on this machine, a naive Bayes classifier
    fitted to a third of the handwritten digits.
    """
    if released.available():
        probs, labels = released.load("cifar10")
        log_probs = np.log(np.maximum(probs, FLOOR))
        return log_probs, labels, "released cross-validated predictions for CIFAR-10's test set"
    digits = lab.data.digits()
    x, y = digits.x.reshape(len(digits.y), -1), digits.y
    train = np.random.default_rng(0).permutation(len(y)) % 3 == 0
    model = GaussianNB().fit(x[train], y[train])
    log_probs = np.maximum(model.predict_log_proba(x[~train]), np.log(FLOOR))
    return log_probs, y[~train], "naive Bayes on handwritten digits (no released predictions here)"


def repair(
    seed: int, *, log_probs: np.ndarray, labels: np.ndarray, method: str, bins: int = 15
) -> dict[str, float]:
    """Fit one repair on a random half of the predictions and measure it on the other.

    Args:
        seed: of the split and of the trained repairs.
        log_probs: (n, k) logarithms of predicted probabilities.
        labels: (n,) classes.
        method: one of METHODS. `correctness-aware` reads the row's own top scores only, because a
            table of predictions has no images to transform.
        bins: equal-width bins of the ECE.

    Returns:
        `ece`, `brier`, `nll`, `auroc` (confidence as a sign of being right) and `accuracy`.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    fit, test = np.array_split(order, 2)
    probs = _repaired(method, log_probs[fit], labels[fit], log_probs[test], seed)
    truth = labels[test]
    right = probs.argmax(1) == truth
    return {
        "ece": measures.ece(probs, truth, bins=bins),
        "brier": float(measures.brier(probs, truth)),
        "nll": float(measures.nll(probs, truth)),
        "auroc": float(roc_auc_score(right, probs.max(1))),
        "accuracy": float(right.mean()),
    }


def _repaired(
    method: str, fit: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int
) -> np.ndarray:
    if method == "none":
        return softmax(test, axis=1)
    if method in RECALIBRATORS:
        return RECALIBRATORS[method](inputs="logits").fit(fit, labels).transform(test)
    z, y, new = (torch.as_tensor(v) for v in (fit.astype("f4"), labels, test.astype("f4")))
    scale = _correctness_aware if method == "correctness-aware" else _tempnet
    with torch.no_grad():
        return (new / scale(z, y, seed)(new)).double().softmax(1).numpy()


def _correctness_aware(logits, labels, seed):
    """A fitted map from logits to temperatures (n, 1)."""

    def features(z):
        return view_features(z[None], topk=min(4, z.shape[1]))

    with torch.enable_grad(), lab.seeded(seed):
        net = CAcalibrator(min(4, logits.shape[1]))
        fit_calibrator(net, logits, features(logits), labels, lr=1e-2, epochs=100, seed=seed)
    return lambda z: net(features(z))[:, None]


def _tempnet(logits, labels, seed):
    """A fitted map from logits to temperatures (n, 1), at the best of three radii."""
    cut = len(labels) // 5
    scored = []
    for share in RHOS:
        with torch.enable_grad(), lab.seeded(seed):
            net = TempNet(logits.shape[1], hidden=64, tau_min=0.01, tau_max=5.0)
            rho = share * float(np.log(logits.shape[1]))
            fit_tempnet(net, logits[cut:], labels[cut:], rho, lr=3e-3, steps=300, seed=seed)
        with torch.no_grad():
            held = (logits[:cut] / net(logits[:cut])).softmax(1)
        scored.append((float(measures.nll(held, labels[:cut])), len(scored), net))
    return min(scored)[2]
