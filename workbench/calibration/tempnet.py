r"""TempNet: a network that predicts a temperature for each prediction, learned by robust loss.

Constrain a distribution over the $K$ classes to be near uniform and let it find the worst margin:

$$\max_{p \in \Delta_K,\; KL(p \| 1/K) \le \rho}\; \sum_k p_k (h_k - h_y) - \tau_0 KL(p \| 1/K)
  = \min_{\tau \ge \tau_0} \tau \log \frac1K \sum_k e^{(h_k - h_y)/\tau} + (\tau - \tau_0)\rho .$$

Up to the constant $\tau_0\rho$ the right side is the loss trained here,

$$\ell(h, y, \tau) = \tau\,CE(h/\tau, y) + (\rho - \log K)\,\tau ,$$

convex in $\tau$. Its slope is $\rho - KL(\mathrm{softmax}(h/\tau) \| 1/K)$: the best temperature
spends the whole budget, $KL = \rho$, that is, every prediction is brought to the entropy
$\log K - \rho$. The label does not occur in that slope: with a frozen base model, labels cannot
teach this loss a temperature.

`TempNet` amortises that minimisation. Input $h/\|h\|$, two linear layers with a sigmoid and
dropout between them give $x \in R^m$, and with $a = \mathrm{softmax}(x / e^s)$

$$\tau = \tau_{\min} + (\tau_{\max} - \tau_{\min})\,\sigma\big(w^\top[(a - 1/m) \odot x] + b\big),
  \qquad w = 1,\; b = 0,\; s = 0 \text{ at the start.}$$

Modes: joint (the base model learns through $h$, TempNet through $\tau$, and $\tau$'s input is
detached) and frozen (only TempNet learns); `tempnet_loss` serves both. The contrastive form,
`RobustContrastiveLoss`, puts the same duality inside the moving averages of SogCLR.

Authors' settings: range [0.5, 5] for GPT-2, [0.01, 2] for LLaMA; $\rho$ 8 to 10 for vocabularies of
32,000 to 50,304 ($\log K$ 10.4 to 10.8, so compare $\rho/\log K$ across vocabularies); a constant
learning rate from 2e-6 (GPT-2, joint) to 2e-4; contrastive $\rho$ 6 to 8, $\gamma$ 0.8, Adam 3e-5
decayed by 0.9 an epoch.

Reference: Qiu, Guo, Xu, Zhao, Zhang and Yang (2024), "To Cool or not to Cool? Temperature Network
Meets Large Foundation Models via DRO", arXiv 2404.04575, and the authors' released code.

*Not included*: gathering features over several GPUs before the contrastive loss, which changes the
batch and not the method; half precision of the released inference class, which is a matter of the
base model; and the encoders of the contrastive experiments, which are the user's.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.lab import checks, train


def robust_loss(
    logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    tau: Float[Tensor, "n 1"],
    rho: float,
) -> Float[Tensor, ""]:
    r"""Mean of $\tau\,CE(h/\tau, y) + (\rho - \log K)\tau$ over the batch.

    Args:
        logits: scores of the base model.
        labels: true classes.
        tau: a positive temperature for every row, shape `(n, 1)` or a scalar.
        rho: radius of the KL ball around the uniform distribution, in nats; useful below log K.

    Returns:
        The loss; with tau = 1 it is the cross-entropy plus the constant rho - log K.

    Raises:
        ValueError: shapes disagree, or a temperature is not positive.

    Reference: Qiu et al. (2024), arXiv 2404.04575, the robust loss of Section 4.
    """
    logits = torch.as_tensor(checks.as_logits(logits))
    n, k = logits.shape
    labels = torch.as_tensor(checks.as_labels(labels, k)).to(logits.device)
    checks.same_length(logits=logits, labels=labels)
    checks.positive(rho, "rho", zero=True)
    tau = torch.as_tensor(tau, dtype=logits.dtype, device=logits.device)
    if tau.shape not in {(n, 1), ()}:
        raise ValueError(f"tau: expected shape ({n}, 1) or a number, got {tuple(tau.shape)}")
    if not bool((tau > 0).all()):
        raise ValueError("tau: expected positive temperatures")
    ce = F.cross_entropy(logits / tau, labels, reduction="none")[:, None]
    return (tau * (ce + rho - math.log(k))).mean()


@torch.no_grad()
def optimal_tau(
    logits: Float[Tensor, "n k"],
    rho: float,
    *,
    tau_min: float = 1e-3,
    tau_max: float = 1e3,
    tol: float = 1e-10,
    max_iter: int = 80,
) -> Float[Tensor, " n"]:
    r"""The temperature that minimises the robust loss, for every row at once.

    Solves $KL(\mathrm{softmax}(h/\tau) \| 1/K) = \rho$, whose left side falls from $\log(K/m)$
    ($m$ classes share the largest logit) at $\tau = 0$ to 0. Newton's steps on $\log KL$ in
    $\log\tau$ (a straight line for large $\tau$), kept inside a shrinking bracket, start at the
    small-variance solution $\tau^2 = \mathrm{var}(h)/2\rho$. The label is no argument, as it does
    not change the minimiser.

    Args:
        logits: one row per prediction.
        rho: positive, in nats.
        tau_min, tau_max: returned where the root lies outside them; a `rho` of log K or more
            gives `tau_min`, a row of equal logits too.
        tol: relative width of the bracket, or the error in KL, at which a row is settled.
        max_iter: bound on the steps; bisection alone needs fewer than 40 for a relative 1e-10.

    Returns:
        tau, shape `(n,)`, dtype and device of the logits; solved in float64.
    """
    logits = torch.as_tensor(checks.as_logits(logits))
    checks.positive(rho, "rho")
    checks.positive(tau_min, "tau_min")
    if not tau_min < tau_max:
        raise ValueError(f"tau_max: expected more than tau_min = {tau_min}, got {tau_max}")
    h = logits.double()
    h = h - h.amax(dim=1, keepdim=True)
    low = h.new_full((len(h),), math.log(tau_min))
    high = h.new_full((len(h),), math.log(tau_max))
    at_min = _kl_and_slope(h, low)[0] <= rho
    at_max = _kl_and_slope(h, high)[0] >= rho
    u = (h.var(dim=1, correction=0) / (2 * rho)).log() / 2
    u = torch.where((u > low) & (u < high), u, (low + high) / 2)
    for _ in range(max_iter):
        kl, slope = _kl_and_slope(h, u)
        gap = kl - rho
        low, high = torch.where(gap > 0, u, low), torch.where(gap > 0, high, u)
        newton = u - (kl / rho).log() * kl / slope
        inside = (newton > low) & (newton < high)
        settled = (gap.abs() <= tol * rho) | (high - low <= tol)
        if bool((settled | at_min | at_max).all()):
            break
        u = torch.where(settled, u, torch.where(inside, newton, (low + high) / 2))
    tau = torch.where(at_min, tau_min, torch.where(at_max, tau_max, u.exp()))
    return tau.to(logits.dtype)


def _kl_and_slope(h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(h / e^u) | uniform) in nats and its derivative in u, minus a variance."""
    scaled = h / u.exp()[:, None]
    logp = scaled.log_softmax(dim=1)
    p = logp.exp()
    mean = (p * scaled).sum(dim=1)
    kl = (p * logp).sum(dim=1) + math.log(h.shape[1])
    return kl, -(p * (scaled - mean[:, None]).square()).sum(dim=1)


