"""What the checks let through, what they refuse, and what a refusal says."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.lab import checks

GOOD = [[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]
CARRIERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda rows: rows,
    "numpy": np.asarray,
    "pandas": pd.DataFrame,
    "torch": torch.tensor,
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_carrier_keeps_its_numbers(carrier: str) -> None:
    probs = checks.as_probs(CARRIERS[carrier](GOOD))
    assert isinstance(probs, torch.Tensor if carrier == "torch" else np.ndarray)
    np.testing.assert_array_equal(checks.to_numpy(probs), GOOD)


def test_a_good_tensor_comes_back_as_itself_with_its_graph() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(1)
    assert checks.as_logits(logits) is logits
    assert checks.as_probs(probs) is probs


def test_a_good_array_is_not_copied() -> None:
    array = np.full((5, 4), 0.25, dtype=np.float32)
    assert checks.as_probs(array) is array
    assert checks.as_logits(array) is array


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_of_a_softmax_in_any_precision_is_accepted(dtype: torch.dtype) -> None:
    probs = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype)
    assert checks.as_probs(probs).dtype is dtype


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.integers(2, 6)),
               elements=st.floats(0.01, 10)),
    st.data(),
)  # fmt: skip
def test_the_first_bad_row_is_named(weights: np.ndarray, data: st.DataObject) -> None:
    probs = weights / weights.sum(1, keepdims=True)
    checks.as_probs(probs)
    bad = sorted(data.draw(st.sets(st.integers(0, len(probs) - 1), min_size=1, max_size=3)))
    probs[bad] *= 1.5
    with pytest.raises(ValueError, match=rf"^p: row {bad[0]} sums to 1\.5; expected 1 "):
        checks.as_probs(probs, "p")
    with pytest.raises(ValueError, match=rf"^p: row {bad[0]} sums to 1\.5; expected 1 "):
        checks.as_probs(torch.from_numpy(probs), "p")


def test_a_bad_row_beyond_the_first_chunk_is_found() -> None:
    logits = np.zeros((200_000, 2), dtype=np.float32)
    logits[150_000, 1] = np.nan
    with pytest.raises(ValueError, match=r"^z: row 150000 holds NaN or infinity"):
        checks.as_logits(logits, "z")


def test_large_finite_logits_are_not_mistaken_for_infinite() -> None:
    with np.errstate(all="raise"):
        checks.as_logits(np.full((10, 3), 3e38, dtype=np.float32))
    checks.as_logits(torch.full((10, 3), 6e4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ([[0.5, -0.1], [0.5, 0.5]], ValueError, "row 0 holds a negative value or NaN"),
        ([[0.5, 0.5], [np.nan, 1.0]], ValueError, "row 1 holds a negative value or NaN"),
        ([[0.5, 0.5], [np.inf, 0.5]], ValueError, "row 1 sums to inf"),
        ([[0.2, 0.2]], ValueError, r"row 0 sums to 0\.4; expected 1"),
        ([[1.0], [1.0]], ValueError, "has one column; expected a column for each of >= 2 classes"),
        ([0.5, 0.5], ValueError, r"expected 2 dimension\(s\), got shape \(2,\)"),
        (np.zeros((0, 3)), ValueError, "is empty"),
        ([[0.5, 0.5], [1.0]], TypeError, "expected a rectangular array of numbers"),
        ([["a", "b"]], TypeError, "expected numbers, got dtype"),
        ([[0.5, None]], ValueError, "row 0 holds a negative value or NaN"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "expected real numbers"),
    ],
)
def test_bad_probabilities(values: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"^probs: .*{says}"):
        checks.as_probs(values)


@pytest.mark.parametrize(
    ("labels", "k", "says"),
    [
        ([0, 3, 7], 3, r"row 1 is 3; expected a class index in 0\.\.2"),
        ([0, -1], None, "row 1 is -1; expected a class index of 0 or more"),
        ([0.0, 0.5], None, r"row 1 is 0\.5; expected integer class indices"),
        ([0.0, np.nan], None, "row 1 is nan; expected integer class indices"),
        ([[0], [1]], None, r"expected 1 dimension\(s\), got shape \(2, 1\)"),
        ([], None, "is empty"),
    ],
)
@pytest.mark.parametrize("carrier", [np.asarray, torch.tensor])
def test_bad_labels(carrier: Callable[[Any], Any], labels: Any, k: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=f"^labels: {says}"):
        checks.as_labels(carrier(labels), k)


def test_labels_become_int64_and_one_class_is_refused_on_request() -> None:
    assert checks.as_labels(pd.Series([True, False])).tolist() == [1, 0]
    assert checks.as_labels(torch.tensor([0.0, 2.0])).dtype is torch.int64
    assert checks.as_labels(np.array([3, 3], dtype=np.uint8)).dtype == np.int64
    with pytest.raises(ValueError, match=r"^labels: holds 1 class\(es\); expected at least 2"):
        checks.as_labels([1, 1], 2, min_classes=2)


def test_unit_interval() -> None:
    assert checks.as_unit([0.0, 1.0]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"^c: row 1 lies outside \[0, 1\]"):
        checks.as_unit(torch.tensor([0.5, 1.01]), "c")


def test_lengths_are_named() -> None:
    assert checks.same_length(a=[1, 2], b=np.zeros((2, 3))) == 2
    with pytest.raises(ValueError, match="probs has 3, labels has 2"):
        checks.same_length(probs=torch.zeros(3, 2), labels=[0, 1])


@pytest.mark.parametrize(
    ("check", "value", "error"),
    [
        (checks.positive, 0, ValueError),
        (checks.positive, np.inf, ValueError),
        (checks.positive, "1", TypeError),
        (checks.positive, True, TypeError),
        (checks.positive, torch.zeros(2), TypeError),
        (checks.fraction, 1.5, ValueError),
        (checks.count, 1.5, ValueError),
        (checks.count, 0, ValueError),
    ],
)
def test_bad_numbers(check: Callable[..., Any], value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^alpha: expected"):
        check(value, "alpha")


def test_good_numbers() -> None:
    assert checks.positive(np.float32(0.5), "x") == 0.5
    assert checks.positive(0, "x", zero=True) == 0
    assert checks.fraction(torch.tensor(1.0), "x") == 1
    assert checks.count(3.0, "n") == 3
    with pytest.raises(ValueError, match=r"^x: expected a number in \(0, 1\], got 0"):
        checks.fraction(0, "x", zero=False)
    with pytest.raises(ValueError, match=r"^kind: expected one of 'a', 'b', got 'c'"):
        checks.one_of("c", "ab", "kind")


def test_generators_from_seeds_repeat_and_from_none_follow_the_global_state() -> None:
    a, b = (torch.rand(3, generator=checks.as_generator(7)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(1)
    c = torch.rand(3, generator=checks.as_generator())
    torch.manual_seed(1)
    assert torch.equal(c, torch.rand(3, generator=checks.as_generator()))
    assert not torch.equal(c, torch.rand(3, generator=checks.as_generator()))
    assert checks.as_rng(3).random() == np.random.default_rng(3).random()
    given_rng = np.random.default_rng(0)
    assert checks.as_rng(given_rng) is given_rng
    for check in (checks.as_generator, checks.as_rng):
        with pytest.raises(TypeError, match="integer or None, got str"):
            check("seed")  # type: ignore[operator]


def test_a_large_input_needs_little_more_memory_than_a_number_per_row() -> None:
    n, k = 100_000, 50
    probs = np.full((n, k), 1 / k, dtype=np.float32)
    tracemalloc.start()
    checks.as_probs(probs)
    checks.as_logits(probs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * probs.nbytes


def test_checks_do_not_import_torch() -> None:
    code = (
        "import sys; from workbench.lab import checks; checks.as_probs([[.5, .5]]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_stay_on_their_device() -> None:
    probs = torch.full((4, 2), 0.5, device="cuda")
    assert checks.as_probs(probs) is probs
    assert checks.as_generator(0, device="cuda").device.type == "cuda"
