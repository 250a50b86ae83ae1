"""The calibration family's heaviest operations, against what one would otherwise use."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from workbench.calibration.intervals import interval
from workbench.calibration.measures import mmce
from workbench.calibration.temperature import fit_temperature

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def table():
    """A million predictions over a hundred classes, 400 MB."""
    rng = np.random.default_rng(0)
    n, k = 1_000_000, 100
    probs = np.empty((n, k), np.float32)
    for rows in np.array_split(np.arange(n), 50):
        block = np.exp(3 * rng.standard_normal((len(rows), k), dtype=np.float32))
        probs[rows] = block / block.sum(1, keepdims=True)
    labels = np.where(rng.random(n) < 0.6, probs.argmax(1), rng.integers(0, k, n))
    return probs, labels


ECE = "ECE with 95% interval, 1,000,000 x 100"


def test_ece_with_interval_against_torchmetrics(bench, table):
    from torchmetrics.functional.classification import multiclass_calibration_error

    probs, labels = table
    tensors = torch.from_numpy(probs), torch.from_numpy(labels)
    found = {}

    def ours():
        found["ours"] = interval("ece", probs, labels, bins=15)

    def theirs():
        found["peer"] = multiclass_calibration_error(*tensors, num_classes=100, n_bins=15)

    size = probs.nbytes / 2**20
    row = bench.side_by_side(ECE, "torchmetrics, no interval", ours, theirs, bar=3, input_mb=size)
    assert found["ours"].value == pytest.approx(float(found["peer"]), abs=1e-5)
    assert not row["memory_mb"] > size  # with the input itself: twice the input


def test_ece_with_interval_against_netcal(bench, table):
    metrics = pytest.importorskip("netcal.metrics")
    probs, labels = table
    found = {}

    def ours():
        found["ours"] = interval("ece", probs, labels, bins=15)

    def theirs():
        found["peer"] = metrics.ECE(15).measure(probs, labels)

    bench.side_by_side(ECE, "netcal, no interval", ours, theirs, bar=3, repeat=2,
                       input_mb=probs.nbytes / 2**20)  # fmt: skip
    assert found["ours"].value == pytest.approx(found["peer"], abs=1e-4)


def test_temperature_against_torch_lbfgs(bench):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50_000, 1000, generator=generator)
    labels = torch.multinomial((0.6 * logits).softmax(1), 1, generator=generator)[:, 0]
    found = {}

    def ours():
        found["ours"] = fit_temperature(logits, labels)

    def theirs():
        temperature = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.LBFGS(
            [temperature], max_iter=100, line_search_fn="strong_wolfe",
            tolerance_grad=1e-9, tolerance_change=1e-12,
        )  # fmt: skip

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits / temperature, labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        found["peer"] = temperature.item()

    bench.side_by_side("temperature fit, 50,000 x 1,000 logits", "torch L-BFGS", ours, theirs,
                       bar=10, repeat=1, input_mb=logits.nbytes / 2**20)  # fmt: skip
    exact = fit_temperature(logits[:5000].double(), labels[:5000])
    assert fit_temperature(logits[:5000], labels[:5000]) == pytest.approx(exact, rel=1e-6)
    # The peer's stopping rule in single precision leaves it a little off the optimum.
    assert found["ours"] == pytest.approx(found["peer"], rel=3e-3)
    assert loss_at(logits, labels, found["ours"]) <= loss_at(logits, labels, found["peer"]) + 1e-9


def loss_at(logits, labels, temperature):
    """Mean negative log-likelihood in double precision, by blocks."""
    total = 0.0
    for z, y in zip(logits.split(2000), labels.split(2000), strict=True):
        total += torch.nn.functional.cross_entropy(
            z.double() / temperature, y, reduction="sum"
        ).item()
    return total / len(labels)


def test_mmce_against_the_double_sum(bench):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(5), 8000)
    labels = rng.integers(0, 5, 8000)
    found = {}

    def ours():
        found["ours"] = mmce(probs, labels)

    def theirs():
        c = torch.tensor(probs.max(1))
        r = torch.tensor(probs.argmax(1) == labels).double() - c
        kernel = torch.exp(-(c[:, None] - c).abs() / 0.4)
        found["peer"] = float((r @ kernel @ r).sqrt() / len(c))

    bench.side_by_side("MMCE, 8,000 rows", "n x n kernel in torch", ours, theirs)
    assert found["ours"] == pytest.approx(found["peer"], abs=1e-9)


@pytest.fixture(scope="module")
def explorer():
    from workbench.calibration import explore

    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((1_000_000, 10), dtype=np.float32)
    labels = np.where(rng.random(len(logits)) < 0.7, logits.argmax(1), rng.integers(0, 10))
    made = explore(logits, labels)
    made.result()
    return made, logits, labels


def test_explorer_answers_a_slider_within_50_ms(bench, explorer):
    made = explorer[0]
    positions = made.control("temperature").values
    bench.side_by_side(
        "explorer, 1,000,000 x 10: one step of the slider", "limit: 50 ms",
        lambda: made.result(temperature=positions[30], scheme="adaptive"), 0.05, bar=1,
    )  # fmt: skip
    for position in positions:
        made.result(temperature=position)
        assert made.seconds < 0.05


def test_explorer_opens_within_10_s(bench, explorer):
    from workbench.calibration import explore

    _, logits, labels = explorer
    bench.side_by_side("explorer, 1,000,000 x 10: opening", "limit: 10 s",
                       lambda: explore(logits, labels), 10.0, bar=1, repeat=1)  # fmt: skip


def test_import_takes_less_than_200_ms(bench):
    def python(code):
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    bench.side_by_side("import workbench, interpreter included", "limit: 200 ms",
                       python("import workbench"), 0.2, bar=1)  # fmt: skip


def test_running_a_notebook_costs_little_more_than_papermill(bench, tmp_path):
    import nbformat
    import papermill

    from workbench.cli import runner

    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python"
    }  # fmt: skip
    cell = nbformat.v4.new_code_cell("scale = 'smoke'")
    cell.metadata["tags"] = ["parameters"]
    book.cells = [cell]
    source = tmp_path / "empty.ipynb"
    nbformat.write(book, source)

    def ours():
        job = runner.Job("empty", source, tmp_path / "ours" / "empty.ipynb", {"scale": "smoke"})
        (done,) = runner.run([job], runner.Settings(), lambda job: None)
        assert done.state == "ok", done.error

    def theirs():
        papermill.execute_notebook(
            str(source), str(tmp_path / "bare.ipynb"), {"scale": "smoke"}, progress_bar=False,
            kernel_name="python3",
        )  # fmt: skip

    bench.side_by_side("empty notebook through the runner", "papermill", ours, theirs, bar=0.5)
