"""Explorers of the pull on the temperature: cross-entropy against correctness."""

from typing import Any

import numpy as np
import torch

from workbench.calibration.correctness_aware import temperature_gradients
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)

PATH = np.geomspace(0.1, 10.0, 201)
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
MARKS = {"ce": "least CE", "ca": "least CA"}
EXPORTED = 20_000  # numbers; more logits than this stay in the kernel

_GRADIENTS = """
  function gradients(z, y, t) {
    const top = Math.max(...z), e = z.map(v => Math.exp((v - top) / t));
    const s = e.reduce((a, b) => a + b, 0), p = e.map(v => v / s);
    const mean = p.reduce((a, q, k) => a + q * z[k], 0);
    const m = z.indexOf(top), right = m === y ? 1 : 0, c = p[m];
    return {
      p: p, right: right, confidence: c,
      ce: -(z[y] - top) / t + Math.log(s), ca: (c - right) * (c - right),
      dce: (z[y] - mean) / (t * t), dca: -2 * (c - right) * c * (top - mean) / (t * t)
    };
  }
"""

SIMPLEX_SCRIPT = (
    "function (controls, data) {"
    + _GRADIENTS
    + """
  const z = [controls.z0, controls.z1, controls.z2], y = controls.label;
  const put = p => [p[1] * data.corners[1][0] + p[2] * data.corners[2][0],
                    p[2] * data.corners[2][1]];
  const path = data.path.map(t => gradients(z, y, t));
  const least = key => path.reduce((b, g, i) => g[key] < path[b][key] ? i : b, 0);
  const at = i => put(path[i].p);
  const now = gradients(z, y, controls.temperature);
  const way = g => Math.abs(g) < 1e-9 ? "leaves T" : g < 0 ? "raises T" : "lowers T";
  const ce = at(least("ce")), ca = at(least("ca"));
  return {
    path_x: path.map(g => put(g.p)[0]), path_y: path.map(g => put(g.p)[1]),
    edge_x: [0, 1, 0.5, 0], edge_y: [0, 0, data.corners[2][1], 0],
    corner_x: data.corners.map(c => c[0]), corner_y: data.corners.map(c => c[1]),
    corner_name: [0, 1, 2].map(k => k === y ? "class " + k + " (true)" : "class " + k),
    here_x: [put(now.p)[0]], here_y: [put(now.p)[1]],
    ce_text: [data.marks[0]], ca_text: [data.marks[1]],
    ce_x: [ce[0]], ce_y: [ce[1]], ca_x: [ca[0]], ca_y: [ca[1]],
    t: data.path, ce_curve: path.map(g => g.ce), ca_curve: path.map(g => g.ca),
    ce_grad: now.dce, ca_grad: now.dca, confidence: now.confidence,
    outcome: now.right ? "right" : "wrong", ce_way: way(now.dce), ca_way: way(now.dca)
  };
}
"""
)

PULL_SCRIPT = (
    "function (controls, data) {"
    + _GRADIENTS
    + """
  const t = controls.temperature;
  const all = data.logits.map((z, i) => gradients(z, data.labels[i], t));
  const result = {};
  for (const [name, right] of [["right", 1], ["wrong", 0]]) {
    const part = all.filter(g => g.right === right);
    result[name + "_confidence"] = part.map(g => g.confidence);
    result[name + "_ce"] = part.map(g => -g.dce);
    result[name + "_ca"] = part.map(g => -g.dca);
  }
  const wrong = result.wrong_ce, misled = wrong.filter(v => v < 0).length;
  result.misled = wrong.length ? misled / wrong.length : 0;
  result.mistakes = wrong.length;
  result.mean_ce = -all.reduce((a, g) => a + g.dce, 0) / all.length;
  result.mean_ca = -all.reduce((a, g) => a + g.dca, 0) / all.length;
  return result;
}
"""
)


