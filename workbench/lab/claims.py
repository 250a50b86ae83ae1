"""Claims and their verdicts: computed from paired runs, never typed.

A claim compares a paper's method with a baseline on the same seeds. The verdict follows from a 95%
interval of the mean paired difference, orientated so that positive favours the paper:

* **holds**: the whole interval lies above the margin;
* **refuted**: the whole interval lies at or below the margin;
* **inconclusive**: the interval contains the margin;
* **not judged**: fewer than five pairs, or a run at scale ``smoke``.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from workbench.lab import digest, show
from workbench.lab.claim_card import card_html, card_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import ArrayLike

LEAST_PAIRS = 5
VERDICTS = ("holds", "refuted", "inconclusive", "not judged")


@dataclass(frozen=True)
class Claim:
    """A judged claim. ``effect`` is positive when it favours the paper's method.

    Attributes:
        ours, baseline: mean of either side over the pairs.
        effect, low, high: mean paired difference and its 95% interval, in ``unit``.
        differences: the orientated paired differences themselves.
        published: the paper's own value of the quantity in ``ours``, where there is one.
        central: whether the paper's verdict is this claim's.
    """

    paper: str
    claim: str
    statement: str
    verdict: str
    ours: float
    baseline: float
    effect: float
    low: float
    high: float
    n: int
    better: str
    margin: float
    interval: str
    unit: str
    data: str
    protocol: str
    published: float | None
    kind: str = "claim"
    central: bool = True
    differences: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    digest: str = ""
    scale: str = ""
    device: str = ""
    seed: int = 0
    date: str = ""
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def at(self, *, scale: str, device: str, seed: int) -> Claim:
        """The same claim with where and when it was judged; smoke runs are not judged."""
        smoke = scale == "smoke" and self.kind == "claim"
        return dataclasses.replace(
            self,
            scale=scale,
            device=device,
            seed=seed,
            hardware=hardware(),
            versions=dict(digest.versions()),
            verdict="not judged" if smoke else self.verdict,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able dictionary, for ``from_json``; an unbounded interval becomes null."""
        out: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            if name in ("low", "high") and not math.isfinite(value):
                value = None
            out[name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Claim:
        """Claim out of the dictionary that an executed notebook holds."""
        limits = {"low": -math.inf, "high": math.inf}
        filled = {k: limits.get(k) if v is None else v for k, v in data.items()}
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in filled.items()
        }
        return cls(**fields)

    def show(self) -> None:
        """Display the card; the executed notebook keeps the claim itself as JSON beside it."""
        show.bundle(card_text(self), html=card_html(self), json={show.CLAIM: self.to_json()})

    def __str__(self) -> str:
        return card_text(self)


