from __future__ import annotations

from typing import Any

import pytest

from workbench.cli import parameters

CELL = """scale: str = "laptop"  # smoke, laptop or gpu
seed: int = 0
rate: float = 1.0
deep: bool = False
bins: list[int] = [5, 10]
limit: int | None = None
name: None | str = None
either: str | int | None = 3
mode: Literal["fast", "slow"] = "fast"
old: Optional[float] = None
free = 4
table = {"a": 1}
computed = 2 * 3
"""


@pytest.fixture(scope="module")
def known() -> dict[str, parameters.Parameter]:
    tagged = {"metadata": {"tags": ["parameters"]}, "source": CELL}
    other = {"metadata": {}, "source": "hidden = 1"}
    return parameters.read({"cells": [other, tagged, other]})


def test_all_names_are_found_unions_included(known: dict[str, parameters.Parameter]) -> None:
    assert list(known) == [line.split(":")[0].split(" =")[0] for line in CELL.splitlines()]
    assert known["seed"].default == 0 and known["seed"].annotation == "int"
    assert known["computed"].default is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "3", 3),
        ("seed", "1_000", 1000),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("deep", "true", True),
        ("deep", "0", False),
        ("scale", "007", "007"),
        ("bins", "[1, 2]", [1, 2]),
        ("limit", "none", None),
        ("limit", "12", 12),
        ("name", "1e10", "1e10"),
        ("either", "None", None),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("mode", "slow", "slow"),
        ("old", "0.5", 0.5),
        ("free", "8", 8),
        ("table", "{'b': 2}", {"b": 2}),
    ],
)
def test_text_becomes_what_the_annotation_says(
    known: dict[str, parameters.Parameter], name: str, text: str, value: Any
) -> None:
    found = parameters.convert(known[name], text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("seed", "1.0"), ("seed", "three"), ("deep", "perhaps"), ("bins", "(1, 2)"),
     ("mode", "slower"), ("limit", "x"), ("table", "[1]"), ("rate", "")],
)  # fmt: skip
def test_text_that_does_not_fit_is_named(
    known: dict[str, parameters.Parameter], name: str, text: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*{known[name].annotation[:4]}"):
        parameters.convert(known[name], text)


def test_an_unknown_name_lists_the_known_ones(known: dict[str, parameters.Parameter]) -> None:
    with pytest.raises(ValueError, match="'typo'; known: scale: str = 'laptop', seed: int = 0"):
        parameters.settle(known, {}, [("typo", "3")])


def test_typed_pairs_win_and_absent_options_are_left_out(
    known: dict[str, parameters.Parameter],
) -> None:
    options = {"scale": "smoke", "seed": 1, "device": "cpu"}
    values = parameters.settle(known, options, [("seed", "5")])
    assert values == {"scale": "smoke", "seed": 5}


def test_a_notebook_without_parameters_has_none() -> None:
    assert parameters.read({"cells": [{"metadata": {}, "source": "x = 1"}]}) == {}
