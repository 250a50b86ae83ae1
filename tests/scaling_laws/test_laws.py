"""The formulas: values against plain arithmetic, derivatives against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.scaling_laws import laws

KAPLAN = {"N_c": 6.5e13, "a_N": 0.077, "S_c": 2.1e3, "a_S": 0.76, "B_star": 2.1e8, "a_B": 0.21}
CASES = {
    "chinchilla": (
        {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
        {"N": (70e9, 1e9), "D": (1.4e12, 2e10)},
        lambda N, D: 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28,
    ),
    "over_training": (
        {"A": 130.0, "B": 225.0, "E": 1.8, "alpha": 0.27},
        {"N": (1e7, 4e8), "M": (20.0, 320.0)},
        lambda N, M: 1.8 + 130 / N**0.27 + 225 / (M * N) ** 0.27,
    ),
    "nmt": (
        {"A": 0.9, "E": 1.3, "p_e": 0.2, "p_d": 0.3},
        {"Ne": (0.5, 4.0), "Nd": (2.0, 1.0)},
        lambda Ne, Nd: 1.3 + 0.9 * Ne**-0.2 * Nd**-0.3,
    ),
    "power": (
        {"A": 3.0, "E": 0.5, "alpha": 0.4},
        {"x": (2.0, 90.0)},
        lambda x: 0.5 + 3 * x**-0.4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_the_formula(name: str) -> None:
    law = laws.get(name)
    params, inputs, formula = CASES[name]
    theta = law.internal(params)
    columns = {q: torch.tensor(v, dtype=torch.float64) for q, v in inputs.items()}
    expected = [formula(*row) for row in zip(*inputs.values(), strict=True)]
    assert law.loss(theta, **columns).tolist() == pytest.approx(expected, rel=1e-12)
    back = dict(zip(law.parameters, law.natural(theta).tolist(), strict=True))
    assert back == pytest.approx(params)


def test_data_constrained_without_repetition_is_chinchilla_and_repeats_decay() -> None:
    law = laws.get("data_constrained")
    params = {
        "A": 400.0,
        "B": 400.0,
        "E": 1.7,
        "alpha": 0.35,
        "beta": 0.35,
        "R_N": 5.0,
        "R_D": 15.0,
    }
    theta = law.internal(params)
    # 20 tokens a parameter: no excess parameters by the law's own optimum (A = B, alpha = beta).
    N, D = torch.tensor([1e8]).double(), torch.tensor([2e9]).double()
    plain = 1.7 + 400 / 1e8**0.35 + 400 / 2e9**0.35
    assert law.loss(theta, N=N, D=D, U=D).item() == pytest.approx(plain, rel=1e-12)
    # D tokens of U unique ones are worth U + U R (1 - exp(-(D/U - 1) / R)).
    U = D / 4
    worth = 5e8 + 5e8 * 15 * (1 - math.exp(-3 / 15))
    repeated = 1.7 + 400 / 1e8**0.35 + 400 / worth**0.35
    assert law.loss(theta, N=N, D=D, U=U).item() == pytest.approx(repeated, rel=1e-12)


def test_kaplan_in_the_batch_solver_has_the_published_values() -> None:
    law = laws.get("kaplan")
    columns = {
        "N": torch.tensor([1e6, 1e9]).double(),
        "S": torch.tensor([1e4, 2.5e5]).double(),
        "B": torch.tensor([5e5, 5e5]).double(),
    }
    value = law.loss(law.internal(KAPLAN), **columns)
    assert value.tolist() == pytest.approx([4.383456, 2.460597], abs=1e-6)


def _inputs(name: str, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    scale = {"N": 1e8, "D": 1e10, "U": 2e9, "M": 30.0, "S": 1e4, "B": 1e5}
    return {
        q: scale.get(q, 3.0) * torch.rand(n, generator=generator).double().mul(2).exp()
        for q in laws.get(name).inputs
    }


@pytest.mark.parametrize("name", laws.LAWS)
def test_gradient_and_curvature_are_those_of_finite_differences(name: str) -> None:
    law = laws.get(name)
    generator = torch.Generator().manual_seed(1)
    columns = _inputs(name, 6, generator)
    params = CASES[name][0] if name in CASES else KAPLAN
    if name == "data_constrained":
        params = {**CASES["chinchilla"][0], "R_N": 5.3, "R_D": 15.4}
    theta = law.internal(params)[None]
    rows = torch.zeros(1, dtype=torch.long)
    bound = law.bind(columns, torch.linspace(0.5, 1.5, 6).double())
    slope = torch.linspace(-1, 2, 6).double()[None]
    flat = torch.zeros_like(slope)

    def pulled(at: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return bound.normal(at, bound.evaluate(at, rows)[1], rows, slope, weight)

    gradient, curvature = pulled(theta, flat)
    step = 1e-5
    for j in range(law.p):
        up, down = theta.clone(), theta.clone()
        up[0, j] += step
        down[0, j] -= step
        change = (bound.evaluate(up, rows)[0] - bound.evaluate(down, rows)[0]) / (2 * step)
        expected = (slope * change).sum(1)
        assert torch.allclose(gradient[:, j], expected, rtol=2e-5, atol=1e-8), law.parameters[j]
        if name == "kaplan":
            continue  # its curvature is left to Gauss-Newton
        bend = (pulled(up, flat)[0] - pulled(down, flat)[0]) / (2 * step)
        assert torch.allclose(curvature[0, j], bend[0], rtol=1e-4, atol=1e-6), law.parameters[j]


@pytest.mark.parametrize("name", laws.LAWS)
def test_the_gram_matrix_is_made_of_single_gradients(name: str) -> None:
    law = laws.get(name)
    columns = _inputs(name, 5, torch.Generator().manual_seed(2))
    params = CASES[name][0] if name in CASES else KAPLAN
    if name == "data_constrained":
        params = {**CASES["chinchilla"][0], "R_N": 5.3, "R_D": 15.4}
    theta, rows = law.internal(params)[None], torch.zeros(1, dtype=torch.long)
    bound = law.bind(columns, torch.zeros(5).double())
    memo = bound.evaluate(theta, rows)[1]
    weight = torch.linspace(0.2, 2, 5).double()[None]
    none = torch.zeros_like(weight)
    each = [bound.normal(theta, memo, rows, one[None], none)[0] for one in torch.eye(5).double()]
    expected = sum(w * g.mT @ g for w, g in zip(weight[0], each, strict=True))
    gram = bound.gram(theta, memo, rows, weight)
    assert torch.allclose(gram[0], expected, rtol=1e-9, atol=1e-12)
    # In `normal`, the weight adds just this to the curvature.
    added = bound.normal(theta, memo, rows, none, weight)[1]
    assert torch.allclose(added[0], expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_inputs_of_their_own_give_each_problem_its_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    law = laws.get("chinchilla")
    theta = torch.stack([law.internal(CASES["chinchilla"][0])] * 3)
    theta += 0.1 * torch.rand(3, 5, generator=generator).double()
    columns = {q: torch.rand(3, 4, generator=generator).double() * 1e9 + 1e6 for q in ("N", "D")}
    observed, slope = torch.rand(2, 3, 4, generator=generator).double()
    together, every = law.bind(columns, observed), torch.arange(3)
    residuals, memo = together.evaluate(theta, every)
    gradient, matrix = together.normal(theta, memo, every, slope, slope + 1)
    for i in range(3):
        alone, row, one = (
            law.bind({q: x[i] for q, x in columns.items()}, observed[i]),
            every[:1],
            theta[i : i + 1],
        )
        r, kept = alone.evaluate(one, row)
        assert torch.allclose(residuals[i], r[0])
        g, m = alone.normal(one, kept, row, slope[i : i + 1], slope[i : i + 1] + 1)
        assert torch.allclose(gradient[i], g[0]) and torch.allclose(matrix[i], m[0])


def test_a_law_of_ones_own_is_one_function() -> None:
    def mine(N, D, *, E, A, alpha, tilt):  # type: ignore[no-untyped-def]
        return E + A * (N * D) ** -alpha + 0 * tilt

    law = laws.from_function(mine, {"E": 1.5, "A": [10, 100], "alpha": 0.3, "tilt": [-1, 1]})
    assert law.inputs == ("N", "D") and law.parameters == ("E", "A", "alpha", "tilt")
    assert law.logs == (True, True, True, False)  # starts with a negative value: any sign
    assert len(law.grid()) == 4
    theta = law.internal({"E": 2.0, "A": 7.0, "alpha": 0.5, "tilt": 0.0})
    value = law.loss(theta, N=torch.tensor([4.0]).double(), D=torch.tensor([25.0]).double())
    assert value.item() == pytest.approx(2.7)


def test_wrong_laws_are_named() -> None:
    def no_columns(*, E):  # type: ignore[no-untyped-def]
        return E

    with pytest.raises(ValueError, match="law: expected one of"):
        laws.get("hoffmann")
    with pytest.raises(ValueError, match=r"law: expected a function like f\(N, D"):
        laws.from_function(no_columns, {"E": 1.0})
    with pytest.raises(ValueError, match="starts: expected values for E, A"):
        laws.from_function(lambda N, *, E, A: E + A / N, {"E": 1.0})
    with pytest.raises(ValueError, match="starts: A needs at least one finite value"):
        laws.from_function(lambda N, *, E, A: E + A / N, {"E": 1.0, "A": [np.nan]})
    with pytest.raises(ValueError, match="params: power has A, E, alpha; got A"):
        laws.get("power").internal({"A": 1.0})
    with pytest.raises(ValueError, match="A: expected a number above 0|A"):
        laws.get("power").internal({"A": -1.0, "E": 1.0, "alpha": 0.5})
