"""Correctness-aware against cross-entropy calibration, clean and under five fixed corruptions."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from workbench import lab
from workbench.calibration.correctness_aware import (
    CAcalibrator,
    balanced_objective,
    ca_objective,
    fit_calibrator,
    view_features,
)
from workbench.calibration.measures import brier, ece
from workbench.calibration.temperature import fit_temperature

Transform = Callable[[Tensor], Tensor]

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
"""One grid for every trained calibrator; the best by ECE on held-out calibration images wins."""

METHODS = {  # name: (objective, features)
    "ce": ("ce", "all"),
    "mse": ("mse", "all"),
    "ca": ("ca", "all"),
    "balanced": ("balanced", "all"),
    "released": ("balanced", "views"),
    "ce_alone": ("ce", "original"),
    "ca_alone": ("ca", "original"),
}
"""`all`: the original's own top scores and its views'; `views`: as in the authors' code, without
the original's own; `original`: no views at all."""


def ce_objective(scaled: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scaled logits, the loss the paper argues against."""
    return F.cross_entropy(scaled, labels)


def mse_objective(scaled: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the whole probability vector."""
    return (scaled.softmax(1) - F.one_hot(labels, scaled.shape[1])).square().sum(1).mean()


OBJECTIVES = {
    "ce": ce_objective,
    "mse": mse_objective,
    "ca": ca_objective,
    "balanced": balanced_objective,
}


def shift_study(
    seed: int,
    *,
    data: str = "mnist5000",
    pool: int = 2,
    net_epochs: int = 10,
    calibrator_epochs: int = 150,
    bins: int = 15,
    device: str = "cpu",
) -> dict[str, float]:
    """Train a classifier, calibrate it on clean held-out images, test it clean and corrupted.

    Images are first averaged over `pool` x `pool` pixels, which makes 14 x 14 of MNIST's 28 x 28.

    Returns `accuracy_{where}`, and `{ece|brier|auroc}_{method}_{where}` for `raw`, `ts`
    (temperature scaling) and every entry of METHODS, where is `clean` or `shift` (the mean over
    the corruptions), and `lr_{method}`, the learning rate chosen.
    """
    split = getattr(lab.data, data)().split(seed, train=0.6, calibration=0.2, test=0.2)
    parts = {
        name: shrink(*split[name].tensors(), pool) for name in ("train", "calibration", "test")
    }
    net = train_classifier(*parts["train"], seed=seed, epochs=net_epochs, device=device)
    generator = torch.Generator().manual_seed(seed)

    calibration, labels = parts["calibration"]
    side = calibration.shape[-1]
    order = torch.randperm(len(labels), generator=generator)
    fit, held = order[: int(0.7 * len(order))], order[int(0.7 * len(order)) :]
    views = logits_of_views(net, calibration, side, device)
    chosen, result = {}, {}
    for name, (objective, features) in METHODS.items():
        chosen[name], result[f"lr_{name}"] = choose_calibrator(
            views, labels, fit, held, OBJECTIVES[objective], features, calibrator_epochs, bins, seed
        )
    temperature = fit_temperature(views[0][fit], labels[fit])

    images, truth = parts["test"]
    scores = {}
    for where, corrupt in {"clean": lambda x: x, **corruptions(side, generator)}.items():
        views = logits_of_views(net, corrupt(images), side, device)
        scaled = {"raw": views[0], "ts": views[0] / temperature}
        for name, calibrator in chosen.items():
            inputs = select_features(views, METHODS[name][1])
            with torch.no_grad():
                scaled[name] = calibrator.scale(views[0], inputs)
        scores[where] = {name: quality(z, truth, bins) for name, z in scaled.items()}
        scores[where]["accuracy"] = float((views[0].argmax(1) == truth).double().mean())
    return result | summarise(scores)


def summarise(scores: dict[str, dict]) -> dict[str, float]:
    """Clean values and means over the corruptions, as flat columns."""
    shifted = [values for where, values in scores.items() if where != "clean"]
    out = {
        "accuracy_clean": scores["clean"]["accuracy"],
        "accuracy_shift": float(np.mean([s["accuracy"] for s in shifted])),
    }
    for name in scores["clean"].keys() - {"accuracy"}:
        for metric, value in scores["clean"][name].items():
            out[f"{metric}_{name}_clean"] = value
            out[f"{metric}_{name}_shift"] = float(np.mean([s[name][metric] for s in shifted]))
    return dict(sorted(out.items()))


def quality(logits: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    """ECE, Brier score of the probabilities, and AUROC of confidence as a sign of being right."""
    probs = logits.double().softmax(1)
    right = (logits.argmax(1) == labels).numpy()
    return {
        "ece": float(ece(probs, labels, bins=bins)),
        "brier": float(brier(probs, labels)),
        "auroc": float(roc_auc_score(right, probs.amax(1).numpy()))
        if 0 < right.mean() < 1
        else 1.0,
    }


def choose_calibrator(views, labels, fit, held, objective, kind, epochs, bins, seed):
    """The calibrator of the best learning rate, by ECE on the held-out part; and that rate."""
    features, logits = select_features(views, kind), views[0]
    best = (math.inf, None, 0.0)
    for lr in LEARNING_RATES:
        with lab.seeded(seed):
            calibrator = CAcalibrator(features.shape[1])
        fit_calibrator(
            calibrator, logits[fit], features[fit], labels[fit], objective=objective, lr=lr,
            epochs=epochs, seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            probs = calibrator.scale(logits[held], features[held]).softmax(1)
        error = float(ece(probs, labels[held], bins=bins))
        if error < best[0]:
            best = (error, calibrator, lr)
    return best[1], best[2]


def select_features(views: Tensor, kind: str) -> Tensor:
    """Features of one entry of METHODS; `views[0]` are the original's logits."""
    if kind == "original":
        return view_features(views[:1])
    if kind == "views":
        return view_features(views[1:], original=views[0])
    return view_features(views)


def shrink(images: Tensor, labels: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Images averaged over squares of pixels, with their labels."""
    return F.avg_pool2d(images, pool), labels


def train_classifier(
    images: Tensor, labels: Tensor, *, seed: int, epochs: int, device: str
) -> torch.nn.Module:
    """A small convolutional network, trained and left in evaluation mode."""
    with lab.seeded(seed):
        net = lab.models.CNN((16, 32, 64), classes=10)
    lab.train.fit(
        net, F.cross_entropy, (images, labels), epochs=epochs, batch_size=64, lr=3e-3, seed=seed,
        device=device, schedule="cosine",
    )  # fmt: skip
    return net


def logits_of_views(net, images: Tensor, side: int, device: str) -> Tensor:
    """Logits (views, n, classes) of the images and their transformed versions, original first."""
    versions = [images, *(view(images) for view in mild_views(side))]
    return torch.stack([lab.train.predict(net, x, batch_size=256, device=device) for x in versions])


def mild_views(side: int) -> list[Transform]:
    """Mild transforms from which the calibrator reads whether the prediction is stable."""
    return [
        lambda x: affine(x, degrees=15),
        lambda x: affine(x, degrees=-15),
        lambda x: blur(x, 0.03 * side),
        lambda x: affine(x, right=0.04, down=0.04),
        lambda x: contrast(x, 0.8),
    ]


def corruptions(side: int, generator: torch.Generator) -> dict[str, Transform]:
    """The shifted test sets, at severities fixed once."""
    return {
        "rotation": lambda x: affine(x, degrees=25),
        "noise": lambda x: (x + 0.15 * torch.randn(x.shape, generator=generator)).clamp(0, 1),
        "blur": lambda x: blur(x, 0.05 * side),
        "contrast": lambda x: contrast(x, 0.6),
        "shift": lambda x: affine(x, right=-0.08, down=0.05),
    }


def affine(x: Tensor, *, degrees: float = 0.0, right: float = 0.0, down: float = 0.0) -> Tensor:
    """Rotate about the centre and move by fractions of the side, filling with zeros."""
    angle = math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[c, -s, -2 * right], [s, c, -2 * down]], dtype=x.dtype)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of one-channel images."""
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-torch.arange(-reach, reach + 1, dtype=x.dtype).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = F.conv2d(x, kernel.reshape(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(x, kernel.reshape(1, 1, 1, -1), padding=(0, reach))


def contrast(x: Tensor, factor: float) -> Tensor:
    """Pull every image towards its own mean grey."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor * (x - mean)
