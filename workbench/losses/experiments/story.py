"""The opening's experiment: one small classifier, every loss, four situations."""

from __future__ import annotations

from workbench.losses import boundary

SITUATIONS = {
    "clean": (0.0, 1, "accuracy"),
    "40% wrong labels": (0.4, 1, "accuracy"),
    "1 positive in 21, accuracy": (0.0, 20, "accuracy"),
    "1 positive in 21, F1": (0.0, 20, "f1"),
}


def retrained(seed: int, loss: str) -> dict[str, float]:
    """Test scores of the playground's classifier in each of ``SITUATIONS``.

    Args:
        seed: of the moons, the split and the noise.
        loss: a name of ``boundary.PULLS``.
    """
    points = boundary.moons(seed)
    features, test = boundary.bumps(points.x), boundary.bumps(points.x_test)
    found = {}
    for situation, (noise, ratio, score) in SITUATIONS.items():
        kept, labels, _ = points.noisy(noise, ratio)
        weights = boundary.fit(features[kept], labels, boundary.PULLS[loss])
        prevalence = float(points.y[kept].mean())
        found[situation] = boundary.scores_of(test @ weights > 0, points.y_test, prevalence)[score]
    return found
