"""The batch solver against scipy, and against itself in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit, minimize
from torch import Tensor

from workbench.scaling_laws import laws
from workbench.scaling_laws.solve import best_of, solve

CHINCHILLA = laws.get("chinchilla")
TRUE = CHINCHILLA.internal({"A": 480.0, "B": 2100.0, "E": 1.82, "alpha": 0.35, "beta": 0.37})


def runs(n: int = 60, noise: float = 0.01, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    rng = np.random.default_rng(seed)
    N = torch.tensor(10 ** rng.uniform(7.5, 10, n))
    D = torch.tensor(10 ** rng.uniform(8.5, 11.5, n))
    loss = CHINCHILLA.loss(TRUE, N=N, D=D) * torch.tensor(np.exp(noise * rng.standard_t(3, n)))
    return {"N": N, "D": D}, loss


def peer(inputs: dict[str, Tensor], loss: Tensor, start: np.ndarray, delta: float = 1e-3) -> float:
    """scipy's L-BFGS-B on the scaled objective with its analytic gradient, written out anew."""
    log_N, log_D = inputs["N"].log().numpy(), inputs["D"].log().numpy()
    log_L = loss.log().numpy()

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = theta
        parts = np.stack([a - alpha * log_N, b - beta * log_D, np.full_like(log_N, e)])
        top = parts.max(0)
        total = np.exp(parts - top).sum(0)
        r = top + np.log(total) - log_L
        share = np.exp(parts - top) / total
        size = np.abs(r)
        cost = np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)).sum()
        pull = np.clip(r, -delta, delta) * share
        gradient = [
            pull[0].sum(), pull[1].sum(), pull[2].sum(),
            -(pull[0] * log_N).sum(), -(pull[1] * log_D).sum(),
        ]  # fmt: skip
        return 1e3 * cost, 1e3 * np.array(gradient)

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12}
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun) / 1e3


def test_huber_reaches_what_scipy_reaches_or_less() -> None:
    inputs, loss = runs()
    starts = CHINCHILLA.draw(20, torch.Generator().manual_seed(0))
    ours = best_of(CHINCHILLA, inputs, loss, starts).objective[0].item()
    theirs = min(peer(inputs, loss, start) for start in starts[:8].numpy())
    assert ours <= theirs + 1e-9
    polished = best_of(CHINCHILLA, inputs, loss, starts).theta[0].numpy()
    assert peer(inputs, loss, polished) >= ours - 1e-12  # nothing lower nearby


def test_least_squares_is_curve_fit() -> None:
    x = torch.logspace(1, 4, 25).double()
    rng = np.random.default_rng(3)
    y = 0.7 + 12 * x**-0.6 + torch.tensor(0.01 * rng.standard_normal(25))
    law = laws.get("power")
    found = best_of(law, {"x": x}, y, law.grid(), objective="lsq")
    A, E, alpha = law.natural(found.theta[0]).tolist()
    reference, _ = curve_fit(
        lambda q, a, e, p: e + a * q**-p, x.numpy(), y.numpy(), p0=(10, 1, 0.5), xtol=1e-14
    )
    assert (A, E, alpha) == pytest.approx(tuple(reference), rel=1e-5)


@pytest.mark.parametrize("objective", ["huber_log", "lsq", "lsq_log"])
def test_exact_data_give_the_law_back(objective: str) -> None:
    inputs, loss = runs(noise=0.0)
    starts = CHINCHILLA.draw(30, torch.Generator().manual_seed(1))
    found = best_of(CHINCHILLA, inputs, loss, starts, objective=objective)
    assert torch.allclose(found.theta[0], TRUE, rtol=1e-5)
    assert bool(found.converged[0])


def test_a_problem_does_not_depend_on_its_batch() -> None:
    inputs, loss = runs()
    starts = CHINCHILLA.draw(12, torch.Generator().manual_seed(2))
    together = solve(CHINCHILLA, inputs, loss, starts)
    alone = [solve(CHINCHILLA, inputs, loss, s[None]).objective.item() for s in starts]
    assert together.objective.tolist() == pytest.approx(alone, rel=1e-7)


