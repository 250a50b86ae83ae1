r"""One law of two sizes: how an encoder and a decoder share the loss of a translation model.

With $N_e$ and $N_d$ parameters in encoder and decoder (embeddings and output layer not counted) the
loss of a translation model is

$$\hat L(N_e, N_d) = \alpha \Big(\frac{\bar N_e}{N_e}\Big)^{p_e}
  \Big(\frac{\bar N_d}{N_d}\Big)^{p_d} + L_\infty ,$$

where $\bar N_e, \bar N_d$ are those of a model of reference, so that $\alpha$ is what this model
could still gain. A budget $B = N_e + N_d$ is best spent in proportion to the exponents,

$$N_e^* = \frac{p_e}{p_e + p_d} B, \qquad N_d^* = \frac{p_d}{p_e + p_d} B, \qquad
  L^*(B) = \alpha^* B^{-(p_e + p_d)} + L_\infty,$$

and any other share costs a factor of the reducible loss that does not depend on the budget
(`split_penalty`). `Seq2Seq` is a stack of small encoder-decoder transformers, trained side by side.

Reference: Ghorbani, Firat, Freitag, Bapna, Krikun, Garcia, Chelba and Cherry (2021), "Scaling Laws
for Neural Machine Translation", arXiv 2109.07740.

*Not included*: translation quality (BLEU) against loss, which needs real text, and training on the
outputs of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import least_squares
from torch import Tensor, nn

from workbench.lab import checks
from workbench.scaling_laws.fit import LawFit, fit_law
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.table import prepare

Array = np.ndarray[Any, np.dtype[np.float64]]
_EXPONENTS = (1e-6, 10.0)


@dataclass(frozen=True)
class NmtLaw:
    """The law's constants, all positive.

    Attributes:
        alpha: reducible loss of the reference model, in nats a word.
        p_e, p_d: exponents of encoder and decoder.
        L_inf: loss that no model passes.
        Ne_ref, Nd_ref: parameters of the reference model.
    """

    alpha: float
    p_e: float
    p_d: float
    L_inf: float
    Ne_ref: float = 1.0
    Nd_ref: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            checks.positive(value, name, zero=name == "L_inf")


# --- the law and its best split -------------------------------------------------------------------


def loss_at(Ne: Any, Nd: Any, law: NmtLaw) -> Array:
    r"""Loss of a model, $\alpha (\bar N_e/N_e)^{p_e} (\bar N_d/N_d)^{p_d} + L_\infty$.

    Args:
        Ne: encoder parameters without embeddings; broadcasts with ``Nd``.
        Nd: decoder parameters without embeddings and output layer.
        law: the constants.

    Returns:
        Nats a word.

    Raises:
        ValueError: a size is not positive.

    Reference: Ghorbani et al. (2021), arXiv 2109.07740, the bivariate law.
    """
    Ne, Nd = _sizes(Ne, "Ne"), _sizes(Nd, "Nd")
    power = (law.Ne_ref / Ne) ** law.p_e * (law.Nd_ref / Nd) ** law.p_d
    return np.asarray(law.alpha * power + law.L_inf)


def decoder_for(loss: Any, Ne: Any, law: NmtLaw) -> Array:
    """Decoder parameters that reach a loss with a given encoder: the law solved for N_d.

    In logarithms of both sizes these iso-loss contours are straight lines of slope -p_e / p_d.

    Raises:
        ValueError: a loss is not above ``law.L_inf``.
    """
    excess = np.asarray(loss, float) - law.L_inf
    if not (excess > 0).all():
        raise ValueError(f"loss: expected values above the irreducible loss {law.L_inf:g}")
    power = law.alpha / excess * (law.Ne_ref / _sizes(Ne, "Ne")) ** law.p_e
    return np.asarray(law.Nd_ref * power ** (1 / law.p_d))


def optimal_split(p_e: float, p_d: float) -> float:
    r"""Share of the budget that the encoder should have, $p_e / (p_e + p_d)$.

    It makes both sizes' marginal gains equal: at the optimum $p_e / N_e = p_d / N_d$.

    Reference: Ghorbani et al. (2021), arXiv 2109.07740, optimal allocation.
    """
    p_e, p_d = checks.positive(p_e, "p_e"), checks.positive(p_d, "p_d")
    return p_e / (p_e + p_d)


def split_penalty(share: Any, p_e: float, p_d: float) -> Array:
    r"""Reducible loss at a share r for the encoder, over that at the best share, at any budget.

    $\Big(\frac{r^*}{r}\Big)^{p_e} \Big(\frac{1 - r^*}{1 - r}\Big)^{p_d} \ge 1$ with
    $r^* = p_e / (p_e + p_d)$.

    Raises:
        ValueError: a share is not between 0 and 1.
    """
    r = np.asarray(share, float)
    if not ((r > 0) & (r < 1)).all():
        raise ValueError("share: expected numbers between 0 and 1, both excluded")
    best = optimal_split(p_e, p_d)
    return np.asarray((best / r) ** p_e * ((1 - best) / (1 - r)) ** p_d)


def loss_at_budget(budget: Any, law: NmtLaw, share: Any = None) -> Array:
    r"""Loss of $N_e + N_d = B$ parameters, split in the best way or at a given encoder's share.

    In the best way this is the univariate law $\alpha^* B^{-(p_e + p_d)} + L_\infty$ with
    $\alpha^* = \alpha (\bar N_e / r^*)^{p_e} (\bar N_d / (1 - r^*))^{p_d}$.

    Args:
        budget: parameters of both sides; broadcasts with ``share``.
        law: the constants.
        share: of the encoder; `optimal_split` where None.
    """
    r = np.asarray(optimal_split(law.p_e, law.p_d) if share is None else share, float)
    if not ((r > 0) & (r < 1)).all():
        raise ValueError("share: expected numbers between 0 and 1, both excluded")
    B = _sizes(budget, "budget")
    return loss_at(r * B, (1 - r) * B, law)


def budget_for(loss: Any, law: NmtLaw, share: float | None = None) -> Array:
    """Parameters that reach a loss at a given split (the best one by default)."""
    excess = np.asarray(loss, float) - law.L_inf
    if not (excess > 0).all():
        raise ValueError(f"loss: expected values above the irreducible loss {law.L_inf:g}")
    one = float(loss_at_budget(1.0, law, share)) - law.L_inf
    return np.asarray((one / excess) ** (1 / (law.p_e + law.p_d)))


def _sizes(value: Any, name: str) -> Array:
    array = np.asarray(value, float)
    if not (array > 0).all():
        raise ValueError(f"{name}: expected positive numbers of parameters")
    return array


# --- estimation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NmtFit:
    """A fitted law.

    Attributes:
        law: the constants.
        r2: share of the variance of the losses explained.
        draws: bootstrap draws of alpha, p_e, p_d and L_inf; empty without a bootstrap.
        fit: the fit of the family's core, in sizes relative to the reference model.
    """

    law: NmtLaw
    r2: float
    draws: pd.DataFrame = field(repr=False)
    fit: LawFit = field(repr=False)


def fit_bivariate(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    reference: tuple[float, float] | None = None,
    objective: Any = "lsq",
    **options: Any,
) -> NmtFit:
    """Fit the law to a table of models, from many starts.

    Args:
        runs: one row a model.
        columns: which columns hold ``Ne``, ``Nd`` and ``loss`` where they are called otherwise.
        reference: parameters of encoder and decoder of the reference model; defaults to the
            geometric means of the table. It rescales alpha and changes no prediction.
        objective: "lsq", "lsq_log" or "huber_log", as of `fit.fit_law`. The paper's own is
            `fit_soft_l1`.
        **options: more of `fit.fit_law`, such as ``bootstrap`` or ``starts``.

    Raises:
        ValueError: a column is missing or not positive, or one size does not vary.
    """
    table = prepare(runs, LAWS["nmt"], columns).frame
    Ne_ref, Nd_ref = _reference(table, reference)
    relative = table.assign(Ne=table.Ne / Ne_ref, Nd=table.Nd / Nd_ref)
    fit = fit_law(
        relative, "nmt", objective=objective,
        **{"bounds": {"p_e": _EXPONENTS, "p_d": _EXPONENTS}, "quiet": True, **options},
    )  # fmt: skip
    names = {"A": "alpha", "E": "L_inf"}
    constants = {names.get(q, q): v for q, v in fit.params.items()}
    residual = fit.frame.predicted - fit.frame.loss
    r2 = 1 - float((residual**2).sum() / ((fit.frame.loss - fit.frame.loss.mean()) ** 2).sum())
    law = NmtLaw(**constants, Ne_ref=Ne_ref, Nd_ref=Nd_ref)
    return NmtFit(law, r2, fit.draws.rename(columns=names), fit)


def fit_soft_l1(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    reference: tuple[float, float] | None = None,
    scale: float = 0.01,
    start: tuple[float, float, float, float] = (0.2, 0.4, 0.6, 1.0),
) -> NmtLaw:
    r"""Fit the law as the paper's listing does: scipy, soft L1 of the residuals, one start.

    Minimises $\sum_i s^2 \rho(r_i^2 / s^2)$ with $\rho(z) = 2(\sqrt{1 + z} - 1)$ and residuals
    r in nats, all four constants between 0 and 10.

    Args:
        runs: as for `fit_bivariate`.
        columns: as for `fit_bivariate`.
        reference: as for `fit_bivariate`.
        scale: residual s beyond which deviations count linearly, in nats.
        start: of alpha, p_e, p_d and L_inf; the paper's.

    Reference: Ghorbani et al. (2021), arXiv 2109.07740, appendix on curve fitting.
    """
    table = prepare(runs, LAWS["nmt"], columns).frame
    Ne_ref, Nd_ref = _reference(table, reference)
    x_e, x_d, loss = (q.to_numpy() for q in (Ne_ref / table.Ne, Nd_ref / table.Nd, table.loss))
    found = least_squares(
        lambda q: q[0] * x_e ** q[1] * x_d ** q[2] + q[3] - loss, start, loss="soft_l1",
        f_scale=checks.positive(scale, "scale"), max_nfev=10_000, bounds=(0, 10),
    )  # fmt: skip
    alpha, p_e, p_d, L_inf = (float(v) for v in found.x)
    return NmtLaw(alpha, p_e, p_d, L_inf, Ne_ref, Nd_ref)


def fit_total(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    objective: Any = "lsq",
    **options: Any,
) -> LawFit:
    """Fit the univariate law in all parameters, ``E + A (Ne + Nd)^-alpha``: the baseline.

    Predict with ``fit.predict(x=Ne + Nd)``. Arguments are those of `fit_bivariate`.
    """
    table = prepare(runs, LAWS["nmt"], columns).frame
    table = table.assign(x=table.Ne + table.Nd)
    return fit_law(
        table, "power", objective=objective,
        **{"bounds": {"alpha": _EXPONENTS}, "quiet": True, **options},
    )  # fmt: skip


def _reference(table: pd.DataFrame, reference: tuple[float, float] | None) -> tuple[float, float]:
    if reference is None:
        return float(np.exp(np.log(table.Ne).mean())), float(np.exp(np.log(table.Nd).mean()))
    return checks.positive(reference[0], "reference"), checks.positive(reference[1], "reference")


# --- a stack of small translation models ----------------------------------------------------------


class Layer(nn.Module):
    """One pre-norm transformer layer of several models at once, each with weights of its own.

    Norms have no parameters: a scale would only repeat that of the projection behind them.

    Args:
        models: how many.
        d: width of the residual stream.
        heads: of each attention.
        ratio: hidden units of the MLP per unit of d.
        scale: of what is written to the stream at the start, such as 1 / sqrt(2 layers).
        memory: width of the encoder that a decoder's layer looks at; such a layer does not see
            later positions of its own.
    """

    def __init__(
        self, models: int, d: int, heads: int, ratio: int, scale: float, memory: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.memory = heads, memory
        self.qkv, self.out = _weight(models, d, 3 * d), _weight(models, d, d, scale)
        if memory is not None:
            self.q, self.kv = _weight(models, d, d), _weight(models, memory, 2 * d)
            self.read = _weight(models, d, d, scale)
        self.up, self.down = _weight(models, d, ratio * d), _weight(models, ratio * d, d, scale)
        self.bias = nn.Parameter(torch.zeros(models, 1, ratio * d))

    def forward(
        self, x: Float[Tensor, "m b t d"], memory: Float[Tensor, "m b s e"] | None = None
    ) -> Float[Tensor, "m b t d"]:
        """The residual streams after this layer."""
        q, k, v = _project(_norm(x), self.qkv).chunk(3, -1)
        x = x + _project(self._attend(q, k, v, causal=self.memory is not None), self.out)
        if memory is not None:
            k, v = _project(memory, self.kv).chunk(2, -1)
            x = x + _project(self._attend(_project(_norm(x), self.q), k, v), self.read)
        hidden = torch.baddbmm(self.bias, _norm(x).flatten(1, 2), self.up)
        return x + torch.bmm(F.gelu(hidden), self.down).view(x.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return mixed.transpose(2, 3).flatten(-2)


class Seq2Seq(nn.Module):
    """Several small encoder-decoder transformers of one shape, trained side by side.

    Each model has weights of its own and reads sentences of its own (its own seed, its own
    languages); one call runs them all, which at this size costs little more than one of them.

    Args:
        models: how many.
        vocab: words of the source and of the target language.
        length: longest sentence.
        layers: of encoder and decoder.
        d: widths of encoder and decoder; multiples of ``heads``.
        heads: of each attention.
        ratio: hidden units of the MLPs per unit of width.

    Raises:
        ValueError: a size is not a whole number of at least 1, or heads do not divide a width.

    Reference: Vaswani et al. (2017), arXiv 1706.03762, with norms before the layers.
    """

    def __init__(
        self,
        models: int,
        vocab: tuple[int, int],
        length: int,
        *,
        layers: tuple[int, int] = (1, 1),
        d: tuple[int, int] = (16, 16),
        heads: int = 2,
        ratio: int = 2,
    ) -> None:
        super().__init__()
        m = checks.count(models, "models")
        for width in d:
            if checks.count(width, "d") % checks.count(heads, "heads"):
                raise ValueError(f"heads: expected a divisor of d = {width}, got {heads}")
        for depth in layers:
            checks.count(depth, "layers")
        self.vocab, self.length = vocab, length
        self.source_words, self.source_places = _table(m, vocab[0], d[0]), _table(m, length, d[0])
        self.target_words, self.target_places = (
            _table(m, vocab[1] + 1, d[1]),
            _table(m, length, d[1]),
        )
        self.encoder, self.decoder = (
            nn.ModuleList(
                Layer(m, width, heads, ratio, (2 * depth) ** -0.5, memory) for _ in range(depth)
            )
            for width, depth, memory in zip(d, layers, (None, d[0]), strict=True)
        )
        self.head = _weight(m, d[1], vocab[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of one encoder and one decoder, without embeddings and output layer."""
        encoder, decoder = (
            sum(w[0].numel() for w in stack.parameters()) for stack in (self.encoder, self.decoder)
        )
        return encoder, decoder

    def forward(
        self, source: Int[Tensor, "m b s"], target: Int[Tensor, "m b t"]
    ) -> Float[Tensor, "m b t v"]:
        """Logits of each target word given the source and the target words before it."""
        memory = self._embed(source, self.source_words, self.source_places)
        for layer in self.encoder:
            memory = layer(memory)
        memory = _norm(memory)
        before = F.pad(target[..., :-1], (1, 0), value=self.vocab[1])
        x = self._embed(before, self.target_words, self.target_places)
        for layer in self.decoder:
            x = layer(x, memory)
        return _project(_norm(x), self.head)

    def losses(
        self, source: Int[Tensor, "m b s"], target: Int[Tensor, "m b t"]
    ) -> Float[Tensor, "m b"]:
        """Cross-entropy of each sentence under its model, in nats a target word."""
        logits = self(source, target).flatten(0, 2)
        each = F.cross_entropy(logits, target.flatten(), reduction="none")
        return each.view(target.shape).mean(-1)

    def _embed(self, tokens: Tensor, words: Tensor, places: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if length > self.length:
            raise ValueError(f"tokens: expected at most {self.length} words, got {length}")
        picked = torch.bmm(F.one_hot(tokens.flatten(1), words.shape[1]).to(words), words)
        return picked.unflatten(1, tokens.shape[1:]) + places[:, None, :length]


def _weight(models: int, n_in: int, n_out: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(models, n_in, n_out) * scale * n_in**-0.5)


def _table(models: int, n: int, d: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(models, n, d) * 0.5)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _project(x: Float[Tensor, "m b t d"], weight: Float[Tensor, "m d k"]) -> Tensor:
    return torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3])