def interval(differences: ArrayLike, method: str = "t", seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of paired differences.

    Args:
        differences: (n,) paired differences, n >= 2.
        method: ``t`` (Student; for a handful of seeds) or ``bca`` (bias-corrected and accelerated
            bootstrap with 9,999 resamples; for 20 pairs or more, such as models or samples, where
            it follows skewed differences better. With five seeds it is far too narrow).
        seed: of the bootstrap's generator.

    Returns:
        ``(low, high)``; both equal the mean when all differences are the same.
    """
    import numpy as np
    from scipy import stats

    d = np.asarray(differences, dtype=float)
    spread = d.std(ddof=1)
    if spread <= 1e-12 * max(1e-300, float(np.abs(d).max())):
        return float(d.mean()), float(d.mean())
    if method == "t":
        half = stats.t.ppf(0.975, len(d) - 1) * spread / math.sqrt(len(d))
        return float(d.mean() - half), float(d.mean() + half)
    if method == "bca":
        if len(d) < 20:
            raise ValueError(f"interval: 'bca' needs at least 20 pairs, got {len(d)}; use 't'")
        found = stats.bootstrap(
            (d,),
            np.mean,
            n_resamples=9999,
            batch=1000,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return float(found.low), float(found.high)
    raise ValueError(f"interval: expected 't' or 'bca', got {method!r}")


def verdict(n: int, low: float, high: float, margin: float) -> str:
    """Verdict that follows from the number of pairs and the interval."""
    if n < LEAST_PAIRS:
        return "not judged"
    if low > margin:
        return "holds"
    return "refuted" if high <= margin else "inconclusive"


def judge(
    slug: str,
    statement: str,
    frame: pd.DataFrame,
    *,
    ours: str,
    baseline: str | float,
    better: str = "higher",
    margin: float = 0.0,
    name: str = "main",
    interval: str = "t",
    data: str = "",
    protocol: str = "",
    unit: str = "",
    paper: float | None = None,
) -> Claim:
    """Judge a claim on paired runs.

    Each row of the frame is one pair: the same seed, split and budget for both columns. When
    neither side is better, swapping the two sides of a pair changes nothing, so the differences are
    symmetric about zero and "holds" comes out falsely in at most 2.5% of cases for normal
    differences (tests: at most 5% for uniform, Laplace, Student-t with 3 degrees of freedom and
    differences of exponentials, for 5, 10 and 20 pairs).

    Power of the t interval at margin zero, for a true effect of d standard deviations of the
    paired difference: with 5 pairs 40% at d = 1 and 91% at d = 2; with 10 pairs 80% at d = 1;
    with 20 pairs 99% at d = 1. An "inconclusive" from five seeds says little about a small effect.

    Args:
        slug: the paper.
        statement: the claim in one sentence, decided before the run.
        frame: one row a pair, as ``run.seeds`` returns it.
        ours: column of the paper's method.
        baseline: column of what it is compared with, or a number that it must exceed.
        better: ``higher`` or ``lower``: which direction favours the paper.
        margin: the least effect that counts, in the unit of the columns.
        name: short name of the claim; ``main`` is the paper's central one.
        interval: ``t`` or ``bca``; see ``interval``.
        data, protocol: data set and split, bins, budget: they travel with the number.
        unit: of the columns.
        paper: the paper's own value of ``ours``, if it gives one.

    Raises:
        KeyError: a column is missing. ValueError: another argument is wrong, there is no row, or a
            value is not finite; the message names it.
    """
    import numpy as np

    if better not in ("higher", "lower"):
        raise ValueError(f"better: expected 'higher' or 'lower', got {better!r}")
    if not math.isfinite(margin) or margin < 0:
        raise ValueError(f"margin: expected a number of at least 0, got {margin}")
    if len(frame) == 0:
        raise ValueError("frame: expected at least one row, got none")
    x = _column(frame, ours, "ours")
    y = (
        _column(frame, baseline, "baseline")
        if isinstance(baseline, str)
        else np.full(len(x), baseline)
    )
    d = (x - y) if better == "higher" else (y - x)
    low, high = _interval(d, interval) if len(d) > 1 else (-math.inf, math.inf)
    return Claim(
        paper=slug,
        claim=name,
        statement=statement,
        verdict=verdict(len(d), low, high, margin),
        ours=float(x.mean()),
        baseline=float(y.mean()),
        effect=float(d.mean()),
        low=low,
        high=high,
        n=len(d),
        better=better,
        margin=float(margin),
        interval=interval,
        unit=unit,
        data=data,
        protocol=protocol,
        published=paper,
        central=name == "main",
        differences=tuple(float(v) for v in d[:200]),
        seeds=tuple(int(s) for s in frame["seed"][:200]) if "seed" in frame else (),
        digest=str(frame.attrs.get("digest", "")),
    )


_interval = interval


def equal(
    slug: str,
    statement: str,
    lhs: Any,
    rhs: Any,
    tol: float = 1e-6,
    *,
    name: str = "identity",
    data: str = "",
    protocol: str = "",
) -> Claim:
    """Check an equality that the paper proves; strict at every scale.

    Args:
        lhs, rhs: numbers, arrays or tensors of one shape.
        tol: largest |lhs - rhs| / max(1, |rhs|) that counts as equal.

    Raises:
        ValueError: the two sides have different shapes, or are empty.
    """
    import numpy as np

    a, b = (np.asarray(_plain(v), dtype=float) for v in (lhs, rhs))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"lhs, rhs: expected one shape, not empty; got {a.shape} and {b.shape}")
    worst = float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b))))
    return Claim(
        paper=slug,
        claim=name,
        statement=statement,
        verdict="holds" if worst <= tol else "refuted",
        ours=worst,
        baseline=0.0,
        effect=-worst,
        low=-worst,
        high=-worst,
        n=a.size,
        better="lower",
        margin=float(tol),
        interval="largest difference",
        unit="relative difference",
        data=data,
        protocol=protocol,
        published=None,
        kind="identity",
        central=name == "main",
    )


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _column(frame: pd.DataFrame, name: str, argument: str) -> np.ndarray:
    import numpy as np

    if name not in frame:
        raise KeyError(
            f"{argument}: the frame has no column {name!r}; it has {list(frame.columns)}"
        )
    values = frame[name].to_numpy(dtype=float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"{argument}: column {name!r} is {values[row]} in row {row}, expected numbers"
        )
    return values


@lru_cache(maxsize=1)
def hardware() -> str:
    """Processor, cores and GPU, in one line."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf8") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
        model = names[0] if names else model
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"