def test_weights_repeat_and_remove_rows() -> None:
    inputs, loss = runs(n=40)
    weights = torch.zeros(2, 40).double()
    weights[0, :30], weights[1] = 1, 1
    weights[1, 5] = 3
    starts = CHINCHILLA.draw(20, torch.Generator().manual_seed(0))
    found = best_of(CHINCHILLA, inputs, loss, starts, weights=weights)
    fewer = {q: x[:30] for q, x in inputs.items()}
    left_out = best_of(CHINCHILLA, fewer, loss[:30], starts)
    more = {q: torch.cat([x, x[5:6], x[5:6]]) for q, x in inputs.items()}
    repeated = best_of(CHINCHILLA, more, torch.cat([loss, loss[5:6], loss[5:6]]), starts)
    expected = [left_out.objective[0].item(), repeated.objective[0].item()]
    assert found.objective.tolist() == pytest.approx(expected, rel=1e-9)


def test_rows_may_be_in_any_order() -> None:
    inputs, loss = runs()
    order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(0))
    starts = CHINCHILLA.draw(20, torch.Generator().manual_seed(0))
    first = best_of(CHINCHILLA, inputs, loss, starts)
    again = best_of(CHINCHILLA, {q: x[order] for q, x in inputs.items()}, loss[order], starts)
    assert torch.allclose(first.theta, again.theta, rtol=1e-5)


def test_held_and_bounded_parameters_stay() -> None:
    inputs, loss = runs()
    starts = CHINCHILLA.draw(10, torch.Generator().manual_seed(0))
    starts[:, 3] = 0.5
    free = torch.tensor([True, True, True, False, True])
    held = solve(CHINCHILLA, inputs, loss, starts, free=free)
    assert (held.theta[:, 3] == 0.5).all()
    upper = torch.tensor([torch.inf] * 4 + [0.3], dtype=torch.float64)
    bounded = best_of(CHINCHILLA, inputs, loss, starts, upper=upper)
    assert bounded.theta[0, 4] == 0.3  # the free optimum lies above
    fixed = starts.clone()
    fixed[:, 4] = 0.3
    same = best_of(
        CHINCHILLA, inputs, loss, fixed, free=torch.tensor([True, True, True, True, False])
    )
    assert bounded.objective[0].item() == pytest.approx(same.objective[0].item(), rel=1e-6)


def test_a_law_by_autograd_reaches_the_same_optimum() -> None:
    inputs, loss = runs(n=30)
    law = laws.from_function(
        lambda N, D, *, A, B, E, alpha, beta: E + A * N**-alpha + B * D**-beta,
        {"A": [100, 1000], "B": [100, 5000], "E": 1.5, "alpha": 0.3, "beta": 0.3},
    )
    starts = law.grid()
    starts[:, 3:] = starts[:, 3:].exp()
    ours = best_of(CHINCHILLA, inputs, loss, starts)
    theirs = best_of(law, inputs, loss, law.grid())  # there, exponents are logarithms too
    alpha = law.natural(theirs.theta[0])[3].item()
    assert theirs.objective[0].item() == pytest.approx(ours.objective[0].item(), rel=1e-8)
    assert alpha == pytest.approx(ours.theta[0, 3].item(), rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_solves_where_its_tensors_are(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs, loss = runs(n=30)
    starts = CHINCHILLA.draw(8, torch.Generator().manual_seed(0)).float().to(device)
    found = solve(CHINCHILLA, {q: x.float() for q, x in inputs.items()}, loss.float(), starts)
    assert found.theta.device.type == device and found.theta.dtype == torch.float64


def test_wrong_shapes_and_options_are_named() -> None:
    inputs, loss = runs(n=10)
    starts = CHINCHILLA.draw(3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"starts: expected shape \(P, 5\)"):
        solve(CHINCHILLA, inputs, loss, starts[:, :4])
    with pytest.raises(ValueError, match=r"weights: expected \(10,\) or \(3, 10\)"):
        solve(CHINCHILLA, inputs, loss, starts, weights=torch.ones(2, 10))
    with pytest.raises(ValueError, match="objective: expected one of"):
        solve(CHINCHILLA, inputs, loss, starts, objective="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="delta"):
        solve(CHINCHILLA, inputs, loss, starts, delta=0.0)
