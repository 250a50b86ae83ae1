"""The closing comparison: what is held out is the largest, and no law sees it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.scaling_laws.experiments import side_by_side as study
from workbench.scaling_laws.fit import fit_law


def table(noise: float = 0.0) -> pd.DataFrame:
    N, D = np.meshgrid(np.geomspace(1e7, 1e10, 10), np.geomspace(1e9, 1e12, 5))
    loss = 1.8 + 480 * N**-0.35 + 2100 * D**-0.37
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(N.shape))
    return pd.DataFrame({"N": N.ravel(), "D": D.ravel(), "loss": loss.ravel()})


def test_the_largest_fifth_of_the_sizes_is_held_out():
    runs = table()
    held = study.split(runs)
    assert runs.N[held].nunique() == 2 and runs.N[held].min() > runs.N[~held].max()
    assert study.split(runs[runs.N < 1e8]).sum() == 5  # one size at least


def test_forecasts_from_further_up_are_nearer_and_surer():
    found = study.trust(table(noise=0.003), fits=5)
    assert found.reach.is_monotonic_increasing and found.reach.iloc[-1] < 1
    assert (found.low <= found.signed).all() and (found.signed <= found.high).all()
    width = found.high - found.low
    assert width.iloc[0] > 2 * width.iloc[-1]
    exact = study.trust(table(), fits=3)
    assert exact.error.to_numpy() == pytest.approx(np.zeros(3), abs=1e-3)


def test_a_forecast_is_fit_law_on_the_smaller_sizes():
    row = study.forecast(0, name=study.OWN, law="compute alone")
    runs = study.own_runs().astype(float)
    held = study.split(runs)
    runs = runs.assign(x=6 * runs.N * runs.D)
    fit = fit_law(runs[~held], "power", quiet=True)
    wrong = np.abs(fit.predict(x=runs.x[held].to_numpy()) / runs.loss[held] - 1)
    assert row["error"] == pytest.approx(100 * wrong.mean(), rel=1e-3)
    assert row["n_fit"] + row["n_held"] == len(runs) == 48


def test_without_released_files_the_test_bed_is_the_story(monkeypatch):
    monkeypatch.setattr(study.data, "authors", lambda slug: None)
    runs, source = study.story()
    assert "test bed" in source and len(runs) == 48
    assert list(study.tables()) == [study.OWN]