def explore_simplex(**state: Any) -> Explorer:
    """Three logits, a label and a temperature: where both losses pull the prediction.

    The path is softmax(z/T) from a corner (T small) towards the centre (T large). Markers show
    where on it each loss is least.

    Args:
        state: where the controls start: `z0`, `z1`, `z2`, `label`, `temperature`.
    """

    def compute(z0: float, z1: float, z2: float, label: int, temperature: float) -> dict[str, Any]:
        z = np.array([z0, z1, z2])
        shifted = (z - z.max()) / PATH[:, None]
        e = np.exp(shifted)
        p = e / e.sum(1, keepdims=True)
        m = int(z.argmax())
        ce = -shifted[:, label] + np.log(e.sum(1))
        ca = (p[:, m] - (m == label)) ** 2
        now = np.exp((z - z.max()) / temperature)
        now /= now.sum()
        rows, labels = torch.from_numpy(z)[None], torch.tensor([label])
        dce, dca = (float(g) for g in temperature_gradients(rows, labels, temperature))
        path = p @ CORNERS
        points = {"here": now @ CORNERS, "ce": path[ce.argmin()], "ca": path[ca.argmin()]}
        names = [f"class {k} (true)" if k == label else f"class {k}" for k in range(3)]
        return {
            "path_x": path[:, 0], "path_y": path[:, 1],
            "edge_x": CORNERS[[0, 1, 2, 0], 0], "edge_y": CORNERS[[0, 1, 2, 0], 1],
            "corner_x": CORNERS[:, 0], "corner_y": CORNERS[:, 1], "corner_name": np.array(names),
            **{f"{name}_text": np.array([text]) for name, text in MARKS.items()},
            **{f"{name}_x": xy[:1] for name, xy in points.items()},
            **{f"{name}_y": xy[1:] for name, xy in points.items()},
            "t": PATH, "ce_curve": ce, "ca_curve": ca, "ce_grad": dce, "ca_grad": dca,
            "confidence": now[m], "outcome": "right" if m == label else "wrong",
            "ce_way": _way(dce), "ca_way": _way(dca),
        }  # fmt: skip

    return Explorer(
        name="calibration.correctness_simplex",
        title="Two losses pull on the same temperature",
        about="The black dot is softmax(z/T). Make it narrowly wrong: CE then makes it surer.",
        controls=[
            Slider("z0", "Logit of class 0", -3.0, 3.0, step=0.05, value=0.0),
            Slider("z1", "Logit of class 1", -3.0, 3.0, step=0.05, value=-0.2),
            Slider("z2", "Logit of class 2", -3.0, 3.0, step=0.05, value=-1.6),
            Choice("label", "True class", [0, 1, 2], value=1),
            Slider("temperature", "Temperature T", 0.1, 10.0, value=1.0, log=True),
        ],
        compute=compute,
        panels=[
            Panel(
                "The prediction is {outcome}; cross-entropy {ce_way}, correctness {ca_way}",
                x=Axis("class 0 to class 1", (-0.12, 1.12)),
                y=Axis("share of class 2", (-0.1, 1.02)),
                draws=[
                    Line("edge_x", "edge_y", color="grey", width=1.0),
                    Line("path_x", "path_y", color="sky"),
                    Points("corner_x", "corner_y", text="corner_name", color="grey", size=4),
                    Points("ce_x", "ce_y", text="ce_text", color="blue", symbol="square", size=11),
                    Points("ca_x", "ca_y", text="ca_text", color="vermillion", size=12),
                    Points("here_x", "here_y", color="ink", size=9),
                ],
                square=True,
                legend=False,
                weight=1.15,
            ),
            Panel(
                "Slopes at T = {temperature:.2f}: CE {ce_grad:+.3f}, CA {ca_grad:+.3f}",
                x=Axis("temperature T", (0.1, 10), log=True), y=Axis("loss", (0, 3)),
                draws=[
                    Line("t", "ce_curve", label="cross-entropy", color="blue"),
                    Line("t", "ca_curve", label="correctness-aware", color="vermillion"),
                    VLine("temperature", "T"),
                ],
            ),
        ],
        readouts=[
            Readout("confidence", "Confidence", ".3f"), Readout("ce_grad", "dCE/dT", "+.4f"),
            Readout("ca_grad", "dCA/dT", "+.4f"),
        ],
        script=SIMPLEX_SCRIPT,
        data={"path": PATH, "corners": CORNERS, "marks": [*MARKS.values()]},
        call="calibration.figures_correctness.explore_simplex({state})",
        height=420,
    ).set(**state)  # fmt: skip


def explore_pulls(logits: Any, labels: Any, **state: Any) -> Explorer:
    """Your own predictions: how hard, and which way, each loss pulls on their temperature.

    Args:
        logits: (n, k) scores of a classifier on held-out samples.
        labels: n true classes.
        state: where the slider starts: `temperature`.
    """
    logits = np.asarray(checks.to_numpy(checks.as_logits(logits)), float)
    labels = np.asarray(checks.to_numpy(checks.as_labels(labels, logits.shape[1])))
    checks.same_length(logits=logits, labels=labels)
    right = logits.argmax(1) == labels
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)

    def compute(temperature: float) -> dict[str, Any]:
        pulls = [-gradient.numpy() for gradient in temperature_gradients(z, y, temperature)]
        confidence = (z / temperature).softmax(1).amax(1).numpy()
        result: dict[str, Any] = {}
        for name, part in (("right", right), ("wrong", ~right)):
            result |= {
                f"{name}_confidence": confidence[part],
                f"{name}_ce": pulls[0][part],
                f"{name}_ca": pulls[1][part],
            }
        wrong = result["wrong_ce"]
        return result | {
            "misled": float((wrong < 0).mean()) if len(wrong) else 0.0, "mistakes": len(wrong),
            "mean_ce": float(pulls[0].mean()), "mean_ca": float(pulls[1].mean()),
        }  # fmt: skip

    def panel(title: str, key: str) -> Panel:
        return Panel(
            title, x=Axis("confidence at T", (0, 1)), y=Axis("pull on T (−dloss/dT)"),
            draws=[
                Points("right_confidence", f"right_{key}", label="right", color="blue", size=5,
                       opacity=0.5),
                Points("wrong_confidence", f"wrong_{key}", label="wrong", color="vermillion",
                       symbol="diamond", size=7),
                HLine(0.0),
            ],
        )  # fmt: skip

    small = logits.size <= EXPORTED
    return Explorer(
        name="calibration.correctness_pulls",
        title="Which way each prediction pulls the temperature",
        about="Above zero a sample asks for a higher temperature, below for a lower one.",
        controls=[Slider("temperature", "Temperature T", 0.1, 10.0, value=1.0, log=True)],
        compute=compute,
        panels=[
            panel("Cross-entropy makes {misled:.0%} of {mistakes:d} mistakes surer", "ce"),
            panel("The correctness-aware loss makes none surer", "ca"),
        ],
        readouts=[
            Readout("misled", "Wrong, and made more confident by CE", ".1%"),
            Readout("mean_ce", "Mean pull, CE", "+.4f"),
            Readout("mean_ca", "Mean pull, CA", "+.4f"),
        ],
        script=PULL_SCRIPT if small else None,
        data={"logits": logits, "labels": labels} if small else None,
        call="calibration.figures_correctness.explore_pulls(logits, labels, {state})",
    ).set(**state)  # fmt: skip


def _way(gradient: float) -> str:
    """What descending a loss with this slope does to the temperature."""
    return "leaves T" if abs(gradient) < 1e-9 else "raises T" if gradient < 0 else "lowers T"
