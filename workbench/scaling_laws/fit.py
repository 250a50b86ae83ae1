"""`fit_law`: from a table of runs to a law, its uncertainty, and what it foretells."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws import laws
from workbench.scaling_laws.identify import confounded
from workbench.scaling_laws.law import Law
from workbench.scaling_laws.optimum import compute_optimal
from workbench.scaling_laws.solve import OBJECTIVES, Objective, Solution, solve
from workbench.scaling_laws.table import FitWarning, Runs, at, pick, prepare

DRAWN = 60  # starts drawn where a grid is larger: chance of missing Chinchilla's optimum ~1e-20
TEX = {"alpha": r"\alpha", "beta": r"\beta", "eta": r"\eta", "B_star": "B_*", "R_N": "R_N^*"}


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        law: the formula.
        columns: the user's names of the columns, as given.
        params: natural parameters at the best optimum.
        theta: the same in the solver's coordinates, (p,).
        objective: its value there: the sum over rows of Huber's function of the log residual
            ("huber_log"), or half the sum of squares ("lsq", "lsq_log").
        frame: the rows used: inputs, ``loss``, ``predicted``, and ``residual``
            = ln(predicted / loss), with the user's index.
        starts: what every starting point reached.
        at_best: share of starts that reached the best optimum (within 1e-6 of its value).
        warnings: what a reader should know before trusting the numbers.
        draws: natural parameters of each bootstrap refit; empty without.
    """

    law: Law
    columns: dict[str, str]
    params: dict[str, float]
    theta: Float[Tensor, " p"]
    objective: float
    loss: Objective
    delta: float
    frame: pd.DataFrame
    starts: Solution
    at_best: float
    warnings: list[str]
    draws: pd.DataFrame
    _draws_theta: Tensor = field(repr=False)

    @property
    def residuals(self) -> pd.Series:
        """ln(predicted / observed) of each row used."""
        return self.frame["residual"]

    def __str__(self) -> str:
        shown = ", ".join(f"{q} = {v:.4g}" for q, v in self.params.items())
        return f"{self.law.name}: {shown} ({len(self.frame)} rows, objective {self.objective:.6g})"

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, float_format="{:.4g}".format, border=0))

    def _need_draws(self, what: str) -> None:
        if self.draws.empty:
            raise ValueError(f"{what}: needs a bootstrap; fit with bootstrap=1000, say")

    def interval(self, level: float = 0.95) -> pd.DataFrame:
        """Bootstrap percentiles: ``estimate``, ``sd``, ``low``, ``high`` of each parameter.

        Raises:
            ValueError: the law was fitted without a bootstrap.
        """
        self._need_draws("interval")
        tail = (1 - checks.fraction(level, "level", zero=False, one=False)) / 2
        low, high = self.draws.quantile(tail), self.draws.quantile(1 - tail)
        columns = {
            "estimate": pd.Series(self.params),
            "sd": self.draws.std(),
            "low": low,
            "high": high,
        }
        return pd.DataFrame(columns).loc[list(self.params)].rename_axis("parameter")

    def correlations(self) -> pd.DataFrame:
        """Correlation of the parameters over the bootstrap, in the solver's coordinates."""
        self._need_draws("correlations")
        values = pd.DataFrame(self._draws_theta.cpu().numpy(), columns=list(self.params))
        return values.corr()

    @overload
    def predict(
        self, frame: pd.DataFrame | None = ..., *, interval: None = ..., **inputs: Any
    ) -> np.ndarray: ...

    @overload
    def predict(
        self,
        frame: pd.DataFrame | None = ...,
        *,
        interval: float,
        new_run: bool = ...,
        **inputs: Any,
    ) -> pd.DataFrame: ...

    def predict(
        self,
        frame: pd.DataFrame | None = None,
        *,
        interval: float | None = None,
        new_run: bool = False,
        **inputs: Any,
    ) -> np.ndarray | pd.DataFrame:
        """Loss at other sizes, given as a frame with the law's inputs or by name.

        Args:
            frame: columns named as in the fit, or like the law's inputs.
            interval: a level such as 0.95: bootstrap percentiles as well.
            new_run: widen the interval to where a single new run should fall, by adding a log
                residual of the fit, drawn at random, to each draw.
            **inputs: numbers or arrays that broadcast.

        Returns:
            Predictions with the inputs' shape; with ``interval`` a frame of ``prediction``,
            ``low`` and ``high``.

        Raises:
            ValueError: an input is missing or not positive, or there was no bootstrap.
        """
        columns, shape = self._columns(frame, inputs)
        theta = torch.cat([self.theta[None], self._draws_theta]) if interval else self.theta[None]
        values = self.law.loss(theta, **columns)
        prediction: np.ndarray = values[0].cpu().numpy().reshape(shape)
        if interval is None:
            return prediction
        self._need_draws("interval")
        tail = (1 - checks.fraction(interval, "interval", zero=False, one=False)) / 2
        draws = values[1:]
        if new_run:
            generator = torch.Generator().manual_seed(0)
            noise = -torch.tensor(self.residuals.to_numpy())
            picked = torch.randint(0, len(noise), draws.shape, generator=generator)
            draws = draws * noise[picked].exp().to(draws)
        low, high = torch.quantile(draws, draws.new_tensor([tail, 1 - tail]), dim=0).cpu().numpy()
        return pd.DataFrame({"prediction": prediction.ravel(), "low": low, "high": high})

    def _columns(
        self, frame: pd.DataFrame | None, inputs: Mapping[str, object]
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        values: dict[str, object] = dict(inputs)
        if frame is not None:
            there = {q: c for q, c in self.columns.items() if c in frame.columns and q != "loss"}
            values = {**pick(frame, self.law, there)[0], **values}
        if set(values) != set(self.law.inputs):
            needed = ", ".join(self.law.inputs)
            raise ValueError(f"inputs: {self.law.name} needs {needed}; got {', '.join(values)}")
        arrays = {name: np.asarray(v, dtype=float) for name, v in values.items()}
        for name, array in arrays.items():
            if not (np.isfinite(array) & (array > 0)).all():
                raise ValueError(f"{name}: expected finite numbers above zero")
        shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
        flat = {q: np.broadcast_to(a, shape).ravel().copy() for q, a in arrays.items()}
        return {q: torch.as_tensor(a).to(self.theta) for q, a in flat.items()}, shape

    def optimal(
        self,
        C: float | Sequence[float] | np.ndarray,
        *,
        interval: float | None = None,
        **held: float,
    ) -> pd.DataFrame:
        """Compute-optimal sizes for budgets of C training FLOP, with C = 6 N D.

        Args:
            C: one budget or several.
            interval: a level such as 0.95: ``N_low``, ``N_high``, and so on as well.
            **held: values of inputs that do not follow from N and D (``U`` unique tokens).

        Returns:
            A row a budget: ``C``, ``N``, ``D``, ``ratio`` (tokens per parameter), ``loss``.

        Raises:
            ValueError: the law has no N and D (or M) to trade, a budget is not positive, or there
                was no bootstrap.
        """
        budgets = torch.as_tensor(np.atleast_1d(np.asarray(C, dtype=float))).to(self.theta)
        if not bool((budgets > 0).all() & budgets.isfinite().all()):
            raise ValueError("C: expected budgets above zero, in FLOP")
        if interval is not None:
            self._need_draws("interval")
        theta = torch.cat([self.theta[None], self._draws_theta]) if interval else self.theta[None]
        N, D, L = compute_optimal(self.law, theta, budgets, held)
        values = {"N": N, "D": D, "ratio": D / N, "loss": L}
        out = pd.DataFrame({"C": budgets.cpu().numpy()})
        for name, value in values.items():
            out[name] = value[0].cpu().numpy()
            if interval is not None:
                tail = (1 - checks.fraction(interval, "interval", zero=False, one=False)) / 2
                ends = torch.quantile(value[1:], value.new_tensor([tail, 1 - tail]), dim=0)
                out[f"{name}_low"], out[f"{name}_high"] = ends.cpu().numpy()
        return out

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """A row a parameter: ``parameter``, ``estimate``, and with a bootstrap its interval."""
        if self.draws.empty:
            return pd.DataFrame({"parameter": list(self.params), "estimate": self.params.values()})
        return self.interval(level).reset_index()

    def latex(self, digits: int = 4) -> str:
        """The formula and its fitted parameters, with bootstrap deviations where there are any."""
        parts = []
        for name, value in self.params.items():
            head, _, index = name.partition("_")
            symbol = TEX.get(name) or TEX.get(head, head) + (f"_{{{index}}}" if index else "")
            spread = "" if self.draws.empty else rf" \pm {_tex(self.draws[name].std(), 2)}"
            parts.append(f"{symbol} = {_tex(value, digits)}{spread}")
        formula = self.law.tex or rf"\text{{{self.law.name}}}"
        return formula + r",\qquad " + r",\; ".join(parts)


def _tex(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    mantissa, mark, power = text.partition("e")
    return rf"{mantissa} \cdot 10^{{{int(power)}}}" if mark else text


def fit_law(
    frame: pd.DataFrame,
    law: str | Law | Callable[..., Tensor] = "chinchilla",
    *,
    columns: Mapping[str, str] | None = None,
    objective: Objective = "huber_log",
    delta: float = 1e-3,
    starts: int | str | Mapping[str, float | Sequence[float]] | Tensor | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    bootstrap: int = 0,
    cluster: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    max_iterations: int = 300,
    quiet: bool = False,
) -> LawFit:
    r"""Fit a scaling law to a table of runs.

    The default is the objective of Hoffmann et al. (2022, arXiv 2203.15556, approach 3) as
    re-estimated by Besiroglu et al. (2024, arXiv 2404.10102): Huber's function of
    $\ln \hat L - \ln L$, summed. All starts, then all bootstrap refits, are solved as one batch.

    Args:
        frame: one row a run, or a checkpoint of one.
        law: a name in `laws.LAWS`, a `Law`, or a function ``f(N, D, *, E, A, alpha)`` of columns
            and parameters (then ``starts`` gives starting values of each parameter).
        columns: the user's names, ``{"N": "params", "D": "tokens", "loss": "val_loss"}``; tokens,
            parameters or their ratio are computed from training FLOP (``"C"``) where needed.
        objective: "huber_log", "lsq" (squared error of the loss) or "lsq_log".
        delta: threshold of Huber's function.
        starts: how many to draw from the law's box (default 60, or its grid where that is
            smaller), "grid" for all of them, natural values of each parameter (their product), or a
            tensor (m, p) of ``theta``.
        fixed: natural parameters held at a value.
        bounds: natural lower and upper bounds, such as ``{"alpha": (0, inf)}``.
        bootstrap: refits on resampled rows, each from the best optimum.
        cluster: column whose values are resampled together (runs, when rows are checkpoints).
        seed: of starts and resamples.
        device: where to solve.
        max_iterations: of any start or refit.
        quiet: only store warnings in the result, without raising Python warnings.

    Raises:
        TypeError: the frame or a column has the wrong type.
        ValueError: a column is missing or cannot be fitted, there are fewer distinct rows than
            parameters, or an option has no such value; the message names the column.
    """
    if callable(law) and not isinstance(law, Law):
        if not isinstance(starts, Mapping):
            raise ValueError("starts: a function as law needs starting values of each parameter")
        law, starts = laws.from_function(law, starts), "grid"
    law = laws.get(law)
    checks.one_of(objective, OBJECTIVES, "objective")
    checks.count(bootstrap, "bootstrap", minimum=0)
    generator = torch.Generator().manual_seed(checks.count(seed, "seed", minimum=0))
    runs = prepare(frame, law, columns)
    notes = list(runs.warnings)
    table = runs.frame
    free, pinned = _free(law, fixed)
    _enough(table, law, runs, int(free.sum()), notes)
    if fixed and "E" in fixed and fixed["E"] >= table.loss.min():
        row = at(table.loss.idxmin())
        raise ValueError(
            f"{runs.label('loss')}: row {row} is {table.loss.min():g}, not above the irreducible "
            f"term fixed at E = {fixed['E']:g}; lower E or leave it free"
        )
    theta0 = _starts(law, starts, generator)
    theta0[:, ~free] = pinned[~free]
    theta0 = theta0.unique(dim=0).to(device)
    lower, upper = _bounds(law, bounds)
    inputs = {q: torch.tensor(table[q].to_numpy(float), device=device) for q in law.inputs}
    observed = torch.tensor(table.loss.to_numpy(float), device=device)

    def run(start: Tensor, weights: Tensor | None = None) -> Solution:
        return solve(
            law, inputs, observed, start, weights=weights, objective=objective, delta=delta,
            free=free, lower=lower, upper=upper, max_iterations=max_iterations,
        )  # fmt: skip

    found = run(theta0)
    best = int(found.objective.argmin())
    value = float(found.objective[best])
    if not math.isfinite(value):
        raise ValueError("starts: the law is not finite at any of them; give other starting values")
    theta = found.theta[best]
    at_best = float((found.objective <= value * (1 + 1e-6) + 1e-18).double().mean())
    if not bool(found.converged[best]):
        notes.append("the best optimum had not converged; give more or other starts")
    if len(theta0) >= 20 and at_best < 0.05:
        notes.append(f"only {at_best:.0%} of {len(theta0)} starts reached the best optimum")
    equals = found.theta[found.objective <= value * (1 + 1e-9) + 1e-18]
    if names := confounded(law, inputs, observed, theta, equals, free):
        several = len(names) > 1
        trouble = "cannot be told apart by these runs" if several else "moves no prediction"
        notes.append(
            f"not identified: {' and '.join(names)} {trouble}; fix {'one' if several else 'it'} "
            "(fixed=...), or add runs that vary what it multiplies"
        )
    draws = theta[None, :][:0]
    if bootstrap:
        weights = _resamples(frame.loc[table.index], cluster, bootstrap, generator).to(theta)
        draws = run(theta.expand(bootstrap, -1).clone(), weights).theta
    natural = law.natural(theta)
    predicted = law.loss(theta, **inputs).cpu().numpy()
    used = table.assign(predicted=predicted, residual=np.log(predicted / table.loss.to_numpy()))
    if not quiet:
        for note in notes:
            warnings.warn(note, FitWarning, stacklevel=2)
    return LawFit(
        law=law,
        columns=dict(columns or {}),
        params=dict(zip(law.parameters, natural.tolist(), strict=True)),
        theta=theta,
        objective=value,
        loss=objective,
        delta=delta,
        frame=used,
        starts=found,
        at_best=at_best,
        warnings=notes,
        draws=pd.DataFrame(law.natural(draws).cpu().numpy(), columns=list(law.parameters)),
        _draws_theta=draws,
    )


def fit_power(
    x: np.ndarray | Sequence[float], y: np.ndarray | Sequence[float], **options: Any
) -> LawFit:
    """Fit ``y = E + A x^-alpha``; options are those of `fit_law`."""
    return fit_law(pd.DataFrame({"x": x, "loss": y}), "power", **options)


def fit_each(
    frame: pd.DataFrame,
    losses: Sequence[str],
    law: str | Law = "chinchilla",
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, LawFit]:
    """The same law for several loss columns (validation sets, tasks) of one table."""
    shared = dict(columns or {})
    return {
        loss: fit_law(frame, law, columns={**shared, "loss": loss}, **options) for loss in losses
    }


def _free(law: Law, fixed: Mapping[str, float] | None) -> tuple[Tensor, Tensor]:
    free = torch.ones(law.p, dtype=torch.bool)
    values = torch.zeros(law.p, dtype=torch.float64)
    for name, value in (fixed or {}).items():
        j = law.parameters.index(checks.one_of(name, law.parameters, "fixed"))
        checks.positive(value, name) if law.logs[j] else checks.number(value, name)
        free[j], values[j] = False, math.log(value) if law.logs[j] else value
    if not free.any():
        raise ValueError("fixed: every parameter is held; nothing is left to fit")
    return free, values


def _bounds(
    law: Law, bounds: Mapping[str, tuple[float, float]] | None
) -> tuple[Tensor | None, Tensor | None]:
    if not bounds:
        return None, None
    low = torch.full((law.p,), -torch.inf, dtype=torch.float64)
    high = torch.full((law.p,), torch.inf, dtype=torch.float64)
    for name, (below, above) in bounds.items():
        j = law.parameters.index(checks.one_of(name, law.parameters, "bounds"))
        if not below < above:
            raise ValueError(
                f"bounds: {name} needs a lower end below its upper, got {below, above}"
            )
        if law.logs[j]:
            below = math.log(below) if below > 0 else -math.inf
            above = math.log(above) if math.isfinite(above) else math.inf
        low[j], high[j] = below, above
    return low, high


def _starts(
    law: Law,
    starts: int | str | Mapping[str, float | Sequence[float]] | Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    if isinstance(starts, Tensor):
        if starts.ndim != 2 or starts.shape[1] != law.p or not len(starts):
            raise ValueError(f"starts: expected (m, {law.p}) numbers, got {tuple(starts.shape)}")
        return starts.detach().clone().double()
    if isinstance(starts, Mapping):
        pools = {q: np.atleast_1d(np.asarray(v, float)).tolist() for q, v in starts.items()}
        if set(pools) != set(law.parameters):
            raise ValueError(f"starts: expected values for {', '.join(law.parameters)}")
        mesh = torch.cartesian_prod(*(torch.tensor(pools[q]).double() for q in law.parameters))
        rows = [law.internal(dict(zip(law.parameters, r, strict=True))) for r in mesh.tolist()]
        return torch.stack(rows)
    if isinstance(starts, str):
        checks.one_of(starts, ("grid",), "starts")
        return law.grid()
    if starts is None and math.prod(len(v) for v in law.starts.values()) <= DRAWN:
        return law.grid()
    return law.draw(DRAWN if starts is None else checks.count(starts, "starts"), generator)


def _enough(table: pd.DataFrame, law: Law, runs: Runs, p: int, notes: list[str]) -> None:
    points = len(table[list(law.inputs)].drop_duplicates())
    where = " x ".join(runs.label(q) for q in law.inputs)
    if points < p:
        raise ValueError(
            f"{where}: {points} distinct points for {p} free parameters; add runs, fix parameters "
            "(fixed=...), or choose a law with fewer"
        )
    if points <= p + 1:
        notes.append(
            f"{where}: {points} distinct points for {p} free parameters leave next to nothing to "
            "check the law with; expect wide intervals"
        )


def _resamples(
    frame: pd.DataFrame, cluster: str | None, n: int, generator: torch.Generator
) -> Float[Tensor, "n rows"]:
    """How often each row is drawn in each resample, of rows or of whole clusters."""
    if cluster is None:
        codes = torch.arange(len(frame))
    else:
        if cluster not in frame.columns:
            raise ValueError(f"cluster: the frame has no column {cluster!r}")
        codes = torch.as_tensor(frame[cluster].factorize()[0].astype(np.int64))
    groups = int(codes.max()) + 1
    drawn = torch.randint(0, groups, (n, groups), generator=generator)
    counts = torch.zeros(n, groups, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts[:, codes]
