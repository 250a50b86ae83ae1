"""Mean ranks and their tests, against the tables and the worked example of Demšar (2006)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.lab import ranks

# Demšar (2006), table 5(a): q of Nemenyi's test for 2 to 10 classifiers.
Q05 = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
Q10 = [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]

# Demšar (2006), table 6: AUC of C4.5, with m, with cf, with both, on 14 data sets.
# The last two of the 13th are printed as .975 and ranked 2 and 3.
AUC = pd.DataFrame(
    [
        (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967),
        (0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931),
        (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875),
        (1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
        (0.972, 0.981, 0.9752, 0.9748), (0.957, 0.978, 0.946, 0.970),
    ],
    columns=["C4.5", "m", "cf", "m+cf"],
)  # fmt: skip


@pytest.mark.parametrize(("alpha", "table"), [(0.05, Q05), (0.10, Q10)])
def test_critical_values_are_those_of_demsars_table(alpha: float, table: list[float]) -> None:
    for k, q in enumerate(table, start=2):
        # one block and k (k + 1) / 6 of them make the square root one
        cd = ranks.critical_difference(k, 1, alpha) / np.sqrt(k * (k + 1) / 6)
        assert cd == pytest.approx(q, abs=1.1e-3), k


def test_demsars_worked_example() -> None:
    found = ranks.ranking(AUC)
    mean = {name: round(rank, 3) for name, rank in found.ranks.items()}
    assert mean == {"m+cf": 1.964, "m": 2.0, "cf": 2.893, "C4.5": 3.143}
    assert list(found.ranks) == ["m+cf", "m", "cf", "C4.5"]
    assert found.cd == pytest.approx(1.25, abs=0.005)
    assert ranks.critical_difference(4, 14, 0.10) == pytest.approx(1.12, abs=0.005)
    # the paper computes 9.28 and 3.69 without the correction for ties
    k, n = 4, 14
    plain = 12 * n / (k * (k + 1)) * sum((r - (k + 1) / 2) ** 2 for r in found.ranks.values())
    assert plain == pytest.approx(9.28, abs=0.01)
    assert (n - 1) * plain / (n * (k - 1) - plain) == pytest.approx(3.69, abs=0.01)
    assert found.test.f_p < 0.05 and found.test.statistic > plain
    # "C4.5 performs significantly worse than the two with m": at 10%, where CD is 1.12
    assert found.groups == (("m+cf", "m", "cf", "C4.5"),)
    assert ranks.ranking(AUC, alpha=0.10).groups == (("m+cf", "m", "cf"), ("cf", "C4.5"))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(2, 6), st.integers(0, 10**6))
def test_friedman_is_scipys_with_ties(n: int, k: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, (n, k)).astype(float)
    found = ranks.friedman(scores)
    if k >= 3 and (np.ptp(scores, axis=1) > 0).any():
        expected = stats.friedmanchisquare(*scores.T)
        assert found.statistic == pytest.approx(expected.statistic, abs=1e-9)
        assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert ranks.ranks(scores).sum(1) == pytest.approx(k * (k + 1) / 2)
    assert ranks.ranks(scores) == pytest.approx(ranks.ranks(-scores, "lower"))


def test_friedman_at_its_ends() -> None:
    assert ranks.friedman(np.ones((4, 3))).p == 1.0
    always = ranks.friedman(np.tile([1.0, 2.0, 3.0], (6, 1)))
    assert always.statistic == pytest.approx(12.0) and always.f_p == 0.0


def test_holm_by_hand() -> None:
    assert ranks.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert ranks.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_wilcoxon_compares_what_was_asked() -> None:
    found = ranks.wilcoxon(AUC, against="C4.5")
    assert found["first"].tolist() == ["m", "cf", "m+cf"] and set(found["second"]) == {"C4.5"}
    # Demšar (2006), table 2: C4.5 against C4.5+m; z = -2.46 from R = 12, blocks without a
    # difference halved
    z = (12 - 14 * 15 / 4) / np.sqrt(14 * 15 * 29 / 24)
    first = found.set_index("first").loc["m"]
    assert first["p"] == pytest.approx(2 * stats.norm.sf(-z), abs=0.004) and first["p"] < 0.02
    assert first["difference"] == pytest.approx((AUC["m"] - AUC["C4.5"]).mean())
    assert len(ranks.wilcoxon(AUC)) == 6
    same = ranks.wilcoxon(np.ones((5, 2)), ["a", "b"])
    assert same["p"].tolist() == [1.0]


def test_groups_are_the_largest_intervals() -> None:
    order = np.array([3.0, 1.0, 2.0, 5.0])
    alike = np.abs(order[:, None] - order) <= 1.5
    assert ranks.groups(order, alike) == [(1, 2), (2, 0)]
    assert ranks.groups(order, np.ones((4, 4), bool)) == [(1, 2, 0, 3)]
    assert ranks.groups(order, np.eye(4, dtype=bool)) == []
    # a pair that is told apart ends the interval even when its neighbours are not
    apart = np.ones((3, 3), bool)
    apart[0, 2] = apart[2, 0] = False
    assert ranks.groups([1.0, 2.0, 3.0], apart) == [(0, 1), (1, 2)]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_groups_hold_every_pair_that_is_alike(k: int, seed: int) -> None:
    order = np.random.default_rng(seed).random(k) * 4
    alike = np.abs(order[:, None] - order) <= 1.0
    found = ranks.groups(order, alike)
    for i in range(k):
        for j in range(i):
            assert any(i in g and j in g for g in found) == alike[i, j]


def test_corrected_interval_by_hand_and_in_the_limit() -> None:
    d = np.array([0.01, 0.03, 0.02, 0.06, 0.0])
    found = ranks.resampled(d, 0.25)
    error = d.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert found.high - found.mean == pytest.approx(2.7764451 * error)
    assert found.p == pytest.approx(2 * stats.t.sf(0.024 / error, 4))
    plain = stats.ttest_1samp(d, 0.0)
    limit = ranks.resampled(d, 1e-12)
    assert limit.p == pytest.approx(plain.pvalue) and limit.p < found.p
    assert ranks.resampled([0.0, 0.0], 1.0).p == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks.ranking(np.ones((1, 3))), "at least 2 block"),
        (lambda: ranks.ranks(np.ones((3, 1))), "at least 2 methods"),
        (lambda: ranks.ranks([[1.0, np.nan]]), "scores: row 0"),
        (lambda: ranks.ranks(np.ones((3, 2)), "up"), "better"),
        (lambda: ranks.critical_difference(1, 5), "k:"),
        (lambda: ranks.critical_difference(3, 5, 0.0), "alpha"),
        (lambda: ranks.ranking(np.ones((3, 2)), ["a", "a"]), "names"),
        (lambda: ranks.wilcoxon(AUC, against="C5"), "against"),
        (lambda: ranks.groups([1, 2], np.ones((3, 2), bool)), "alike"),
        (lambda: ranks.resampled([0.1], 0.25), "differences"),
        (lambda: ranks.holm([1.2]), "p:"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, IndexError), match=message):
        call()
