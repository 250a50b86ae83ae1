"""Explorer of the benchmark study: do two measurements rank the networks alike?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import kendalltau

from workbench.calibration import measures
from workbench.calibration.bins import bin_statistics, equal_width_edges, top_label
from workbench.calibration.calib_benchmark import BIN_COUNTS, Predictions
from workbench.calibration.temperature import fit_temperature
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Bars,
    Choice,
    Diagonal,
    Explorer,
    Panel,
    Points,
    Readout,
    Steps,
)

STAGES = {"before": "before scaling", "after": "after scaling"}
SHOWN_BINS = 15

SCRIPT = r"""
function (controls, data) {
  const pick = (stage, bins) => data[stage][data.bin_counts.indexOf(bins)];
  const x = pick(controls.x_stage, controls.x_bins), y = pick(controls.y_stage, controls.y_bins);
  let same = 0, ties_x = 0, ties_y = 0;
  for (let i = 0; i < x.length; i++) {
    for (let j = 0; j < i; j++) {
      const a = Math.sign(x[i] - x[j]), b = Math.sign(y[i] - y[j]);
      same += a * b; ties_x += a * a; ties_y += b * b;
    }
  }
  const i = data.names.indexOf(controls.network), shown = data["shown_" + controls.x_stage];
  return {
    x: x, y: y, names: data.names, accuracies: data.accuracies,
    tau: same / Math.sqrt(ties_x * ties_y),
    here_x: [x[i]], here_y: [y[i]],
    mid: data.mid, width: data.width, accuracy_bin: shown.accuracy[i],
    confidence_bin: shown.confidence[i], share: shown.share[i],
    name: controls.network, stage: data.stages[controls.x_stage],
    accuracy: data.accuracies[i], temperature: data.temperatures[i], ece: x[i]
  };
}
"""


def explore_benchmark(
    models: Mapping[str, Predictions],
    **state: Any,
) -> Explorer:
    """Each point is one network: its ECE at one number of bins against another, or before against
    after temperature scaling; click one to see its reliability diagram.

    Args:
        models: predictions of each network, by name.
        state: where the controls start: `x_bins`, `x_stage`, `y_bins`, `y_stage`, `network`.
    """
    if len(models) < 2:
        raise ValueError("models: expected at least two networks")
    names = list(models)
    rows = [_measured(model) for model in models.values()]
    data: dict[str, Any] = {
        "names": names, "bin_counts": list(BIN_COUNTS), "stages": STAGES,
        "mid": (np.arange(SHOWN_BINS) + 0.5) / SHOWN_BINS,
        "width": np.full(SHOWN_BINS, 1 / SHOWN_BINS),
        "accuracies": np.array([row["accuracy"] for row in rows]),
        "temperatures": np.array([row["temperature"] for row in rows]),
    }  # fmt: skip
    for stage in STAGES:
        data[stage] = np.array([row[stage] for row in rows]).T
        data[f"shown_{stage}"] = {
            key: [[_rounded(v) for v in row[f"shown_{stage}"][key]] for row in rows]
            for key in ("accuracy", "confidence", "share")
        }

    def compute(
        x_bins: int, x_stage: str, y_bins: int, y_stage: str, network: str
    ) -> dict[str, Any]:
        x, y = (
            data[stage][BIN_COUNTS.index(bins)]
            for stage, bins in ((x_stage, x_bins), (y_stage, y_bins))
        )
        i = names.index(network)
        shown = {k: np.array(v[i], float) for k, v in data[f"shown_{x_stage}"].items()}
        return {
            "x": x, "y": y, "names": names, "accuracies": data["accuracies"],
            "tau": float(kendalltau(x, y).statistic), "here_x": x[i : i + 1],
            "here_y": y[i : i + 1], "mid": data["mid"], "width": data["width"],
            "accuracy_bin": shown["accuracy"], "confidence_bin": shown["confidence"],
            "share": shown["share"], "name": network, "stage": STAGES[x_stage],
            "accuracy": float(data["accuracies"][i]),
            "temperature": float(data["temperatures"][i]), "ece": float(x[i]),
        }  # fmt: skip

    top = float(np.ceil(20 * max(data[stage].max() for stage in STAGES)) / 20)
    spread = (float(data["accuracies"].min()), float(data["accuracies"].max()) + 1e-9)
    explorer = Explorer(
        name="calibration.benchmark",
        title="Two measurements of the same networks: is it the same ranking?",
        about="Click a network to see its reliability diagram.",
        controls=[
            Steps("x_bins", "Bins across", BIN_COUNTS, 15),
            Choice("x_stage", "Across", tuple(STAGES), "before", labels=tuple(STAGES.values())),
            Steps("y_bins", "Bins up", BIN_COUNTS, 15),
            Choice("y_stage", "Up", tuple(STAGES), "after", labels=tuple(STAGES.values())),
            Choice("network", "Network", names, names[0]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Rank correlation τ = {tau:.2f}",
                x=Axis("ECE across", (0, top)), y=Axis("ECE up", (0, top)),
                draws=[
                    Points("x", "y", label="accuracy", value="accuracies", scale=spread,
                           hover="names", click="network"),
                    Points("here_x", "here_y", label="chosen", symbol="ring", size=13,
                           color="vermillion"),
                    Diagonal("equal"),
                ],
                square=True,
            ),
            Panel(
                "{name} {stage}: ECE {ece:.4f}",
                x=Axis("confidence", (0, 1)), y=Axis("share of right predictions", (0, 1)),
                draws=[
                    Bars("mid", "accuracy_bin", width="width", label="accuracy", color="blue",
                         opacity=0.6),
                    Bars("mid", "confidence_bin", width="width", base="accuracy_bin",
                         label="gap", color="vermillion", opacity=0.35),
                    Diagonal("calibrated"),
                ],
                square=True,
            ),
        ],
        readouts=[
            Readout("tau", "Kendall's τ", ".3f"), Readout("accuracy", "Accuracy", ".3f"),
            Readout("temperature", "Fitted temperature", ".3f"),
        ],
        script=SCRIPT,
        data=data,
        call="calibration.explore_benchmark(models, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def _measured(model: Predictions) -> dict[str, Any]:
    logits = checks.to_numpy(checks.as_logits(model.logits)).astype(np.float64)
    temperature = fit_temperature(model.validation_logits, model.validation_labels)
    row: dict[str, Any] = {"temperature": temperature}
    for stage, t in zip(STAGES, (1.0, temperature), strict=True):
        top = top_label(softmax(logits / t, axis=1), model.labels)
        found = [
            bin_statistics(top.confidence, top.correct, equal_width_edges(b)) for b in BIN_COUNTS
        ]
        row[stage] = [float(measures.gap_error(s.count, s.total)) for s in found]
        shown = found[BIN_COUNTS.index(SHOWN_BINS)]
        row[f"shown_{stage}"] = {
            "accuracy": shown.accuracy, "confidence": shown.confidence,
            "share": shown.size / shown.n,
        }  # fmt: skip
        row["accuracy"] = float(top.correct.mean())
    return row


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.4g}")
