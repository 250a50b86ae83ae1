"""The reproduction ledger: what was claimed, what was measured, and what changed since.

``data/ledger.csv`` holds one row per (paper, claim, scale, device, data). Rows come from claims
that an executed notebook stores as JSON; nobody types them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.lab import paths

if TYPE_CHECKING:
    import pandas as pd

KEY = ["paper", "claim", "scale", "device", "data"]
_NUMBERS = ["effect", "low", "high", "ours", "baseline", "published", "margin"]
_WHOLE = ["n", "seed"]
COLUMNS = [
    *KEY, "kind", "central", "verdict", "effect", "low", "high", "ours", "baseline", "published",
    "unit", "better", "margin", "interval", "n", "seeds", "seed", "statement", "protocol",
    "digest", "hardware", "versions", "date",
]  # fmt: skip
JUDGED = ("holds", "refuted", "inconclusive")


def path() -> Path:
    """File of the ledger."""
    return paths.root() / "data" / "ledger.csv"


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    frame = frame.reindex(columns=COLUMNS)
    for name in COLUMNS:
        if name in _NUMBERS:
            frame[name] = pd.to_numeric(frame[name]).astype(float)
        elif name in _WHOLE:
            frame[name] = pd.to_numeric(frame[name]).fillna(0).astype(int)
        elif name == "central":
            frame[name] = frame[name].astype(str).str.lower().isin(["true", "1"])
        else:
            frame[name] = frame[name].fillna("").astype(str)
    return frame.sort_values(KEY, kind="stable").reset_index(drop=True)


def read(file: Path | None = None) -> pd.DataFrame:
    """The ledger as a frame with the columns ``COLUMNS``; empty where nothing is recorded yet."""
    import pandas as pd

    file = file or path()
    if not file.exists():
        return _typed(pd.DataFrame(columns=COLUMNS))
    text = {name: str for name in COLUMNS if name not in (*_NUMBERS, *_WHOLE)}
    return _typed(pd.read_csv(file, dtype=text, keep_default_na=False, na_values={
        name: ["", "nan"] for name in (*_NUMBERS, *_WHOLE)
    }))  # fmt: skip


def rows(claims: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Ledger rows of claims as an executed notebook stores them.

    Raises:
        ValueError: a claim lacks its paper or name, or two claims share one key.
    """
    import pandas as pd

    out = []
    for claim in claims:
        row = {name: claim.get(name) for name in COLUMNS}
        if not row["paper"] or not row["claim"]:
            raise ValueError(f"claims: expected 'paper' and 'claim' in each, got {dict(claim)}")
        row["seeds"] = " ".join(str(seed) for seed in claim.get("seeds") or ())
        versions = claim.get("versions") or {}
        row["versions"] = " ".join(f"{name}={versions[name]}" for name in sorted(versions))
        out.append(row)
    frame = _typed(pd.DataFrame(out, columns=COLUMNS))
    if (twice := frame.duplicated(KEY)).any():
        paper, claim, *_, data = frame.loc[twice, KEY].iloc[0]
        raise ValueError(
            f"claims: {paper!r} states {claim!r} on data {data!r} twice; "
            "give one of the two another name="
        )
    return frame


def record(claims: Iterable[Mapping[str, Any]], file: Path | None = None) -> pd.DataFrame:
    """Insert or replace the rows of these claims, under a lock and in one rename.

    Args:
        claims: as ``rows`` takes them.
        file: another ledger than the repository's.

    Returns:
        The ledger as it now stands.
    """
    import pandas as pd

    file = file or path()
    new = rows(claims)
    with locked(file):
        old = read(file)
        kept = old[~old.set_index(KEY).index.isin(new.set_index(KEY).index)]
        parts = [part for part in (kept, new) if len(part)]
        ledger = _typed(pd.concat(parts)) if parts else new
        write_csv(ledger, file)
    return ledger


