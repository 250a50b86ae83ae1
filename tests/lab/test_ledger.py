from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.lab import ledger


def claim(paper: str = "lens", name: str = "main", **changes: Any) -> dict[str, Any]:
    base = {
        "paper": paper, "claim": name, "statement": "ours, theirs", "kind": "claim",
        "verdict": "holds", "effect": 1.0, "low": 0.5, "high": 1.5, "ours": 2.0, "baseline": 1.0,
        "published": None, "n": 5, "seeds": [0, 1], "better": "higher", "margin": 0.0,
        "interval": "t", "unit": "points", "data": "toy", "protocol": "split", "central": True,
        "scale": "laptop", "device": "cpu", "seed": 0, "versions": {"torch": "2", "numpy": "1"},
        "hardware": "here", "date": "2026-01-02", "digest": "d", "differences": [1.0, 1.0],
    }  # fmt: skip
    return base | changes


def test_a_claim_survives_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ledger.csv"
    odd = claim(
        statement='a "quoted", line\nand <more>', effect=1 / 3, published=0.1 + 0.2, data=""
    )
    ledger.record([odd], file)
    row = ledger.read(file).iloc[0]
    assert row["statement"] == odd["statement"] and row["data"] == ""
    assert row["effect"] == odd["effect"] and row["published"] == odd["published"]
    assert row["seeds"] == "0 1" and row["versions"] == "numpy=1 torch=2"
    assert row["central"] is np.True_ or row["central"] is True


def test_what_is_read_and_written_again_is_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "ledger.csv"
    ledger.record([claim(), claim(name="second", published=3.0, central=False)], file)
    before = file.read_bytes()
    ledger.write_csv(ledger.read(file), file)
    assert file.read_bytes() == before


def test_a_missing_or_empty_ledger_has_all_columns(tmp_path: Path) -> None:
    assert list(ledger.read(tmp_path / "none.csv")) == ledger.COLUMNS
    ledger.write_csv(ledger.read(tmp_path / "none.csv"), tmp_path / "empty.csv")
    assert len(ledger.read(tmp_path / "empty.csv")) == 0


def test_recording_replaces_the_row_of_the_same_key_only(tmp_path: Path) -> None:
    file = tmp_path / "ledger.csv"
    ledger.record([claim(), claim(device="cuda"), claim(scale="gpu"), claim(data="other")], file)
    after = ledger.record([claim(effect=9.0)], file)
    assert len(after) == 4
    mine = after[
        (after["device"] == "cpu") & (after["scale"] == "laptop") & (after["data"] == "toy")
    ]
    assert mine["effect"].tolist() == [9.0]


def test_the_order_of_recording_does_not_matter(tmp_path: Path) -> None:
    claims = [claim(paper) for paper in ("b", "a", "c")]
    ledger.record(claims, tmp_path / "one.csv")
    for one in reversed(claims):
        ledger.record([one], tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_two_claims_of_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="'lens' states 'main' on data 'toy' twice"):
        ledger.rows([claim(), claim()])


def test_a_claim_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'paper' and 'claim'"):
        ledger.rows([claim(name="")])


def _record(file: str, start: int) -> None:
    for i in range(start, start + 10):
        ledger.record([claim(f"paper{i}")], Path(file))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ledger.csv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_record, args=(str(file), i * 10)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(ledger.read(file)) == 30


def test_a_failed_write_leaves_the_old_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.csv"
    ledger.record([claim()], file)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        ledger.record([claim(effect=2.0)], file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["ledger.csv"]


def changes(new: list[dict[str, Any]], old: list[dict[str, Any]], **more: Any) -> dict[str, str]:
    found = ledger.compare(ledger.rows(new), ledger.rows(old), **more)
    return dict(zip(found["claim"], found["change"], strict=True))


@pytest.mark.parametrize(
    ("now", "change"),
    [
        ({}, "same"),
        ({"effect": 1.49}, "same"),
        ({"effect": 1.51}, "drifted"),
        ({"effect": 0.49}, "drifted"),
        ({"verdict": "inconclusive"}, "flipped"),
        ({"data": "other"}, "new"),
        ({"scale": "smoke"}, "new"),
        ({"kind": "identity", "effect": -5.0}, "same"),
        ({"kind": "identity", "verdict": "refuted"}, "flipped"),
    ],
)
def test_what_changed(now: dict[str, Any], change: str) -> None:
    found = ledger.compare(ledger.rows([claim(**now)]), ledger.rows([claim()]))
    assert found.loc[0, "change"] == change


def test_an_interval_without_width_forgives_rounding_only() -> None:
    still = claim(low=1.0, high=1.0)
    assert changes([claim(effect=1 + 1e-8)], [still])["main"] == "same"
    assert changes([claim(effect=1.001)], [still])["main"] == "drifted"


def test_claims_no_longer_stated_are_gone() -> None:
    old = [claim(), claim(name="old"), claim("other"), claim(name="elsewhere", device="cuda")]
    assert changes([claim()], old) == {"main": "same", "old": "gone"}
    found = ledger.compare(ledger.rows([claim()]), ledger.rows(old), papers=["lens", "other"])
    assert set(found.loc[found["change"] == "gone", "paper"]) == {"lens", "other"}


def test_the_row_that_stands_for_a_paper() -> None:
    def current(*claims: dict[str, Any]) -> Any:
        return ledger.current(ledger.rows(claims), "lens")

    assert current(claim("other")) is None
    assert current(claim(scale="smoke"), claim(verdict="not judged", data="x")) is None
    side, main = claim(name="side", central=False), claim(scale="gpu")
    assert current(side, main)["claim"] == "main"
    assert current(main, claim())["scale"] == "laptop"
    assert current(claim(device="cuda"), claim())["device"] == "cpu"
    later = claim(data="new", date="2026-02-01")
    assert current(claim(), later)["data"] == "new"
    equality = claim(name="zero", kind="identity")
    assert current(equality, claim())["kind"] == "claim"
