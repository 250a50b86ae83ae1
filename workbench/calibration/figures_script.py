"""The reliability explorer's formula in JavaScript, for the exported page.

It does what `figures.Predictions.result` does on the rows it is given; a test compares the two.
"""

SCRIPT = r"""
function (controls, data) {
  const n = data.labels.length, K = data.scores[0].length, B = controls.bins;
  const sum = a => a.reduce((s, v) => s + v, 0);
  const meanError = v => {
    const m = sum(v) / v.length;
    const d = Math.sqrt(Math.max(0, sum(v.map(x => (x - m) * (x - m))) / v.length));
    return [m, d / Math.sqrt(Math.max(v.length - 1, 1))];
  };
  function erf(x) {
    if (Math.abs(x) > 4.5) return Math.sign(x);
    let term = x, total = x;
    for (let k = 1; k < 120; k++) { term *= -x * x / k; total += term / (2 * k + 1); }
    return 2 / Math.sqrt(Math.PI) * total;
  }

  // confidence and correctness of every row, by hand or as recalibrated beforehand
  let conf = [], right = [], nll = [], brier = [], inForce = controls.temperature;
  const method = data.methods.indexOf(controls.recalibrator);
  if (method < 0) {
    for (let i = 0; i < n; i++) {
      const z = data.scores[i], y = data.labels[i];
      let total = 0, squares = 0;
      for (let k = 0; k < K; k++) {
        const e = Math.exp(z[k] / inForce);
        total += e; squares += e * e;
      }
      const p = Math.exp(z[y] / inForce) / total;
      conf.push(1 / total);
      right.push(z.indexOf(0) === y ? 1 : 0);
      nll.push(Math.log(total) - z[y] / inForce);
      brier.push(squares / (total * total) - 2 * p + 1);
    }
    nll = meanError(nll); brier = meanError(brier);
  } else {
    conf = data.confidence[method]; right = data.correct[method];
    const numbers = data.numbers[method];
    nll = numbers.slice(0, 2); brier = numbers.slice(2, 4); inForce = numbers[4];
  }

  // edges of the bins
  const order = conf.map((c, i) => i).sort((a, b) => conf[a] - conf[b] || a - b);
  function quantiles(bins) {
    const inner = [];
    for (let j = 1; j < bins; j++) {
      const e = conf[order[Math.ceil(j * n / bins) - 1]];
      if (e > 0 && e < conf[order[n - 1]] && e !== inner[inner.length - 1]) inner.push(e);
    }
    return [0, ...inner, 1];
  }
  function fill(edges) {
    const m = edges.length - 1;
    const s = {size: new Array(m).fill(0), right: new Array(m).fill(0),
               conf: new Array(m).fill(0), square: new Array(m).fill(0)};
    let b = 0;
    for (const i of order) {
      while (b < m - 1 && conf[i] > edges[b + 1]) b++;
      s.size[b] += 1; s.right[b] += right[i];
      s.conf[b] += conf[i]; s.square[b] += conf[i] * conf[i];
    }
    return s;
  }
  let edges = [], s = null;
  if (controls.scheme === "equal-width") {
    for (let b = 0; b < B; b++) edges.push(b * (1 / B));
    edges.push(1); s = fill(edges);
  } else if (controls.scheme === "equal-mass") {
    edges = quantiles(B); s = fill(edges);
  } else {
    edges = quantiles(1); s = fill(edges);
    for (let bins = 2; bins <= n; bins++) {
      const finer = quantiles(bins), t = fill(finer);
      const rising = t.right.every((r, b) => b === 0 ||
        r / t.size[b] - t.right[b - 1] / t.size[b - 1] >= 0);
      if (finer.length <= bins || !rising) break;
      edges = finer; s = t;
    }
  }

  // the error and its interval
  const m = s.size.length, full = s.size.map((v, b) => b).filter(b => s.size[b] > 0);
  const acc = s.right.map((r, b) => s.size[b] ? r / s.size[b] : null);
  const mean = s.conf.map((c, b) => s.size[b] ? c / s.size[b] : null);
  const gap = b => Math.abs(acc[b] - mean[b]), w = b => s.size[b] / n;
  const s2 = b => acc[b] * (1 - acc[b]) / Math.max(s.size[b] - 1, 1);
  let error, low, high;
  if (controls.norm === "max") {
    const z = data.z_bins[full.length - 1];
    error = Math.max(...full.map(gap));
    low = Math.max(0, ...full.map(b => gap(b) - z * Math.sqrt(s2(b))));
    high = Math.max(...full.map(b => gap(b) + z * Math.sqrt(s2(b))));
  } else if (controls.norm === "l2") {
    error = Math.sqrt(sum(full.map(b => w(b) * gap(b) * gap(b))));
    const centre = sum(full.map(b => w(b) * (gap(b) * gap(b) - s2(b))));
    const reach = data.z * Math.sqrt(sum(full.map(b =>
      w(b) * w(b) * (4 * gap(b) * gap(b) * s2(b) + 2 * s2(b) * s2(b)))));
    low = Math.sqrt(Math.max(0, centre - reach)); high = Math.sqrt(Math.max(0, centre + reach));
  } else {
    error = sum(full.map(b => w(b) * gap(b)));
    const folded = b => {
      const d = Math.sqrt(Math.max(s2(b), 1e-300)), g = gap(b);
      return d * Math.sqrt(2 / Math.PI) * Math.exp(-g * g / (2 * d * d)) +
        g * erf(g / (d * Math.SQRT2));
    };
    const centre = 2 * error - sum(full.map(b => w(b) * folded(b)));
    const reach = data.z * Math.sqrt(sum(full.map(b => w(b) * w(b) * s2(b))));
    const spread = full.map(b => Math.max(0, s.conf[b] - s.square[b]));
    const noise = Math.sqrt(2 / Math.PI) * sum(spread.map(Math.sqrt)) +
      data.z * Math.sqrt((1 - 2 / Math.PI) * sum(spread));
    low = error <= noise / n ? 0 : Math.max(0, centre - reach);
    high = Math.max(0, centre + reach);
  }
  const accuracy = sum(s.right) / n, confidence = sum(s.conf) / n, z2 = data.z * data.z;
  const wilson = (b, sign) => {
    if (!s.size[b]) return null;
    const p = acc[b], k = s.size[b];
    return (p + z2 / (2 * k) + sign * data.z * Math.sqrt(p * (1 - p) / k + z2 / (4 * k * k))) /
      (1 + z2 / k);
  };
  const bins = s.size.map((v, b) => b);
  return {
    mid: bins.map(b => (edges[b] + edges[b + 1]) / 2),
    width: bins.map(b => edges[b + 1] - edges[b]),
    accuracy_bin: acc, confidence_bin: mean, share: bins.map(w),
    accuracy_low: bins.map(b => wilson(b, -1)), accuracy_high: bins.map(b => wilson(b, 1)),
    error: error, error_low: low, error_high: high,
    overconfidence: sum(full.map(b => w(b) * mean[b] * Math.max(0, mean[b] - acc[b]))),
    accuracy: accuracy, confidence: confidence,
    direction: (confidence > accuracy ? "Over" : "Under") + "confident by " +
      (100 * Math.abs(confidence - accuracy)).toFixed(1) + " points",
    in_force: inForce,
    nll: nll[0], nll_low: nll[0] - data.z * nll[1], nll_high: nll[0] + data.z * nll[1],
    brier: brier[0], brier_low: brier[0] - data.z * brier[1],
    brier_high: brier[0] + data.z * brier[1]
  };
}
"""
