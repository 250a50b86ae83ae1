"""Verdicts: rarely wrong when nothing is there, documented power when something is."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from workbench import lab
from workbench.lab import claims
from workbench.lab.claim_card import card_html
from workbench.lab.claims import Claim, judge

DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size=size),
    "laplace": lambda rng, size: rng.laplace(size=size),
    "student": lambda rng, size: rng.standard_t(3, size=size),
    "exponential": lambda rng, size: rng.exponential(size=size) - rng.exponential(size=size),
}


def pairs(ours: list[float], baseline: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"seed": range(len(ours)), "ours": ours, "base": baseline})


def of(frame: pd.DataFrame, **kw: object) -> Claim:
    return judge("paper", "statement", frame, ours="ours", baseline="base", **kw)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", DRAWS)
@pytest.mark.parametrize("n", [5, 10, 20])
def test_without_an_effect_at_most_one_in_twenty_claims_holds(shape: str, n: int) -> None:
    d = DRAWS[shape](np.random.default_rng(n), (2000, n))
    verdicts = [claims.verdict(n, *claims.interval(row), 0.0) for row in d]
    assert verdicts.count("holds") / len(verdicts) <= 0.05


def test_the_bootstrap_keeps_its_level_from_twenty_pairs_on() -> None:
    d = np.random.default_rng(0).laplace(size=(120, 25))
    held = sum(claims.interval(row, "bca")[0] > 0 for row in d)
    assert held <= stats.binom.ppf(0.999, 120, 0.05)


@pytest.mark.parametrize(("n", "d", "power"), [(5, 1, 40), (5, 2, 91), (10, 1, 80), (20, 1, 99)])
def test_the_power_in_the_docstring_is_the_power(n: int, d: float, power: int) -> None:
    exact = stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, d * math.sqrt(n))
    assert round(100 * exact) == power
    assert f"{power}%" in inspect.getdoc(judge)
    draws = np.random.default_rng(1).normal(d, 1, size=(1000, n))
    found = np.mean([claims.interval(row)[0] > 0 for row in draws])
    assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 1000) + 0.002


def test_the_t_interval_is_scipys() -> None:
    d = np.random.default_rng(3).normal(size=8)
    expected = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert claims.interval(d) == pytest.approx((expected.low, expected.high))


@given(st.lists(st.floats(-10, 10), min_size=5, max_size=12), st.floats(0.5, 3))
def test_swapping_the_direction_swaps_the_interval(values: list[float], shift: float) -> None:
    frame = pairs([v + shift for v in values], values[::-1])
    up, down = of(frame), of(frame, better="lower")
    assert (up.effect, up.low, up.high) == pytest.approx((-down.effect, -down.high, -down.low))
    assert {up.verdict, down.verdict} != {"holds"}


def test_verdicts_follow_the_interval_and_the_margin() -> None:
    ours, base = [1.0, 1.1, 0.9, 1.05, 0.95], [0.0] * 5
    assert of(pairs(ours, base)).verdict == "holds"
    assert of(pairs(ours, base), margin=1.0).verdict == "inconclusive"
    assert of(pairs(ours, base), margin=2.0).verdict == "refuted"
    assert of(pairs(ours, base), better="lower").verdict == "refuted"
    assert of(pairs(ours[:4], base[:4])).verdict == "not judged"
    assert of(pairs(base, base)).verdict == "refuted", "no difference at all is no advantage"


def test_a_number_can_be_the_baseline() -> None:
    claim = judge("p", "s", pairs([0.5, 0.6, 0.4, 0.55, 0.5], [0.0] * 5), ours="ours", baseline=0.0)
    assert claim.verdict == "holds" and claim.baseline == 0.0


def test_smoke_runs_are_not_judged_but_identities_are(capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.start("smoke")
    claim = run.claim("p", "s", pairs([1.0] * 5, [0.0] * 5), ours="ours", baseline="base")
    assert claim.verdict == "not judged" and claim.effect == 1.0
    assert run.identity("p", "s", [1.0, 2.0], [1.0, 2.0 + 1e-9]).verdict == "holds"
    assert run.identity("p", "s", [1.0, 2.0], [1.0, 2.1]).verdict == "refuted"
    assert [c.verdict for c in run.claims] == ["not judged", "holds", "refuted"]
    assert "[refuted] p: s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"better": "more"}, "better: expected 'higher' or 'lower'"),
        ({"margin": -1.0}, "margin: expected a number of at least 0"),
        ({"interval": "bca"}, "needs at least 20 pairs, got 5"),
        ({"interval": "guess"}, "expected 't' or 'bca', got 'guess'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(pairs([1.0, 2, 3, 4, 5], [0.0] * 5), **change)


def test_missing_columns_and_numbers_are_named() -> None:
    with pytest.raises(KeyError, match="ours: the frame has no column 'typo'"):
        judge("p", "s", pairs([1.0], [2.0]), ours="typo", baseline="base")
    with pytest.raises(ValueError, match="baseline: column 'base' is nan in row 1"):
        of(pairs([1.0, 2.0], [0.0, math.nan]))
    with pytest.raises(ValueError, match="frame: expected at least one row"):
        of(pairs([], []))
    with pytest.raises(ValueError, match="lhs, rhs: expected one shape"):
        claims.equal("p", "s", [1.0], [1.0, 2.0])


@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_claim_survives_json(n: int) -> None:
    claim = of(pairs([1.0 + i for i in range(n)], [0.5] * n), paper=0.7).at(
        scale="laptop", device="cpu", seed=0
    )
    text = json.dumps(claim.to_json(), allow_nan=False)
    assert Claim.from_json(json.loads(text)) == claim


def test_the_card_escapes_what_it_shows() -> None:
    claim = judge(
        "p",
        "<img src=x onerror=alert(1)>",
        pairs([1.0] * 5, [0.0] * 5),
        ours="ours",
        baseline="base",
        data="<script>",
        unit="<b>",
    )
    html = card_html(claim)
    assert "<img" not in html and "<script" not in html and "<b>" not in html
