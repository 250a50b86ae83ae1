r"""Losses between the nodes of a square grid, and what the explorer draws from them.

The same numbers twice: here for a kernel, in `SCRIPT` for the exported page; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

WINDOW = 25  # nodes a side of the zoomed view
DRAWN = 33  # nodes a side with which a coarser plane is drawn
STEPS = 81  # points of the profile along the line
FINER = 8  # times smaller is the step of differences where losses are evaluated for it
BEYOND = 0.35  # of the profile's range, up to which the parabola is drawn

SCRIPT = """
function (controls, data) {
  const c = controls, R = data.radius, W = data.window, T = data.steps;
  const plane = data.planes[c.plane + " " + c.draw] || data.planes[c.plane];
  const z = plane.loss, n = z.length, gap = 2 * R / (n - 1);
  function edge(row) {
    return [2 * row[0] - row[1], ...row, 2 * row[row.length - 1] - row[row.length - 2]];
  }
  const rows = z.map(edge), padded = [
    rows[0].map((v, i) => 2 * v - rows[1][i]), ...rows,
    rows[n - 1].map((v, i) => 2 * v - rows[n - 2][i])
  ];
  function taps(x) {
    const u = Math.min(n - 1, Math.max(0, (x + R) / gap)), i = Math.min(Math.floor(u), n - 2);
    const f = u - i, g = f * f, h = f * g;
    return [i, [2 * g - f - h, 2 - 5 * g + 3 * h, f + 4 * g - 3 * h, h - g].map(v => v / 2)];
  }
  function loss(a, b) {
    const [i, p] = taps(a), [j, q] = taps(b);
    let sum = 0, low = Infinity, high = -Infinity;
    for (let k = 0; k < 4; k++) {
      for (let l = 0; l < 4; l++) {
        const v = padded[j + l][i + k];
        sum += p[k] * q[l] * v;
        low = Math.min(low, v);
        high = Math.max(high, v);
      }
    }
    return Math.min(high, Math.max(low, sum));
  }
  let tiny = Infinity;
  z.forEach(row => row.forEach(v => { if (v > 0 && v < tiny) { tiny = v; } }));
  if (tiny === Infinity) { tiny = 1; }
  const shown = v => c.log ? Math.log10(Math.max(v, tiny)) : v;
  const ends = at => [Math.max(-R, at - c.zoom), Math.min(R, at + c.zoom)];
  function nodes(at) {
    const [low, high] = ends(at);
    return Array.from({length: W}, (_, i) => low + (high - low) * i / (W - 1));
  }
  const wa = nodes(c.a), wb = nodes(c.b), near = wb.map(b => wa.map(a => loss(a, b)));
  const ua = c.a1 - c.a0, ub = c.b1 - c.b0, length = Math.hypot(ua, ub);
  function at(s) {
    const share = length > 0 ? s / length : 0;
    return loss(c.a0 + ua * share, c.b0 + ub * share);
  }
  const s = Array.from({length: T}, (_, i) => length * i / (T - 1)), f = s.map(at);
  const h = Math.min(gap, length / 2);
  let foot = length > 0 ? ((c.a - c.a0) * ua + (c.b - c.b0) * ub) / length : 0;
  foot = Math.min(length - h, Math.max(h, foot));
  let slope = 0, bend = 0;
  const middle = at(foot);
  if (h > 0) {
    const before = at(foot - h), after = at(foot + h);
    slope = (after - before) / (2 * h);
    bend = (after - 2 * middle + before) / (h * h);
  }
  const square = length > 0
    ? (plane.gram[0] * ua * ua + 2 * plane.gram[1] * ua * ub + plane.gram[2] * ub * ub)
      / (length * length) : 1;
  const least = Math.min(...f), most = Math.max(...f), beyond = data.beyond * (most - least);
  const p = s.map(v => middle + slope * (v - foot) + bend * (v - foot) * (v - foot) / 2);
  const fits = v => v >= Math.max(least - beyond, c.log ? tiny : -Infinity) && v <= most + beyond;
  let first = Math.floor(length > 0 ? foot / length * (T - 1) + 0.5 : 0), last = first;
  while (first > 0 && fits(p[first - 1])) { first--; }
  while (last < T - 1 && fits(p[last + 1])) { last++; }
  let barrier = 0;
  f.forEach((v, i) => {
    const t = i / (T - 1);
    barrier = Math.max(barrier, v - f[0] - t * (f[T - 1] - f[0]));
  });
  if (barrier < 1e-9 * Math.max(Math.abs(least), Math.abs(most))) { barrier = 0; } // rounding
  const drawn = Math.max(n, data.drawn);
  const all = Array.from({length: drawn}, (_, i) => -R + 2 * R * i / (drawn - 1));
  const [al, ah] = ends(c.a), [bl, bh] = ends(c.b);
  return {
    nodes: all, z: (n < data.drawn ? all.map(b => all.map(a => loss(a, b))) : z)
      .map(row => row.map(shown)),
    window_a: wa, window_b: wb, window_z: near.map(row => row.map(shown)),
    box_a: [al, ah, ah, al, al], box_b: [bl, bl, bh, bh, bl],
    path_a: plane.path_a, path_b: plane.path_b, last_a: plane.path_a.slice(-1),
    last_b: plane.path_b.slice(-1), line_a: [c.a0, c.a1], line_b: [c.b0, c.b1],
    s: s, profile: f.map(shown), parabola_s: s.slice(first, last + 1),
    parabola: p.slice(first, last + 1).map(shown), foot: foot,
    at_center: loss(c.a, c.b), lowest: Math.min(...near.map(row => Math.min(...row))),
    barrier: barrier, curvature: bend / square, quantity: c.log ? "log\\u2081\\u2080 loss" : "loss",
    plane_title: plane.title, evaluated: plane.evaluated
  };
}
"""


class Square:
    """A function on [-radius, radius]^2, known at the nodes of a uniform grid.

    Between them it is the cubic convolution of the four nodes on each side (Keys, 1981, exact for
    bilinear functions), held between the smallest and largest of its sixteen nodes, so that a steep
    wall rings neither below the valley nor below zero.
    """

    def __init__(self, loss: Float[np.ndarray, "n n"], radius: float) -> None:
        self.loss, self.radius, self.n = loss, radius, len(loss)
        self.gap = 2 * radius / (self.n - 1)
        wide = np.concatenate([2 * loss[:1] - loss[1:2], loss, 2 * loss[-1:] - loss[-2:-1]])
        before, after = 2 * wide[:, :1] - wide[:, 1:2], 2 * wide[:, -1:] - wide[:, -2:-1]
        self._padded = np.concatenate([before, wide, after], axis=1)

    def _taps(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (m, 4) into the padded grid and their weights."""
        u = np.clip((x + self.radius) / self.gap, 0, self.n - 1)
        i = np.minimum(np.floor(u).astype(int), self.n - 2)
        f = u - i
        g, h = f * f, f * f * f
        weights = np.stack([2 * g - f - h, 2 - 5 * g + 3 * h, f + 4 * g - 3 * h, h - g], -1)
        return i[:, None] + np.arange(4), weights / 2

    def at(self, a: Any, b: Any) -> np.ndarray:
        """Values at the points (a, b), each of shape (m,)."""
        (i, p), (j, q) = self._taps(np.atleast_1d(a)), self._taps(np.atleast_1d(b))
        near = self._padded[j[:, :, None], i[:, None, :]]
        return _held(np.einsum("mk,ml,mkl->m", q, p, near), near, (1, 2))

    def mesh(self, a: np.ndarray, b: np.ndarray) -> Float[np.ndarray, "rows columns"]:
        """Values at all pairs: rows along b, columns along a."""
        (i, p), (j, q) = self._taps(a), self._taps(b)
        near = self._padded[j[:, None, :, None], i[None, :, None, :]]
        return _held(np.einsum("rl,ck,rclk->rc", q, p, near), near, (2, 3))


