"""Explorers of attentiveness: one question's mass and its bound; prompts by mass and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.calibration.attentiveness import pmv, sfc_immune
from workbench.lab import checks
from workbench.lab.claims import interval
from workbench.plots.explorer import (
    Axis,
    Bars,
    Explorer,
    HLine,
    Panel,
    Points,
    Readout,
    Slider,
    Steps,
    VLine,
)

SCRIPT = """
function (controls, data) {
  const total = Math.max(1, controls.first + controls.second + controls.unseen);
  const pair = [controls.first / total, controls.second / total];
  const first = Math.max(...pair), second = Math.min(...pair);
  const others = Math.min(1 - first - second - controls.unseen / total, 2 * second);
  const clean = x => Math.max(0, x);
  const known = first + second + clean(others), unseen = clean(1 - known);
  const immune = unseen < first - second;
  return {
    row: ["mass"], first: [first], second: [second], others: [clean(others)], unseen: [unseen],
    to_second: [first + second], known: [known], one: [1],
    choice: ["first", "second"], sure: [first, second], top: [first, second + unseen],
    lead_at: first, mass: known, hidden: unseen, lead: first - second,
    verdict: immune ? "cannot change" : "could change"
  };
}
"""


def explore_choices(logp: Any = None, **state: Any) -> Explorer:
    """How much unseen mass a prediction can bear before another wording might overturn it.

    Args:
        logp: (m,) log-probabilities of one question's choices (``option_logprobs``); the sliders
            start there. Without them, at a made-up question.
        state: where the sliders start instead: `first`, `second`, `unseen`.

    Returns:
        The explorer; `.show()` it.
    """
    start = {"first": 0.45, "second": 0.15, "unseen": 0.25}
    if logp is not None:
        p = np.exp(checks.to_numpy(checks.as_floats(logp, "logp", ndim=1)).astype(float))
        if len(p) < 2 or p.sum() > 1 + 1e-6:
            raise ValueError(
                "logp: expected two or more log-probabilities whose masses sum to <= 1"
            )
        top = np.sort(p)[::-1]
        start = {"first": top[0], "second": top[1], "unseen": 1 - p.sum()}
        start = {name: round(float(np.clip(v, 0, 1)), 2) for name, v in start.items()}
    start |= state

    def compute(first: float, second: float, unseen: float) -> dict[str, Any]:
        total = max(1.0, first + second + unseen)
        first, second = sorted((first / total, second / total), reverse=True)
        others = max(0.0, min(1 - first - second - unseen / total, 2 * second))
        with np.errstate(divide="ignore"):
            logp = np.log([first, second, others / 2, others / 2])
        known = float(pmv(logp))
        unseen = max(0.0, 1 - known)
        return {
            "row": np.array(["mass"], dtype=object), "first": [first], "second": [second],
            "others": [others], "unseen": [unseen], "to_second": [first + second],
            "known": [known], "one": [1.0],
            "choice": np.array(["first", "second"], dtype=object), "sure": [first, second],
            "top": [first, second + unseen], "lead_at": first, "mass": known, "hidden": unseen,
            "lead": first - second,
            "verdict": "cannot change" if bool(sfc_immune(logp)) else "could change",
        }  # fmt: skip

    share = Axis("probability", (0, 1))
    explorer = Explorer(
        name="calibration.attentiveness",
        title="How much unseen mass can a prediction bear?",
        about="Raise the unseen mass until it equals the lead of the first choice over the second.",
        controls=[
            Slider("first", "First choice", 0.0, 1.0, step=0.01, value=start["first"]),
            Slider("second", "Second choice", 0.0, 1.0, step=0.01, value=start["second"]),
            Slider("unseen", "Unseen mass", 0.0, 1.0, step=0.01, value=start["unseen"]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Attentiveness PMV = {mass:.2f}; {hidden:.2f} is unseen",
                x=share, y=Axis("", categories=True),
                draws=[
                    Bars("row", "first", label="first choice", color="blue", horizontal=True),
                    Bars("row", "to_second", base="first", label="second choice", color="orange",
                         horizontal=True),
                    Bars("row", "known", base="to_second", label="other choices", color="grey",
                         horizontal=True),
                    Bars("row", "one", base="known", label="unseen: anything else", color="purple",
                         opacity=0.3, horizontal=True),
                ],
            ),
            Panel(
                "If all unseen mass means the second choice, the answer {verdict}",
                x=Axis("choice", categories=True), y=share,
                draws=[
                    Bars("choice", "sure", label="its own wording", color="blue"),
                    Bars("choice", "top", base="sure", label="all unseen mass", color="purple",
                         opacity=0.3),
                    HLine("lead_at", "first choice"),
                ],
            ),
        ],
        readouts=[
            Readout("mass", "PMV", ".3f"), Readout("hidden", "unseen, at most SFC", ".3f"),
            Readout("lead", "lead of the first", ".3f"), Readout("verdict", "answer"),
        ],
        script=SCRIPT,
        data={},
        call="calibration.figures_attentiveness.explore_choices({state})",
    )  # fmt: skip
    return explorer


def explore_prompts(
    table: pd.DataFrame, shots: int | None = None, *, group: str = "mixture"
) -> Explorer:
    """Prompts by the mass they put on the choices and the accuracy they give.

    Args:
        table: one row a run, with columns `format`, `shots`, `pmv`, `accuracy`, `seed` and
            ``group``; for several scorers of one format, give the rows of one.
        shots: where the slider starts; by default at the second number of demonstrations.
        group: what tells the models apart.

    Returns:
        The explorer; `.show()` it.
    """
    needed = ("format", "shots", "pmv", "accuracy", "seed", group)
    if absent := [name for name in needed if name not in table]:
        raise ValueError(f"table: has no column {absent[0]!r}; it needs {', '.join(needed)}")
    counts = sorted(int(s) for s in table["shots"].unique())
    models = list(dict.fromkeys(table[group]))
    formats = list(dict.fromkeys(table["format"]))
    first = counts[min(1, len(counts) - 1)] if shots is None else shots

    def cell(rows: pd.DataFrame) -> tuple[float, ...]:
        low, high = _interval(rows["accuracy"].to_numpy())
        return float(rows["pmv"].mean()), float(rows["accuracy"].mean()), low, high

    def compute(shots: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        now = table[table["shots"] == shots]
        for i, model in enumerate(models):
            shown = [f for f in formats if ((now[group] == model) & (now["format"] == f)).any()]
            cells = [cell(now[(now[group] == model) & (now["format"] == f)]) for f in shown]
            for name, column in zip(
                ("x", "y", "low", "high"), zip(*cells, strict=True), strict=True
            ):
                out[f"{name}{i}"] = np.array(column)
            out[f"text{i}"] = np.array(shown, dtype=object)
        both = now[["pmv", "accuracy"]].to_numpy(float)
        varied = len(both) > 2 and (np.ptp(both, axis=0) > 0).all()
        out["r"] = float(np.corrcoef(both.T)[0, 1]) if varied else float("nan")
        return out

    symbols, colors = ("circle", "diamond", "square", "cross"), ("blue", "vermillion", "green")
    return Explorer(
        name="calibration.prompts",
        title="Mass on the choices, and accuracy",
        about="Each point is a model and a prompt format; move the number of demonstrations.",
        controls=[Steps("shots", "Demonstrations", counts, value=first)],
        compute=compute,
        panels=[
            Panel(
                "Mass and accuracy over all prompts: correlation {r:.2f}",
                x=Axis("mean PMV", (-0.03, 1.12)), y=Axis("accuracy", (0, 1.03)),
                draws=[
                    *(
                        Points(f"x{i}", f"y{i}", label=str(model), text=f"text{i}",
                               low=f"low{i}", high=f"high{i}", size=10.0,
                               symbol=symbols[i % 4], color=colors[i % 3])
                        for i, model in enumerate(models)
                    ),
                    VLine(1.0, "all mass on the choices", color="grey"),
                ],
            )
        ],
        readouts=[Readout("r", "correlation", ".2f")],
        grid={"shots": counts},
        call="calibration.figures_attentiveness.explore_prompts(table, {state})",
    )  # fmt: skip


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean; the value itself for a single run."""
    return interval(values) if len(values) > 1 else (float(values[0]), float(values[0]))