def locked(file: Path) -> Any:
    """Context manager: only one process at a time holds the lock of ``file``."""
    import filelock

    file.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(f"{file}.lock", timeout=60)


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame as CSV so that a reader sees the old file or the new one, never a half."""
    replace_text(file, frame.to_csv(index=False, lineterminator="\n"))


def replace_text(file: Path, text: str) -> None:
    """Replace a text file in one rename, with the permissions a new file would get."""
    replace_bytes(file, text.encode("utf8"))


def replace_bytes(file: Path, content: bytes) -> None:
    """Replace a file in one rename, with the permissions a new file would get."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def compare(
    new: pd.DataFrame, recorded: pd.DataFrame, papers: Iterable[str] | None = None
) -> pd.DataFrame:
    """What a run says now beside what the ledger says.

    Args:
        new: rows of the run, from ``rows``.
        recorded: the ledger.
        papers: slugs the run was about; recorded claims of theirs, at the run's scale and device,
            that it did not state are listed as gone. Default: the papers in ``new``.

    Returns:
        One row a claim: the key; ``change`` (``same``, ``new``, ``gone``, ``flipped``: another
        verdict, ``drifted``: the same verdict, but the effect left the recorded interval);
        ``verdict``, ``effect``, and both as recorded with the interval (``was``, ``effect_was``,
        ``low_was``, ``high_was``).
    """
    import pandas as pd

    columns = [*KEY, "change", "verdict", "effect", "was", "effect_was", "low_was", "high_was"]
    before = {tuple(row[name] for name in KEY): row for _, row in recorded.iterrows()}
    about = set(new["paper"]) if papers is None else set(papers)
    places = set(zip(new["scale"], new["device"], strict=True))
    out: list[dict[str, Any]] = []
    for _, row in new.iterrows():
        key = tuple(row[name] for name in KEY)
        old = before.pop(key, None)
        line = {
            **dict(zip(KEY, key, strict=True)),
            "verdict": row["verdict"],
            "effect": row["effect"],
        }
        out.append(line | {"change": _change(row, old)} | _was(old))
    for key, old in before.items():
        if key[0] in about and (key[2], key[3]) in places:
            line = {**dict(zip(KEY, key, strict=True)), "verdict": "", "effect": float("nan")}
            out.append(line | {"change": "gone"} | _was(old))
    return pd.DataFrame(out, columns=columns)


def _was(old: pd.Series | None) -> dict[str, Any]:
    nan = float("nan")
    if old is None:
        return {"was": "", "effect_was": nan, "low_was": nan, "high_was": nan}
    return {
        "was": old["verdict"], "effect_was": old["effect"],
        "low_was": old["low"], "high_was": old["high"],
    }  # fmt: skip


def _change(row: pd.Series, old: pd.Series | None) -> str:
    if old is None:
        return "new"
    if row["verdict"] != old["verdict"]:
        return "flipped"
    slack = 1e-9 + 1e-6 * abs(old["effect"])  # of an interval without width, for rounding
    inside = old["low"] - slack <= row["effect"] <= old["high"] + slack
    unknown = row["kind"] == "identity" or old[["effect", "low", "high"]].isna().any()
    return "same" if inside or unknown else "drifted"


def current(ledger: pd.DataFrame, paper: str) -> pd.Series | None:
    """The row that stands for a paper: its central judged claim, or None.

    Laptop runs come first (the published verdicts), then larger ones; the CPU first, then other
    devices; then the latest.
    """
    mine = ledger[(ledger["paper"] == paper) & ledger["verdict"].isin(JUDGED)]
    mine = mine[mine["scale"] != "smoke"]
    if mine.empty:
        return None
    rank = mine.assign(
        r0=~mine["central"], r1=mine["kind"] != "claim", r2=mine["scale"] != "laptop",
        r3=mine["device"] != "cpu",
    )  # fmt: skip
    ranked = rank.sort_values("date", ascending=False, kind="stable")
    return ranked.sort_values(["r0", "r1", "r2", "r3"], kind="stable").iloc[0][COLUMNS]
