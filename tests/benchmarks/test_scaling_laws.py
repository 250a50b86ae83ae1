"""The scaling-laws family's heaviest operations, against the loops one would otherwise write."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import huber, logsumexp, softmax

from workbench import scaling_laws
from workbench.lab import data
from workbench.scaling_laws import laws
from workbench.scaling_laws.experiments.learning_curve_traces import loop_trace
from workbench.scaling_laws.learning_curve_traces import learning_trace
from workbench.scaling_laws.solve import solve

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("every_core")]
LAW = laws.get("chinchilla")
DELTA = 1e-3


@pytest.fixture(scope="module")
def points() -> pd.DataFrame:
    """240 runs: the published points when they are here, otherwise runs of the same law."""
    folder = data.authors("chinchilla_points")
    if folder is not None:
        frame = pd.read_csv(folder / "data" / "svg_extracted_data.csv")
        frame = frame.sort_values("loss").iloc[:-5]
        N, C = frame["Model Size"].to_numpy(), frame["Training FLOP"].to_numpy()
        return pd.DataFrame({"N": N, "D": C / (6 * N), "loss": frame["loss"].to_numpy()})
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7.8, 10.2, 240), 10 ** rng.uniform(8.4, 11.5, 240)
    loss = 1.8172 + 477.8 * N**-0.3473 + 2143 * D**-0.3672
    return pd.DataFrame({"N": N, "D": D, "loss": loss * np.exp(0.004 * rng.standard_t(3, 240))})


class Script:
    """The usual script: scipy's L-BFGS-B, one problem after another, with analytic gradient."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.log_N, self.log_D = np.log(frame.N.to_numpy()), np.log(frame.D.to_numpy())
        self.log_L = np.log(frame.loss.to_numpy())

    def value(self, theta: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective times 1000 (unscaled, the method stops early) and its gradient."""
        a, b, e, alpha, beta = theta
        first, second = a - alpha * self.log_N, b - beta * self.log_D
        terms = np.stack([first, second, np.full_like(first, e)])
        r = logsumexp(terms, axis=0) - self.log_L
        pull = weights * np.clip(r, -DELTA, DELTA) * softmax(terms, axis=0)
        return 1e3 * float((weights * huber(DELTA, r)).sum()), self.gradient(*pull)

    def gradient(self, one: np.ndarray, two: np.ndarray, three: np.ndarray) -> np.ndarray:
        """Of the scaled objective, from the pull of each row on each term."""
        slopes = -(one * self.log_N).sum(), -(two * self.log_D).sum()
        return 1e3 * np.array([one.sum(), two.sum(), three.sum(), *slopes])

    def best(self, starts: np.ndarray) -> float:
        """The lowest objective over all starts."""
        ones = np.ones_like(self.log_L)
        return min(self.run(start, ones).fun for start in starts) / 1e3

    def run(self, start: np.ndarray, weights: np.ndarray):  # type: ignore[no-untyped-def]
        """One fit, with tolerances at which it does not stop early."""
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-10}
        return minimize(
            self.value, start, args=(weights,), jac=True, method="L-BFGS-B", options=options
        )


class TunedScript(Script):
    """The same loop with the library calls written out, to save their overhead."""

    def value(self, theta: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective times 1000 and its gradient."""
        a, b, e, alpha, beta = theta
        first, second = a - alpha * self.log_N, b - beta * self.log_D
        top = np.maximum(np.maximum(first, second), e)
        parts = np.exp(first - top), np.exp(second - top), np.exp(e - top)
        total = parts[0] + parts[1] + parts[2]
        r = top + np.log(total) - self.log_L
        size = np.abs(r)
        cost = np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))
        pull = weights * np.clip(r, -DELTA, DELTA) / total
        return 1e3 * float((weights * cost).sum()), self.gradient(*(pull * q for q in parts))


PEERS = {"scipy L-BFGS-B loop": (Script, 25, 40), "the loop, hand-tuned": (TunedScript, None, None)}


@pytest.mark.parametrize("peer", PEERS)
def test_4500_starts_against_a_scipy_loop(bench, points, peer):
    script, bar, _ = PEERS[peer]
    loop, starts = script(points), LAW.grid()
    inputs = {q: torch.tensor(points[q].to_numpy()) for q in LAW.inputs}
    loss = torch.tensor(points.loss.to_numpy())
    found = {}

    def ours():
        found["ours"] = solve(LAW, inputs, loss, starts).objective.min().item()

    def theirs():
        found["peer"] = loop.best(starts.numpy())

    bench.side_by_side(
        "Chinchilla fit, 4,500 starts, 240 runs", peer, ours, theirs, bar=bar, repeat=1
    )
    assert found["ours"] <= found["peer"] + 1e-9


@pytest.mark.parametrize("peer", PEERS)
def test_1000_bootstrap_refits_against_a_scipy_loop(bench, points, peer):
    script, _, bar = PEERS[peer]
    loop = script(points)
    inputs = {q: torch.tensor(points[q].to_numpy()) for q in LAW.inputs}
    loss = torch.tensor(points.loss.to_numpy())
    best = scaling_laws.fit_law(points).theta
    rng = np.random.default_rng(0)
    weights = rng.multinomial(240, np.full(240, 1 / 240), size=1000).astype(float)
    found = {}

    def ours():
        found["ours"] = solve(
            LAW, inputs, loss, best.expand(1000, -1).clone(), weights=torch.tensor(weights)
        ).objective.numpy()

    def theirs():
        found["peer"] = np.array([loop.run(best.numpy(), w).fun / 1e3 for w in weights])

    bench.side_by_side(
        "Chinchilla fit, 1,000 bootstrap refits", peer, ours, theirs, bar=bar, repeat=2
    )
    assert (found["ours"] <= found["peer"] + 1e-9).mean() > 0.99


def test_traces_of_200_curves_against_a_curve_fit_loop(bench):
    rng = np.random.default_rng(0)
    x = 5000.0 * np.arange(1, 101)
    drop, b, c = (rng.uniform(*ends, (200, 1)) for ends in ((5, 25), (0.2, 0.8), (80, 99)))
    y = c - drop * (x / x[0]) ** -b + rng.normal(0, 0.2, (200, 100))
    found = {}

    def ours():
        found["ours"] = learning_trace(x, y).sse

    def theirs():
        found["peer"] = np.stack([loop_trace(x, row)[1] for row in y])

    bench.side_by_side(
        "learning traces, 200 curves x 98 levels", "scipy curve_fit (trf) loop", ours, theirs,
        bar=20, repeat=1,
    )  # fmt: skip
    assert np.all(found["ours"] <= found["peer"] * (1 + 1e-8) + 1e-12)


def test_a_control_that_refits_answers_in_300_ms(bench, points):
    explorer = scaling_laws.explore(points)
    cuts = explorer.control("cut").values
    explorer.result(cut=cuts[-1])
    positions = iter(cuts)

    bench.side_by_side(
        "explorer: refit, 60 starts + 500 bootstraps, 240 runs", "0.3 s", lambda: explorer.result(
            cut=next(positions)), 0.3, bar=1,
    )  # fmt: skip


def test_a_control_that_redraws_answers_in_50_ms(bench, points):
    explorer = scaling_laws.explore(points)
    explorer.result()
    budgets = iter(np.geomspace(1e20, 1e24, 40))
    bench.side_by_side(
        "explorer: another budget, 500 bootstraps", "0.05 s",
        lambda: explorer.result(budget=float(next(budgets))), 0.05, bar=1,
    )  # fmt: skip
