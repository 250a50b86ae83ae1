"""Explorer of the robust loss: which temperature a KL budget asks for, prediction by prediction."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workbench.calibration.tempnet import optimal_tau
from workbench.lab import checks
from workbench.plots.explorer import (
    Axis,
    Bars,
    Explorer,
    HLine,
    Line,
    Panel,
    Passage,
    Points,
    Readout,
    Slider,
    VLine,
)

SHOWN = 12
TAU = (0.01, 10.0)
CURVE = np.geomspace(*TAU, 81)
EXPORTED = 30_000  # numbers; more logits than this stay in the kernel

SCRIPT = """
function (controls, data) {
  const logK = Math.log(data.logits[0].length);
  const rho = controls.share * logK;
  function softmax(h, t) {
    const top = Math.max(...h), e = h.map(v => Math.exp((v - top) / t));
    const s = e.reduce((a, b) => a + b, 0);
    return e.map(v => v / s);
  }
  function kl(h, t) {
    return softmax(h, t).reduce((a, p) => a + (p > 0 ? p * Math.log(p) : 0), logK);
  }
  function solve(h) {
    const bounds = [data.curve[0], data.curve[data.curve.length - 1]];
    if (kl(h, bounds[0]) <= rho) return bounds[0];
    if (kl(h, bounds[1]) >= rho) return bounds[1];
    let low = Math.log(bounds[0]), high = Math.log(bounds[1]);
    for (let i = 0; i < 45; i++) {
      const mid = (low + high) / 2;
      if (kl(h, Math.exp(mid)) > rho) low = mid; else high = mid;
    }
    return Math.exp((low + high) / 2);
  }
  const h = data.logits[controls.row], tau = solve(h);
  const order = h.map((v, k) => k).sort((a, b) => h[b] - h[a] || a - b).slice(0, data.shown);
  const one = softmax(h, 1), star = softmax(h, tau);
  const result = {
    names: order.map(k => data.names[k]), p_one: order.map(k => one[k]),
    p_star: order.map(k => star[k]), curve_tau: data.curve,
    curve_kl: data.curve.map(t => kl(h, t)), rho: rho, tau: tau,
    kl_one: kl(h, 1), entropy: logK - kl(h, tau)
  };
  if (data.tokens) {
    result.tokens = data.tokens;
    result.shade = data.logits.map(solve);
  }
  return result;
}
"""


def explore_temperature(
    logits: Any = None,
    names: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    **state: Any,
) -> Explorer:
    """Move the KL budget and see the temperature it forces on each of your predictions.

    Args:
        logits: (n, k) scores of a classifier or of a language model's next tokens. Without them,
            four made-up predictions with 1, 2, 4 and 8 equally good options of 50.
        names: what the k classes are called.
        tokens: n strings, what stood at each position; they are shown shaded by temperature.
        state: where the sliders start: `row`, and `share` of log k.

    Returns:
        The explorer; `.show()` it.
    """
    given = [] if logits is None else ["logits", "names", "tokens"]
    if logits is None:
        logits, names = _options()
    logits = np.asarray(checks.to_numpy(checks.as_logits(logits)), float)
    n, k = logits.shape
    names = _unique([f"class {j}" for j in range(k)] if names is None else names, k, "names")
    if tokens is not None and len(tokens) != n:
        raise ValueError(f"tokens: expected {n} strings, one per row of logits, got {len(tokens)}")
    tensor, log_k = torch.from_numpy(logits), math.log(k)

    def solve(rows: torch.Tensor, rho: float) -> np.ndarray:
        return optimal_tau(rows, rho, tau_min=TAU[0], tau_max=TAU[1]).numpy()

    def compute(row: int, share: float) -> dict[str, Any]:
        h, rho = logits[row], share * log_k
        tau = float(solve(tensor[row : row + 1], rho)[0])
        order = np.argsort(-h, kind="stable")[:SHOWN]
        one, star = _softmax(h, 1.0), _softmax(h, tau)
        result = {
            "names": np.array(names)[order], "p_one": one[order], "p_star": star[order],
            "curve_tau": CURVE, "curve_kl": np.array([_kl(h, t) for t in CURVE]),
            "rho": rho, "tau": tau, "kl_one": _kl(h, 1.0), "entropy": log_k - _kl(h, tau),
        }  # fmt: skip
        if tokens is not None:
            result |= {"tokens": np.array(tokens, dtype=object), "shade": solve(tensor, rho)}
        return result

    passages = [] if tokens is None else [
        Passage("Temperature that the budget asks for, at every token", "tokens", "shade",
                scale=(0.0, 2.0), label="τ*")
    ]  # fmt: skip
    data = {"logits": logits, "names": names, "curve": CURVE, "shown": SHOWN}
    if tokens is not None:
        data["tokens"] = list(tokens)
    small = logits.size <= EXPORTED
    explorer = Explorer(
        name="calibration.temperature_budget",
        title="A KL budget decides the temperature of every prediction",
        about="Raise the budget: every prediction cools until its entropy is log K − ρ.",
        controls=[
            Slider("row", "Prediction", 0, max(n - 1, 1), step=1, value=0),
            Slider("share", "Budget ρ / log K", 0.05, 0.98, step=0.01, value=0.75),
        ],
        compute=lambda row, share: compute(min(row, n - 1), share),
        panels=[
            Panel(
                "At τ* = {tau:.3f} the entropy is {entropy:.3f} nats",
                x=Axis("best classes", categories=True), y=Axis("probability", (0, 1)),
                draws=[
                    Bars("names", "p_star", label="softmax(h/τ*)", color="blue"),
                    Points("names", "p_one", label="softmax(h)", color="vermillion",
                           symbol="ring", size=10),
                ],
            ),
            Panel(
                "τ* is where the KL to uniform equals ρ = {rho:.3f}",
                x=Axis("temperature τ", TAU, log=True),
                y=Axis("KL to uniform", (0, log_k), unit="nats"),
                draws=[
                    Line("curve_tau", "curve_kl", label="KL(softmax(h/τ) || 1/K)"),
                    HLine("rho", "ρ"), VLine("tau", "τ*", color="vermillion"),
                ],
                legend=False,
            ),
        ],
        readouts=[
            Readout("tau", "τ*", ".4f"), Readout("kl_one", "KL at τ = 1", ".3f", unit="nats"),
            Readout("entropy", "entropy at τ*", ".3f", unit="nats"),
        ],
        passages=passages,
        script=SCRIPT if small and n > 1 else None,
        data=data if small and n > 1 else None,
        call=f"calibration.figures_tempnet.explore_temperature({', '.join([*given, '{state}'])})",
    )  # fmt: skip
    return explorer.set(**state)


def _options() -> tuple[np.ndarray, list[str]]:
    """Predictions over 50 classes in which 1, 2, 4 and 8 options are equally good."""
    logits = np.zeros((4, 50))
    for row, good in enumerate((1, 2, 4, 8)):
        logits[row, :good] = 6.0
    return logits, [f"option {j + 1}" for j in range(50)]


def _unique(names: Sequence[str], k: int, argument: str) -> list[str]:
    """Names as strings a reader can see, told apart where two are equal."""
    if len(names) != k:
        raise ValueError(f"{argument}: expected {k} names, one per class, got {len(names)}")
    visible = {" ": "␣", "\n": "↵", "\t": "⇥"}
    shown = [visible.get(str(name), str(name)) for name in names]
    seen: dict[str, int] = {}
    for j, name in enumerate(shown):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            shown[j] = f"{name} ({seen[name]})"
    return shown


def _softmax(h: np.ndarray, t: float) -> np.ndarray:
    e = np.exp((h - h.max()) / t)
    return e / e.sum()


def _kl(h: np.ndarray, t: float) -> float:
    p = _softmax(h, t)
    p = p[p > 0]
    return float((p * np.log(p)).sum() + math.log(len(h)))