class TempNet(nn.Module):
    """Temperature network for a classifier or language model with K outputs.

    Args:
        K: number of classes, the vocabulary for a language model.
        hidden: width of both layers.
        tau_min, tau_max: range of the temperature; the authors' is [0.01, 2] for LLaMA and
            [0.5, 5] for GPT-2. It starts near the middle.
        dropout: between the layers.

    Calling it on logits `(..., K)` returns temperatures `(..., 1)`. Only the direction of the
    logits is seen, so multiplying them changes nothing and adding a constant does. (The released
    inference class subtracts the largest logit first, the training code does not.)
    """

    def __init__(
        self,
        K: int,
        hidden: int = 256,
        tau_min: float = 0.01,
        tau_max: float = 2.0,
        dropout: float = 0.5,
    ):
        super().__init__()
        K, hidden = checks.count(K, "K", minimum=2), checks.count(hidden, "hidden")
        self.tau_min, self.tau_max = _range(tau_min, tau_max)
        self.proj = nn.Sequential(
            nn.Linear(K, hidden), nn.Sigmoid(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.last = _unit_readout(hidden)

    def forward(self, logits: Float[Tensor, "*n k"]) -> Float[Tensor, "*n 1"]:
        """Temperatures of the predictions."""
        if logits.shape[-1] != self.proj[0].in_features:
            raise ValueError(
                f"logits: expected {self.proj[0].in_features} columns, got {tuple(logits.shape)}"
            )
        x = self.proj(F.normalize(logits, dim=-1))
        attention = (x / self.log_scale.exp()).softmax(dim=-1)
        z = self.last((attention - 1 / x.shape[-1]) * x)
        return self.tau_min + (self.tau_max - self.tau_min) * z.sigmoid()


def tempnet_loss(
    tempnet: TempNet, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"], rho: float
) -> Float[Tensor, ""]:
    """Robust loss at TempNet's temperatures, for both modes.

    Joint: pass the base model's logits; it learns through them, and TempNet's input is detached.
    Frozen: pass `logits.detach()`, or logits computed under `torch.no_grad()`.
    """
    return robust_loss(logits, labels, tempnet(logits.detach()), rho)


def fit_tempnet(
    tempnet: TempNet,
    logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    rho: float,
    *,
    lr: float = 2e-4,
    steps: int = 1500,
    batch_size: int = 256,
    seed: int = 0,
) -> train.History:
    """Frozen mode: train TempNet in place with Adam on logits a base model has produced.

    Args:
        logits, labels: predictions on text the base model was not trained on, with what followed.
        rho: radius of the robust loss, below log K.
        seed: of the batches and of dropout.

    Returns:
        The history of the loss; TempNet is left in evaluation mode.
    """
    logits = torch.as_tensor(checks.as_logits(logits)).detach()

    def loss(tau: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return robust_loss(logits, labels, tau, rho)

    data = (logits, logits, torch.as_tensor(checks.as_labels(labels, logits.shape[1])))
    return train.fit(
        tempnet, loss, data, steps=steps, batch_size=batch_size, lr=lr, optimizer="adam",
        seed=seed, bf16=False,
    )  # fmt: skip


class ContrastiveTempNet(nn.Module):
    r"""Temperature network for the embeddings of a contrastive model.

    $v = \mathrm{dropout}(\sigma(Wx + c))$, scores $q_j = v^\top \pi_j/\|\pi_j\|$ of $m$ prototypes,
    $a = \mathrm{softmax}(q / e^s)$ with $e^s = 0.01$ at the start, and
    $\tau = \tau_{\min} + (\tau_{\max} - \tau_{\min})\sigma(w^\top[(a - 1/m) \odot \sigma(q)] + b)$.

    Args:
        d: dimension of the embeddings.
        prototypes: number of prototypes; `init_prototypes` sets them from real embeddings.
    """

    def __init__(
        self,
        d: int,
        prototypes: int = 256,
        tau_min: float = 0.005,
        tau_max: float = 0.05,
        dropout: float = 0.5,
    ):
        super().__init__()
        d, prototypes = checks.count(d, "d"), checks.count(prototypes, "prototypes")
        self.tau_min, self.tau_max = _range(tau_min, tau_max)
        self.proj = nn.Sequential(nn.Linear(d, d), nn.Sigmoid(), nn.Dropout(dropout))
        self.prototypes = nn.Parameter(torch.randn(prototypes, d))
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.01)))
        self.last = _unit_readout(prototypes)

    @torch.no_grad()
    def init_prototypes(self, embeddings: Float[Tensor, "m d"]) -> None:
        """Start from embeddings of the OTHER modality, as the authors do (text for the images)."""
        if embeddings.shape != self.prototypes.shape:
            raise ValueError(
                f"embeddings: expected shape {tuple(self.prototypes.shape)}, "
                f"got {tuple(embeddings.shape)}"
            )
        self.prototypes.copy_(embeddings)

    def forward(self, embeddings: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Temperatures of the embeddings."""
        q = self.proj(embeddings) @ F.normalize(self.prototypes, dim=1).T
        attention = (q / self.log_scale.exp()).softmax(dim=1)
        z = self.last((attention - 1 / q.shape[1]) * q.sigmoid()).squeeze(1)
        return self.tau_min + (self.tau_max - self.tau_min) * z.sigmoid()


class RobustContrastiveLoss(nn.Module):
    r"""Two-way contrastive loss with TempNets inside SogCLR's moving averages.

    For anchor $i$ with similarities $S$, margins $d_{ij} = S_{ij} - S_{ii}$ and temperature
    $\tau_i$, a running estimate of the normaliser is kept for every training sample (the first
    visit sets it), $s_i \leftarrow (1-\gamma)s_i + \gamma\sum_{j\ne i} e^{d_{ij}/\tau_i}$. The
    encoders get the gradient of $\sum_j w_{ij}d_{ij}$ with $w_{ij} = e^{d_{ij}/\tau_i}/s_i$ held
    fixed, and TempNet that of $\tau_i$ times the fixed slope
    $\log\frac{s_i}{B-1} + \rho - \sum_j w_{ij} d_{ij}/\tau_i$.

    Args:
        n: number of training samples; each carries two running normalisers.
        d: dimension of the embeddings.
        rho: KL radius; the authors use 6 to 8.
        gamma: weight of the present batch in the moving average.

    `image_tempnet` and `text_tempnet` may be replaced, for instance with another range.
    """

    def __init__(self, n: int, d: int, *, rho: float = 8.0, gamma: float = 0.8):
        super().__init__()
        n = checks.count(n, "n")
        self.rho = checks.positive(rho, "rho", zero=True)
        self.gamma = checks.fraction(gamma, "gamma", zero=False)
        self.image_tempnet, self.text_tempnet = ContrastiveTempNet(d), ContrastiveTempNet(d)
        # The normaliser is kept as s * e^shift, with a shift that only grows, against overflow.
        self.register_buffer("total", torch.zeros(2, n))
        self.register_buffer("shift", torch.zeros(2, n))
        self.register_buffer("seen", torch.zeros(2, n, dtype=torch.bool))

    def forward(
        self, images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], ids: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Losses of the encoders and of the TempNets; add them and call backward once.

        Args:
            images, texts: L2-normalised embeddings; row i of both belong together.
            ids: index of each pair in the training set, without repetition.
        """
        if images.shape != texts.shape or images.ndim != 2 or len(images) < 2:
            raise ValueError(
                "images, texts: expected equal shapes (b, d) with b >= 2, got "
                f"{tuple(images.shape)}, {tuple(texts.shape)}"
            )
        ids = checks.as_labels(ids, self.total.shape[1], "ids")
        checks.same_length(images=images, ids=ids)
        similarity = images @ texts.T
        sides = [
            self._side(0, similarity, self.image_tempnet(images.detach()), ids),
            self._side(1, similarity.T, self.text_tempnet(texts.detach()), ids),
        ]
        return sides[0][0] + sides[1][0], sides[0][1] + sides[1][1]

    def _side(self, side: int, similarity: Tensor, tau: Tensor, ids: Tensor):
        margins = similarity - similarity.diagonal()[:, None]
        with torch.no_grad():
            scaled = margins / tau[:, None]
            old = self.shift[side, ids]
            shift = torch.maximum(old, scaled.amax(dim=1))
            terms = (scaled - shift[:, None]).exp().fill_diagonal_(0)
            now = terms.sum(dim=1)
            before = self.total[side, ids] * (old - shift).exp()
            mixed = (1 - self.gamma) * before + self.gamma * now
            total = torch.where(self.seen[side, ids], mixed, now)
            self.total[side, ids], self.shift[side, ids] = total, shift
            self.seen[side, ids] = True
            total = total.clamp(min=1e-14)
            weights = terms / total[:, None]
            normaliser = (total / (len(ids) - 1)).log() + shift
            slope = normaliser + self.rho - (weights * scaled).sum(dim=1)
        return (weights * margins).sum(dim=1).mean(), (slope * tau).mean()


def _range(tau_min: float, tau_max: float) -> tuple[float, float]:
    checks.positive(tau_min, "tau_min")
    if not tau_min < tau_max:
        raise ValueError(f"tau_max: expected more than tau_min = {tau_min}, got {tau_max}")
    return tau_min, tau_max


def _unit_readout(width: int) -> nn.Linear:
    """Linear layer to one number that starts as a plain sum."""
    layer = nn.Linear(width, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
