r"""Correctness-aware calibration: one temperature per sample, taught by right and wrong.

A classifier gives logits $z_i$ and predicts $\hat y_i = \arg\max_k z_{ik}$; that prediction is
never touched. A small network $g$ reads features $v_i$ of the sample and returns a temperature,

$$p_i = \mathrm{softmax}\big(z_i / g(v_i)\big), \qquad g(v) \in [t_{\min}, t_{\max}],$$

and is trained so that the confidence $\max_k p_{ik}$ is near 1 where the prediction is correct and
near 0 where it is wrong:

$$L_{CA} = \frac{\sum_i w_i\,\big(\max_k p_{ik} - 1[\hat y_i = y_i]\big)^2}{\sum_i w_i}.$$

The paper states it with $w_i = 1$. The authors' code sets $w_i = 1-\pi$ for correct and $w_i = \pi$
for wrong predictions, $\pi$ the accuracy of the batch, so that both groups weigh the same
(`balance=True`). The two are different targets: with features that tell nothing apart, the first
is minimised by the confidence $\pi$, the second by $1/2$.

Cross-entropy, which the paper argues against, pulls on the temperature through the true class
even when the prediction is another class and stays so; `temperature_gradients` shows both pulls.

Features (`view_features`): softmax scores of transformed copies of the input (the authors use
rotation, grey and colour jitter), read at the positions of the ORIGINAL input's top four classes.

Reference: Liu, Wang, Zou, Zou and Zheng (2024), "Optimizing Calibration by Gaining Aware of
Prediction Correctness", arXiv 2404.13016, and the authors' released code for network, optimiser
and weights.

*Not included*: the second head of the authors' network, a correctness classifier with a
cross-entropy of its own, because its loss is computed there and never added to the training loss;
and the image transforms, which belong to the user's data.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.lab import checks, train

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def ca_loss(
    probs: Float[Tensor, "n k"],
    pred: Int[Tensor, " n"],
    labels: Int[Tensor, " n"],
    *,
    balance: bool = False,
) -> Float[Tensor, ""]:
    r"""Weighted squared distance between confidence and correctness, $L_{CA}$ above.

    Args:
        probs: calibrated probabilities, rows sum to one.
        pred: the classifier's own prediction, fixed before calibration.
        labels: true classes.
        balance: weigh correct and wrong predictions equally as groups (the authors' code), which
            makes the loss the plain average of the two groups' mean squared errors. A batch with
            one group only falls back to equal weights, where the released code divides by zero.

    Returns:
        The loss, a scalar in [0, 1].

    Raises:
        ValueError: shapes disagree, a row is no distribution, or a class is out of range.

    Reference: Liu et al. (2024), arXiv 2404.13016, the correctness-aware loss.
    """
    probs = torch.as_tensor(checks.as_probs(probs))
    labels = _classes(labels, probs, "labels")
    pred = _classes(pred, probs, "pred")
    correct = (pred == labels).to(probs.dtype)
    error = (probs.amax(dim=1) - correct).square()
    if not balance:
        return error.mean()
    accuracy = correct.mean()
    weight = correct * (1 - accuracy) + (1 - correct) * accuracy
    weight = torch.where(accuracy * (1 - accuracy) > 0, weight, torch.ones_like(weight))
    return (weight * error).sum() / weight.sum()


def view_features(
    views: Float[Tensor, "v n k"],
    *,
    topk: int = 4,
    original: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, "n v*topk"]:
    """Softmax scores of every view at the positions of the original input's top classes.

    Args:
        views: logits of the V versions of each input.
        topk: how many classes of the original are read, best first.
        original: logits that choose the positions. By default `views[0]`, which then contributes
            its own sorted scores as well; the authors' code passes it apart and leaves it out.

    Returns:
        Features in [0, 1]; columns `j * topk : (j + 1) * topk` belong to view j.

    Raises:
        ValueError: fewer classes than `topk`, or shapes that disagree.
    """
    views = torch.as_tensor(checks.as_floats(views, "views", ndim=3))
    original = torch.as_tensor(
        checks.as_logits(views[0] if original is None else original, "original")
    )
    if original.shape != views.shape[1:]:
        raise ValueError(
            f"original: expected shape {tuple(views.shape[1:])} as in views, "
            f"got {tuple(original.shape)}"
        )
    v, n, k = views.shape
    if not 1 <= topk <= k:
        raise ValueError(f"topk: expected 1 to {k}, the number of classes, got {topk}")
    where = original.topk(topk, dim=1).indices.expand(v, n, topk)
    scores = views.softmax(dim=2).gather(2, where)
    return scores.transpose(0, 1).reshape(n, v * topk)


class CAcalibrator(nn.Module):
    r"""The network $g$: Linear(d_in, hidden), ReLU, Linear(hidden, 1), clamped.

    Args:
        d_in: number of features, `views * topk`.
        hidden: width; the authors' code has 5.
        t_min, t_max: range of the temperature; the clamp has no gradient outside it.
        t_init: bias of the last layer at the start, so that training begins near this temperature.
            None keeps the framework's random bias as in the released code; the first temperature
            is then often below `t_min` for every sample, where no gradient ever frees it.

    Calling it on features `(n, d_in)` returns temperatures `(n,)`.
    """

    def __init__(
        self,
        d_in: int,
        hidden: int = 5,
        t_min: float = 0.1,
        t_max: float = 10.0,
        t_init: float | None = 1.0,
    ):
        super().__init__()
        d_in, hidden = checks.count(d_in, "d_in"), checks.count(hidden, "hidden")
        checks.positive(t_min, "t_min")
        if not t_min < t_max:
            raise ValueError(f"t_max: expected more than t_min = {t_min}, got {t_max}")
        self.t_min, self.t_max = t_min, t_max
        self.net = nn.Sequential(nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if t_init is not None:
            nn.init.constant_(self.net[2].bias, t_init)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Temperatures of the samples."""
        if features.ndim != 2 or features.shape[1] != self.net[0].in_features:
            raise ValueError(
                f"features: expected shape (n, {self.net[0].in_features}), "
                f"got {tuple(features.shape)}"
            )
        return self.net(features).squeeze(1).clamp(self.t_min, self.t_max)

    def scale(
        self, logits: Float[Tensor, "n k"], features: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n k"]:
        """Logits divided by each sample's temperature; the order of classes stays."""
        return logits / self(features)[:, None]


def ca_objective(scaled: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
    """`ca_loss` of scaled logits, as the paper states it."""
    return ca_loss(scaled.softmax(dim=1), pred, labels)


def balanced_objective(scaled: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
    """`ca_loss` of scaled logits with groups of equal weight, as the authors' code has it."""
    return ca_loss(scaled.softmax(dim=1), pred, labels, balance=True)


def fit_calibrator(
    calibrator: CAcalibrator,
    logits: Float[Tensor, "n k"],
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    objective: Objective = ca_objective,
    lr: float = 1e-4,
    batch_size: int = 1000,
    epochs: int = 10,
    seed: int = 0,
) -> train.History:
    """Train the calibrator in place with Adam on held-out logits, features and labels.

    The defaults are the authors' (50,000 ImageNet validation logits, hence 500 steps, which move
    each weight by 0.05 at most; a smaller set wants more epochs or a higher rate). Use samples the
    classifier was not trained on: on its training set nearly all predictions are correct.

    Args:
        objective: `objective(scaled_logits, pred, labels)`; any other loss makes a baseline with
            the same network, inputs and optimiser.
        seed: of the order of the batches. Rows that fill no whole batch wait for the next epoch.

    Returns:
        The history of the loss; the calibrator is left in evaluation mode.
    """
    logits = torch.as_tensor(checks.as_logits(logits)).detach()
    labels = _classes(labels, logits, "labels")
    features = torch.as_tensor(checks.as_floats(features, "features", ndim=2)).detach()
    checks.same_length(logits=logits, features=features)

    def loss(temperature: Tensor, logits: Tensor, pred: Tensor, labels: Tensor) -> Tensor:
        return objective(logits / temperature[:, None], pred, labels)

    data = (features, logits, logits.argmax(dim=1), labels)
    return train.fit(
        calibrator, loss, data, epochs=epochs, batch_size=batch_size, lr=lr, optimizer="adam",
        seed=seed, bf16=False,
    )  # fmt: skip


def temperature_gradients(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"], temperature: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    r"""Derivative in T of the cross-entropy and of the (unweighted) correctness-aware loss.

    With $p = \mathrm{softmax}(z/T)$, $\bar z = \sum_k p_k z_k$ and $m = \arg\max_k z_k$,

    $$\frac{dL_{CE}}{dT} = \frac{z_y - \bar z}{T^2}, \qquad
      \frac{dL_{CA}}{dT} = -2\,\big(p_m - 1[m = y]\big)\,p_m\,\frac{z_m - \bar z}{T^2}.$$

    The second never has the wrong sign: raising T lowers the confidence of a wrong prediction. The
    first does whenever a wrong prediction is narrow enough for $z_y > \bar z$.

    Args:
        logits: one row per sample.
        labels: true classes.
        temperature: positive, one per sample or a scalar.

    Returns:
        (cross-entropy, correctness-aware), one derivative per sample.
    """
    logits = torch.as_tensor(checks.as_logits(logits))
    labels = _classes(labels, logits, "labels")
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    if not bool((temperature > 0).all()):
        raise ValueError("temperature: expected positive numbers")
    temperature = temperature.expand(len(logits))
    probs = (logits / temperature[:, None]).softmax(dim=1)
    mean = (probs * logits).sum(dim=1)
    top, pred = logits.max(dim=1)
    confidence = probs.amax(dim=1)
    correct = (pred == labels).to(logits.dtype)
    ce = (logits.gather(1, labels[:, None]).squeeze(1) - mean) / temperature.square()
    ca = -2 * (confidence - correct) * confidence * (top - mean) / temperature.square()
    return ce, ca


def _classes(values: Tensor, scores: Tensor, name: str) -> Tensor:
    """Class indices, one for each row of scores, on the same device."""
    classes = torch.as_tensor(checks.as_labels(values, scores.shape[1], name))
    checks.same_length(**{"probs or logits": scores, name: classes})
    return classes.to(scores.device)
