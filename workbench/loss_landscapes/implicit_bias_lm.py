r"""Models with the same, minimal pre-training loss differ: in flatness, and in what they transfer.

A language model that predicts the true conditionals $p^*(y\mid x)$ cannot lower its loss, yet its
parameters are not determined: solutions form a manifold $\Gamma$. Targets stay random given their
context, so stochastic gradients never vanish on $\Gamma$, and SGD drifts along it. At the minimum
the noise has the covariance of the Hessian, which there equals the Fisher information, so that

$$\operatorname{tr} H = E_x\,E_{y\sim p_\theta(\cdot\mid x)}
  \|\nabla_\theta\log p_\theta(y\mid x)\|^2, \qquad
  \frac{d\theta}{dT} = -\nabla_\Gamma\,\tfrac14\operatorname{tr}H(\theta),
  \qquad T = \eta^2\,\text{steps} / \text{batch}.$$

The paper pre-trains masked language models on generated languages, whose conditionals are known,
and reaches the minimum in three ways: train on after convergence, take a larger model, or replace
the model by a look-up table of the true conditionals. Among these, a smaller trace goes with better
downstream accuracy. Here the language is a hidden Markov model (`HMMLanguage`) small enough to list
every masked sentence, so that loss, minimum and distance between them are exact.

Reference: Liu, Xie, Li and Ma (2022), "Same Pre-training Loss, Better Downstream: Implicit Bias
Matters for Language Models", arXiv 2210.14199 (ICML 2023); released code
Liuhong99/implicitbiasmlmcode, which estimates the trace by Hutchinson's method with the data's
labels and compares sizes by viewing a small transformer as a large one (`enlarge`).

*Not included*: the PCFG and the OPT-generated corpora with BERT-sized models (weeks of GPU time),
fine-tuning of all weights downstream (the paper reports linear probes beside it), and the second
theorem's construction of a two-feature and a random-feature solution, whose encoding is defined in
the paper's appendix only; `rescale_features` gives exact twins of any model instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.lab import checks
from workbench.loss_landscapes.hmm_language import Contexts, HMMLanguage
from workbench.loss_landscapes.masked_lm import (
    MaskedLM,
    enlarge,
    is_matrix,
    pretrain,
    rescale_features,
)

__all__ = [
    "Contexts", "FisherTrace", "HMMLanguage", "MaskedLM", "enlarge", "flatten_sgd",
    "hessian_trace_fisher", "pretrain", "probe", "rescale_features", "toy_flow", "toy_logits",
]  # fmt: skip

# --- flatness ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FisherTrace:
    """Trace of the Fisher information: the Hessian's, where the model predicts the truth.

    Attributes:
        value: the trace.
        error: its standard error over contexts and drawn words; 0 if nothing was drawn.
        parts: share of each parameter tensor; they sum to ``value``.
    """

    value: float
    error: float
    parts: dict[str, float]

    def enlarged(self, times: float) -> float:
        """The trace of the same function written ``times`` as wide (see `enlarge`), in closed form.

        Copies split every gradient, so vectors and tables lose a factor ``times``, matrices between
        copies keep theirs, and the output layer, which reads all copies, gains it.
        """
        factors = {"head.weight": times, "head.bias": 1.0}
        return sum(
            part * factors.get(name, 1.0 if is_matrix(name) else 1 / times)
            for name, part in self.parts.items()
        )

    def rescaled(self, scale: float) -> float:
        """The trace of the twin that `rescale_features` makes with one scale, in closed form."""
        norm = self.parts["norm.weight"] + self.parts["norm.bias"]
        head = self.parts["head.weight"]
        return self.value + (scale**2 - 1) * head + (scale**-2 - 1) * norm


def hessian_trace_fisher(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    weights: Float[Tensor, " m"] | None = None,
    draws: int | None = 1,
    generator: torch.Generator | int | None = None,
    chunk: int = 256,
) -> FisherTrace:
    r"""$E_x\,E_{y\sim p_\theta(\cdot\mid x)}\|\nabla_\theta\log p_\theta(y\mid x)\|^2$.

    It equals the trace of the Hessian of the loss where the model's predictions are the true
    conditionals, and only there: elsewhere the Hessian has a second term. One backward pass an
    example and draw; no second derivatives.

    Args:
        model: ``model(*inputs)`` gives logits (m, v), row by row.
        inputs: tensors with m rows.
        weights: of the rows; default equal.
        draws: words drawn from the model for each row; None takes the expectation over all words.
        generator: of the draws.
        chunk: rows whose gradients are held at once.

    Raises:
        ValueError: the model gives no logits (m, v), or the rows do not match.

    Reference: Liu et al. (2022), arXiv 2210.14199, trace of the Hessian at the minimum.
    """
    m = checks.same_length(**{f"inputs[{i}]": x for i, x in enumerate(inputs)})
    w = torch.full((m,), 1 / m) if weights is None else weights / weights.sum()
    checks.same_length(inputs=inputs[0], weights=w)
    g = checks.as_generator(generator, device=inputs[0].device)
    held = {q: p.detach() for q, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(*inputs)
    if logits.ndim != 2:
        raise ValueError(f"model: expected logits (m, v), got shape {tuple(logits.shape)}")
    probs = logits.softmax(1)
    if draws is None:
        words = torch.arange(probs.shape[1], device=probs.device).expand(m, -1)
        share = probs
    else:
        words = torch.multinomial(probs, checks.count(draws, "draws"), True, generator=g)
        share = torch.full_like(words, 1 / draws, dtype=probs.dtype)

    def log_prob(parameters: dict[str, Tensor], word: Tensor, *row: Tensor) -> Tensor:
        out = functional_call(model, parameters, tuple(x[None] for x in row))
        return out[0].log_softmax(0).gather(0, word[None])[0]

    one_row = vmap(grad(log_prob), (None, 0, *[None] * len(inputs)))
    score = vmap(one_row, (None, 0, *[0] * len(inputs)))
    norms: dict[str, list[Tensor]] = {q: [] for q in held}
    for rows in torch.arange(m).split(chunk):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
            found = score(held, words[rows], *(x[rows] for x in inputs))
        for q, value in found.items():
            norms[q].append((value.flatten(2).square().sum(2) * share[rows]).sum(1))
    each = {q: torch.cat(parts) for q, parts in norms.items()}
    total = torch.stack(list(each.values())).sum(0)
    w = w.to(total)
    value = float(w @ total)
    error = 0.0 if draws is None else float((w.square() @ (total - value).square()).sqrt())
    return FisherTrace(value, error, {q: float(w @ part) for q, part in each.items()})


def probe(
    features: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    *,
    weights: Float[Tensor, " m"] | None = None,
    count: int = 50,
    repeats: int = 10,
    C: float = 1.0,
    random_state: np.random.Generator | int | None = None,
) -> float:
    """Accuracy of a linear classifier of the features that saw a few labels.

    Features are standardised with the labelled rows, so that their scale, which a model may choose
    freely without changing a prediction (`rescale_features`), does not act as regularisation.

    Args:
        features: (m, d), as the model gives them.
        labels: (m,) classes.
        weights: probability of each row; default equal. Labelled rows are drawn with it and the
            accuracy is the mean over all rows with it.
        count: labelled rows.
        repeats: independent draws of them that are averaged.
        C: inverse strength of the L2 penalty of scikit-learn's logistic regression.
        random_state: of the draws.
    """
    x = np.asarray(checks.to_numpy(checks.as_floats(features, "features", ndim=2)), float)
    y = np.asarray(checks.to_numpy(checks.as_labels(labels)))
    p = np.ones(len(x)) if weights is None else checks.to_numpy(weights).astype(float)
    checks.same_length(features=x, labels=y, weights=p)
    rng, p = checks.as_rng(random_state), p / p.sum()
    found = []
    for _ in range(checks.count(repeats, "repeats")):
        rows = rng.choice(len(x), checks.count(count, "count", minimum=2), p=p)
        if len(np.unique(y[rows])) == 1:
            found.append(p[y == y[rows[0]]].sum())
            continue
        line = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500))
        line.fit(x[rows], y[rows])
        found.append(p[line.predict(x) == y].sum())
    return float(np.mean(found))


# --- the drift ---------------------------------------------------------------------------------


def flatten_sgd(
    logits: Callable[..., Tensor],
    theta: Float[Tensor, "r D"],
    targets: Float[Tensor, "m v"],
    inputs: tuple[Tensor, ...] = (),
    *,
    lr: float,
    steps: int,
    weights: Float[Tensor, " m"] | None = None,
    batch: int = 1,
    every: int = 1,
    generator: torch.Generator | int | None = None,
) -> Float[Tensor, "s r D"]:
    r"""SGD at the minimum: words drawn afresh at every step, no momentum, a constant rate.

    Near the minimum its mean path follows $-\nabla_\Gamma\frac14\operatorname{tr}H$ on the time
    scale ``batch / lr**2``.

    Args:
        logits: ``logits(theta, *rows)`` maps one parameter vector (D,) and rows of the inputs to
            logits (rows, v); without inputs, ``logits(theta)`` to (1, v).
        theta: (r, D) starting points; each runs on its own words.
        targets: (m, v) true conditionals of the m rows.
        inputs: tensors with m rows.
        lr: learning rate.
        steps: how many.
        weights: probability of each row; default equal.
        batch: words a step.
        every: keep the parameters after so many steps.
        generator: of rows and words.

    Returns:
        Parameters (s, r, D), the first entry the start.

    Reference: Liu et al. (2022), arXiv 2210.14199, theorem on SGD in the saturation regime; Li,
    Wang and Arora (2021), arXiv 2110.06914, for the limit of label-noise SGD.
    """
    eta, b = checks.positive(lr, "lr"), checks.count(batch, "batch")
    theta = checks.as_floats(theta, "theta", ndim=2)
    rows = torch.ones(len(targets)) if weights is None else weights
    checks.same_length(targets=targets, weights=rows, **dict(zip("ab", inputs, strict=False)))
    g = checks.as_generator(generator)

    def loss(parameters: Tensor, words: Tensor, *part: Tensor) -> Tensor:
        out = logits(parameters, *part).expand(len(words), -1)
        return F.cross_entropy(out, words)

    step = vmap(grad(loss))
    kept = [theta]
    for i in range(checks.count(steps, "steps")):
        chosen = torch.multinomial(rows, len(theta) * b, True, generator=g)
        words = torch.multinomial(targets[chosen], 1, generator=g).reshape(len(theta), b)
        part = [x[chosen].reshape(len(theta), b, *x.shape[1:]) for x in inputs]
        theta = theta - eta * step(theta, words, *part)
        if (i + 1) % every == 0:
            kept.append(theta)
    return torch.stack(kept)


def toy_logits(theta: Float[Tensor, " 2"]) -> Float[Tensor, "1 2"]:
    r"""Two parameters, two words: $p(1)=\sigma(uv)$."""
    score = theta[0] * theta[1]
    return torch.stack([torch.zeros_like(score), score])[None]


def toy_flow(
    u: float, v: float, lr: float, steps: Any, *, batch: int = 1
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    r"""Where the flow along $uv=c$ takes the toy: $u^2-v^2$ decays as $e^{-\sigma'(c)T}$.

    On the manifold $\operatorname{tr}H=\sigma'(c)(u^2+v^2)$, whose gradient along it gives
    $\frac{d}{dT}(u^2-v^2)=-\sigma'(c)(u^2-v^2)$ with $T=\eta^2\,\text{steps}/\text{batch}$.

    Args:
        u, v: start, of one sign of the product.
        lr: learning rate.
        steps: when to look.
        batch: words a step.

    Returns:
        u and v at ``steps``, float64, with the signs of the start.
    """
    start = torch.tensor([u, v], dtype=torch.float64)
    c = start.prod()
    rate = torch.sigmoid(c) * torch.sigmoid(-c)
    time = torch.as_tensor(steps, dtype=torch.float64) * lr**2 / checks.count(batch, "batch")
    gap = (start[0] ** 2 - start[1] ** 2) * torch.exp(-rate * time)
    total = torch.sqrt(gap**2 + 4 * c**2)
    return (
        start[0].sign() * ((total + gap) / 2).sqrt(),
        start[1].sign() * ((total - gap) / 2).sqrt(),
    )