def _held(values: np.ndarray, near: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    return np.clip(values, near.min(axes), near.max(axes))


def window(center: float, radius: float, reach: float) -> Float[np.ndarray, " w"]:
    """Nodes of the zoomed view along one axis: `center` plus or minus `radius`, within reach."""
    low, high = max(-reach, center - radius), min(reach, center + radius)
    return low + (high - low) * np.arange(WINDOW) / (WINDOW - 1)


def line(a0: float, b0: float, a1: float, b1: float, s: Any) -> tuple[np.ndarray, np.ndarray]:
    """The points at distances `s` from the start of the line."""
    length = float(np.hypot(a1 - a0, b1 - b0))
    share = np.asarray(s, float) / length if length else np.zeros(np.shape(s))
    return a0 + (a1 - a0) * share, b0 + (b1 - b0) * share


def stations(
    gap: float, a: float, b: float, a0: float, b0: float, a1: float, b1: float
) -> tuple[np.ndarray, float, float]:
    """Distances along the line, the one nearest to (a, b) that has room, and the step there."""
    ua, ub = a1 - a0, b1 - b0
    length = float(np.hypot(ua, ub))
    h = min(gap, length / 2)
    foot = ((a - a0) * ua + (b - b0) * ub) / length if length else 0.0
    return length * np.arange(STEPS) / (STEPS - 1), min(length - h, max(h, foot)), h


def view(
    plane: Mapping[str, Any],
    square: Square,
    *,
    near: np.ndarray | None = None,
    along: np.ndarray | None = None,
    a: float,
    b: float,
    zoom: float,
    log: bool,
    a0: float,
    b0: float,
    a1: float,
    b1: float,
) -> dict[str, Any]:
    """Everything that the explorer draws at one state of its controls.

    Args:
        plane: `gram` (3,), `path_a`, `path_b`, `title` and `evaluated`.
        square: losses of the whole plane.
        near: losses at the nodes of `window`, if known better than from `square`.
        along: losses at the stations of the line, a `FINER` step before, at and after its foot,
            and at the centre, if known better than from `square`.
        a, b, zoom: centre and radius of the zoomed view.
        log: whether to show the logarithm.
        a0, b0, a1, b1: ends of the line.
    """
    reach, ua, ub = square.radius, a1 - a0, b1 - b0
    wa, wb = window(a, zoom, reach), window(b, zoom, reach)
    if near is None:
        near = square.mesh(wa, wb)
    s, foot, h = stations(square.gap, a, b, a0, b0, a1, b1)
    if along is not None:
        h /= FINER
    else:
        at, bt = line(a0, b0, a1, b1, np.concatenate([s, [foot - h, foot, foot + h]]))
        along = square.at(np.append(at, a), np.append(bt, b))
    f, (before, middle, after, center) = along[:STEPS], along[STEPS:]
    slope = (after - before) / (2 * h) if h else 0.0
    bend = (after - 2 * middle + before) / h**2 if h else 0.0
    length = s[-1]
    g11, g12, g22 = plane["gram"]
    scale = (g11 * ua**2 + 2 * g12 * ua * ub + g22 * ub**2) / length**2 if length else 1.0
    positive = square.loss[square.loss > 0]
    tiny = float(positive.min()) if len(positive) else 1.0

    def shown(values: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(values, tiny)) if log else values

    parabola = middle + slope * (s - foot) + bend * (s - foot) ** 2 / 2
    beyond = BEYOND * float(np.ptp(f))
    fits = (parabola >= max(f.min() - beyond, tiny if log else -np.inf)) & (
        parabola <= f.max() + beyond
    )
    first = last = int(np.floor(foot / length * (STEPS - 1) + 0.5)) if length else 0
    while first > 0 and fits[first - 1]:
        first -= 1
    while last < STEPS - 1 and fits[last + 1]:
        last += 1
    t = np.arange(STEPS) / (STEPS - 1)
    barrier = float((f - f[0] - t * (f[-1] - f[0])).max())
    drawn = max(square.n, DRAWN)
    nodes = -reach + 2 * reach * np.arange(drawn) / (drawn - 1)
    everywhere = square.mesh(nodes, nodes) if square.n < DRAWN else square.loss
    al, ah, bl, bh = wa[0], wa[-1], wb[0], wb[-1]
    return {
        "nodes": nodes, "z": shown(everywhere),
        "window_a": wa, "window_b": wb, "window_z": shown(near),
        "box_a": np.array([al, ah, ah, al, al]), "box_b": np.array([bl, bl, bh, bh, bl]),
        "path_a": plane["path_a"], "path_b": plane["path_b"],
        "last_a": plane["path_a"][-1:], "last_b": plane["path_b"][-1:],
        "line_a": np.array([a0, a1]), "line_b": np.array([b0, b1]),
        "s": s, "profile": shown(f), "parabola_s": s[first : last + 1],
        "parabola": shown(parabola[first : last + 1]), "foot": foot,
        "at_center": float(center), "lowest": float(near.min()),
        "barrier": barrier if barrier >= 1e-9 * np.abs(f).max() else 0.0,  # rounding
        "curvature": float(bend / scale), "quantity": "log₁₀ loss" if log else "loss",
        "plane_title": plane["title"], "evaluated": plane["evaluated"],
    }  # fmt: skip
