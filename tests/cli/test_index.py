from __future__ import annotations

from typing import Any

import pytest

from workbench import index
from workbench.lab import catalogue, ledger


def judge(paper: str, **changes: Any) -> None:
    base = {
        "paper": paper, "claim": "main", "scale": "laptop", "device": "cpu", "data": "toy",
        "kind": "claim", "central": True, "verdict": "holds", "effect": 1, "low": 0.5, "high": 1.5,
        "ours": 1, "baseline": 0, "margin": 0, "n": 5, "unit": "points", "date": "2026-01-02",
    }  # fmt: skip
    ledger.record([{**base, **changes}])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been displayed."""
    out: list[dict[str, Any]] = []
    monkeypatch.setattr(
        index.show, "bundle", lambda text, **more: out.append({"text": text, **more})
    )
    return out


def test_everything_is_shown_with_an_empty_ledger_and_no_family(
    home: Any, shown: list[dict[str, Any]]
) -> None:
    for file in (home.root / "notebooks").glob("*"):
        file.unlink()
    index.standing()
    index.families()
    index.table()
    index.ledger_picture()
    assert shown[0]["text"].startswith("3 papers in 2 families; 0 done")
    assert "Optics" in shown[1]["html"] and "optics.ipynb" not in shown[1]["html"]
    assert "On Lenses" in shown[2]["html"] and "section" not in shown[2]["html"]
    assert shown[3]["png"].startswith(b"\x89PNG")
    assert shown[3]["text"] == "No claim has been recorded yet."


def test_what_exists_is_linked(home: Any, shown: list[dict[str, Any]]) -> None:
    judge("lens")
    index.families()
    index.table()
    assert 'href="optics.ipynb"' in shown[0]["html"]
    assert 'href="optics.ipynb#lens"' in shown[0]["html"]
    for link in (
        "optics.ipynb#lens",
        "../workbench/optics/lens.py",
        "https://arxiv.org/abs/2001.00001",
    ):
        assert f'href="{link}"' in shown[1]["html"]
    assert "prism.py" not in shown[1]["html"]
    assert "On &lt;Prisms&gt;" in shown[1]["html"] and "<Prisms>" not in shown[1]["html"]
    assert "On &lt;Prisms&gt;" in shown[0]["html"] and "<Prisms>" not in shown[0]["html"]


def test_one_square_a_paper(home: Any, shown: list[dict[str, Any]]) -> None:
    index.families()
    assert shown[0]["html"].count("<span title=") == 3


def test_the_picture_places_each_verdict_where_it_belongs(home: Any) -> None:
    judge("lens", margin=0.25)
    judge("prism", verdict="refuted", effect=-1, low=-1.5, high=-0.5)
    judge("echo", verdict="inconclusive", effect=0.1, low=-0.4, high=0.6)
    figure = index.forest(catalogue.verdicts())
    axes = figure.axes[0]
    bars = {
        tuple(line.get_ydata()): line.get_xdata()
        for line in axes.lines
        if len(line.get_xdata()) == 2
    }
    assert list(bars[0, 0]) == [0.5, 2.5]  # (0.5 - 0.25) / 0.5 .. (1.5 - 0.25) / 0.5
    assert list(bars[1, 1]) == [-3, -1]
    assert bars[2, 2][0] < 0 < bars[2, 2][1]
    assert (
        axes.get_title(loc="left") == "Of 3 central claims, 1 holds, 1 is refuted, 1 inconclusive"
    )
    assert [t.get_text() for t in axes.get_yticklabels()] == ["lens", "prism", "echo"]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "identity", "effect": -1e-9, "low": -1e-9, "high": -1e-9, "margin": 1e-6},
        {"effect": 2, "low": 2, "high": 2},
        {"effect": 900, "low": 899.9, "high": 900.1},
        {"effect": 0, "low": 0, "high": 0, "verdict": "refuted"},
    ],
)
def test_odd_rows_can_be_drawn(home: Any, changes: dict[str, Any]) -> None:
    judge("lens", **changes)
    axes = index.forest(catalogue.verdicts()).axes[0]
    for line in axes.lines:
        assert all(-index.REACH <= float(x) <= index.REACH for x in line.get_xdata())


def test_live_controls_filter_the_table(home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls redraw the one table that is displayed, and count what they left."""
    import IPython.display

    drawn: list[str] = []

    class Handle:
        def update(self, html: Any) -> None:
            drawn.append(html.data)

    displayed: list[Any] = []

    def display(thing: Any, display_id: bool = False) -> Handle | None:
        displayed.append(thing)
        return Handle() if display_id else None

    monkeypatch.setattr(index, "live", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    index.table()
    box, html = displayed
    text, family, _, verdict, said = box.children
    assert "On Echoes" in html.data and said.value == "3 of 3"
    text.value = "splits"
    assert "Prisms" in drawn[-1] and "Echoes" not in drawn[-1] and said.value == "1 of 3"
    text.value = ""
    family.value = "acoustics"
    assert "Echoes" in drawn[-1] and "Lenses" not in drawn[-1]
    verdict.value = "holds"
    assert said.value == "0 of 3"
    assert len(drawn) == 4
