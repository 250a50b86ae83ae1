"""The family's explorer: its numbers are the fit's, its controls move what they name."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from workbench.scaling_laws import explore, fit_law


def table(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    N, D = np.meshgrid(np.geomspace(2e7, 3e9, 6), np.geomspace(5e8, 2e11, 5))
    frame = pd.DataFrame({"params": N.ravel(), "tokens": D.ravel()})
    law = 1.8 + 480 * frame.params**-0.35 + 2100 * frame.tokens**-0.37
    noise = rng.standard_normal((2, len(frame)))
    return frame.assign(
        web=law * np.exp(0.004 * noise[0]), code=0.6 * law * np.exp(0.01 * noise[1])
    )


COLUMNS = {"N": "params", "D": "tokens", "loss": "web"}


@pytest.fixture(scope="module")
def explorer():  # type: ignore[no-untyped-def]
    return explore(table(), COLUMNS, losses=["web", "code"], starts=30, bootstrap=60)


def test_its_numbers_are_those_of_the_fit_on_the_runs_kept(explorer) -> None:  # type: ignore[no-untyped-def]
    frame = table()
    cut = explorer.control("cut").values[1]
    result = explorer.result(cut=cut, budget=1e21)
    kept = frame[frame.params <= cut]
    fit = fit_law(kept, columns=COLUMNS, starts=60)
    held = frame[frame.params > cut]
    error = np.abs(fit.predict(N=held.params, D=held.tokens) / held.web - 1).mean()
    assert result["held"] == len(held) > 0
    assert result["error"] == pytest.approx(error, rel=1e-3)
    best = fit.optimal(1e21).iloc[0]
    assert result["best_N"] == pytest.approx(best.N, rel=1e-3)
    assert result["best_low"] <= result["best_N"] <= result["best_high"]


def test_every_control_moves_what_it_names(explorer) -> None:  # type: ignore[no-untyped-def]
    before = explorer.result()
    last = explorer.control("cut").values[-1]
    assert explorer.result(cut=last)["held"] == 0
    assert explorer.result(loss="code")["in_y"].mean() < 0.8 * before["in_y"].mean()
    assert explorer.result(law="over_training")["y"].tolist() != before["y"].tolist()
    assert explorer.result(delta=1.0)["seen_error"] != before["seen_error"]
    assert explorer.result(pair="A, E")["first"] == "A"
    flat = explorer.result(bands=False)
    assert np.array_equal(flat["y_low"], flat["y"]) and (before["y_low"] < before["y"]).all()
    assert explorer.result(budget=1e24)["best_N"] > before["best_N"]


def test_pairs_that_a_law_lacks_fall_back_to_one_it_has(explorer) -> None:  # type: ignore[no-untyped-def]
    result = explorer.result(law="over_training", pair="alpha, beta")
    assert {result["first"], result["second"]} <= {"A", "B", "E", "alpha"}


def test_moving_the_budget_does_not_refit(explorer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    explorer.result()
    monkeypatch.setattr(
        "workbench.scaling_laws.figures.fit_law", lambda *a, **k: pytest.fail("fitted again")
    )
    explorer.result(budget=1e22)
    explorer.result(bands=False)


def test_exported_it_moves_cut_and_budget(explorer) -> None:  # type: ignore[no-untyped-def]
    payload = explorer.export()
    assert [c["name"] for c in payload["controls"]] == ["cut", "budget"]
    assert len(payload["grid"]["cells"]) == np.prod([len(c["values"]) for c in payload["controls"]])
    assert len(json.dumps(payload)) < 160_000


def test_restored_by_one_line(explorer) -> None:  # type: ignore[no-untyped-def]
    line = explorer.restoring(explorer.state)
    assert line.startswith("scaling_laws.explore(frame, law='chinchilla', loss='web', cut=")
    again = explore(
        table(), COLUMNS, losses=["web", "code"], starts=30, bootstrap=60,
        **{**explorer.state, "budget": 1e21},
    )  # fmt: skip
    assert again.state["cut"] == explorer.state["cut"]


def test_a_table_of_one_size_alone_is_a_power_law() -> None:
    x = np.geomspace(1e2, 1e6, 20)
    rng = np.random.default_rng(0)
    loss = (0.4 + 3 * x**-0.4) * np.exp(0.003 * rng.standard_normal(20))
    explorer = explore(pd.DataFrame({"x": x, "loss": loss}), starts=20, bootstrap=50)
    assert [c.name for c in explorer.controls] == ["law", "loss", "cut", "delta", "pair", "bands"]
    result = explorer.result()
    assert result["error"] < 0.05 and len(explorer.panels) == 4
    explorer.figure()


def test_a_table_no_law_can_read_is_refused_with_the_first_reason() -> None:
    with pytest.raises(ValueError, match=r"columns: no column for N \(parameters\)"):
        explore(pd.DataFrame({"size": [1.0, 2], "loss": [3.0, 2]}))


def test_endless_bands_are_drawn_only_so_far() -> None:
    frame = table().sample(9, random_state=0)  # nine runs: refits that extrapolate to anything
    found = explore(frame, COLUMNS, starts=20, bootstrap=60)
    for cut in found.control("cut").values:
        drawn = found.result(cut=cut, budget=1e24)
        for key in ("y_high", "iso_high", "out_high"):
            assert (drawn[key] <= 3 * frame.web.max()).all() and (drawn[key] > 0).all()
