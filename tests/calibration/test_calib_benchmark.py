"""The benchmark study: its 102 columns, rank correlations against SciPy, its search space."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from scipy.stats import kendalltau, spearmanr

from workbench.calibration import calib_benchmark as study
from workbench.calibration import measures
from workbench.calibration.experiments import calib_benchmark as experiment
from workbench.calibration.temperature import fit_temperature


def network(seed, n=120, k=4):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(2 * n, k))
    truth = softmax(rng.uniform(0.3, 1.3) * logits, axis=1)
    labels = (truth.cumsum(1) < rng.random((2 * n, 1))).sum(1).clip(0, k - 1)
    foreign = {"noise": 0.5 * rng.normal(size=(50, k)), "other": rng.normal(size=(50, k))}
    return study.Predictions(logits[:n], labels[:n], logits[n:], labels[n:], foreign)


@pytest.fixture(scope="module")
def table():
    return study.metric_table({f"net {i}": network(i) for i in range(8)})


def test_the_table_has_ninety_binned_and_twelve_other_measurements(table):
    measured = [c for c in table if c not in ("acc", "temperature")]
    binned = [c for c in measured if c.rsplit("_", 1)[-1].isdigit()]
    assert (len(binned), len(measured) - len(binned)) == (90, 12)
    assert table.shape == (8, 104)
    assert table.notna().all(axis=None)
    # 39,234 networks (6,466 cells and 32,768 sizes) on three data sets make the paper's count.
    assert (6466 + 32_768) * 3 == 117_702


def test_a_row_holds_the_measures_before_and_after_the_validation_temperature(table):
    model = network(3)
    t = fit_temperature(model.validation_logits, model.validation_labels)
    row = table.loc["net 3"]
    assert row["temperature"] == t
    for stage, scale in (("pre", 1.0), ("post", t)):
        probs = softmax(model.logits / scale, axis=1)
        for bins in (5, 500):
            expected = {
                "ece": measures.ece(probs, model.labels, bins=bins),
                "ece_em": measures.aece(probs, model.labels, bins=bins),
                "cwce": measures.classwise_ece(probs, model.labels, bins=bins),
                "cwce_em": measures.classwise_ece(
                    probs, model.labels, bins=bins, scheme="equal-mass"
                ),
                "mce": measures.mce(probs, model.labels, bins=bins),
            }
            for name, value in expected.items():
                assert row[f"{stage}_{name}_{bins}"] == pytest.approx(value)
        assert row[f"{stage}_nll"] == pytest.approx(measures.nll(probs, model.labels))
    assert row["auc_noise"] > 0.5
    assert row["acc"] == (model.logits.argmax(1) == model.labels).mean()


def test_scaling_lowers_validation_loss_but_never_uses_test_labels():
    model = network(1)
    other = study.Predictions(
        model.logits, (model.labels + 1) % 4, model.validation_logits, model.validation_labels
    )
    rows = [study.metric_row(m, bin_counts=(5,)) for m in (model, other)]
    assert rows[0]["temperature"] == rows[1]["temperature"]


def test_rank_correlations_equal_scipy_with_ties():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(40, 5)), columns=list("abcde"))
    frame["tied"] = rng.integers(0, 4, 40)
    kendall = study.rank_correlations(frame)
    spearman = study.rank_correlations(frame, method="spearman")
    for a in frame:
        for b in frame:
            assert kendall.loc[a, b] == pytest.approx(kendalltau(frame[a], frame[b]).statistic)
            assert spearman.loc[a, b] == pytest.approx(spearmanr(frame[a], frame[b]).statistic)


def test_rank_correlations_see_only_ranks():
    frame = pd.DataFrame({"a": np.random.default_rng(1).random(30)})
    frame["b"], frame["c"] = np.exp(5 * frame["a"]), -(frame["a"] ** 3)
    tau = study.rank_correlations(frame)
    assert tau.loc["a", "b"] == pytest.approx(1)
    assert tau.loc["a", "c"] == pytest.approx(-1)
    frame["constant"] = 1.0
    assert study.rank_correlations(frame)["constant"].isna().all()


def test_large_tables_are_correlated_in_blocks(monkeypatch):
    frame = pd.DataFrame(np.random.default_rng(2).normal(size=(50, 4)))
    whole = study.rank_correlations(frame)
    assert np.allclose(whole, frame.corr("kendall"))


def test_the_interval_of_a_rank_correlation_is_that_of_resampled_rows():
    rng = np.random.default_rng(3)
    x = rng.normal(size=60)
    frame = pd.DataFrame({"x": x, "y": x + rng.normal(size=60)})
    found = study.rank_interval(frame, "x", "y", n=800)
    assert found.value == pytest.approx(kendalltau(frame["x"], frame["y"]).statistic)
    draws = [
        kendalltau(*frame.to_numpy()[rng.integers(60, size=60)].T).statistic for _ in range(800)
    ]
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(draws, [0.025, 0.975])), abs=0.04
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="models: is empty"):
        study.metric_table({})
    good = network(0)
    with pytest.raises(ValueError, match="validation_logits: row 2"):
        bad = np.where(np.arange(120)[:, None] == 2, np.nan, good.validation_logits)
        study.metric_row(study.Predictions(good.logits, good.labels, bad, good.validation_labels))
    with pytest.raises(ValueError, match="foreign\\['x'\\]"):
        study.metric_row(
            study.Predictions(
                good.logits, good.labels, good.validation_logits, good.validation_labels,
                {"x": np.full((3, 4), np.inf)},
            )
        )  # fmt: skip
    with pytest.raises(ValueError, match="method"):
        study.rank_correlations(pd.DataFrame({"a": [1, 2]}), method="pearson")
    with pytest.raises(ValueError, match="at least two networks"):
        study.rank_correlations(pd.DataFrame({"a": [1]}))


# ---- the search space


def test_sampled_cells_are_different_and_connected():
    cells = experiment.sample_cells(300, np.random.default_rng(0))
    assert len(np.unique(cells, axis=0)) == 300
    for cell in cells:
        reach = np.eye(4)
        for (start, end), op in zip(experiment.EDGES, cell, strict=True):
            reach[end] = np.maximum(reach[end], reach[start] * (op > 0))
        assert reach[3, 0] == 1


def test_the_batched_cells_compute_what_each_would_alone():
    torch.manual_seed(0)
    cells = np.array([[3, 1, 2, 4, 0, 3], [2, 3, 4, 1, 1, 2], [1, 0, 0, 3, 2, 0]])
    model = experiment.Cells(cells, channels=2).double()
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    together = model(images)
    for i, cell in enumerate(cells):
        nodes = [torch.nn.functional.conv2d(
            images, model.stem[i].T.reshape(2, 1, 7, 7), stride=7)]  # fmt: skip
        for end in (1, 2, 3):
            total = torch.zeros_like(nodes[0])
            for edge, (start, stop) in enumerate(experiment.EDGES):
                if stop == end and cell[edge]:
                    total = total + _operation(model, nodes[start], edge, cell, i)
            nodes.append(total)
        features = nodes[3].relu().permute(0, 2, 3, 1).reshape(5, -1)
        expected = features @ model.head[i] + model.bias[i]
        assert torch.allclose(together[i], expected)


def _operation(model, node, edge, cell, i):
    op = experiment.OPERATIONS[cell[edge]]
    if op == "skip":
        return node
    if op == "pool":
        return torch.nn.functional.avg_pool2d(node, 3, 1, 1, count_include_pad=False)
    users = model.users(edge, op).tolist()
    kernel = model.kernels[f"{op}_{edge}"][users.index(i)]
    if op == "conv1":
        return torch.einsum("bcij,cd->bdij", node.relu(), kernel[0])
    weight = kernel.permute(2, 1, 0).reshape(2, 2, 3, 3)
    return torch.nn.functional.conv2d(node.relu(), weight, padding=1)


def test_cells_trained_together_learn_as_if_alone():
    images = torch.rand(40, 1, 28, 28)
    labels = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(0))
    cells = np.array([[3, 1, 2, 4, 0, 3], [2, 3, 4, 1, 1, 2]])

    def trained(rows):
        torch.manual_seed(1)
        model = experiment.Cells(cells, 2)
        alone = experiment.Cells(cells[rows], 2)
        with torch.no_grad():
            for name in ("stem", "head", "bias"):
                getattr(alone, name).copy_(getattr(model, name)[rows])
            for key, kernel in alone.kernels.items():
                op, edge = key.split("_")
                users = model.users(int(edge), op).tolist()
                kernel.copy_(model.kernels[key][[users.index(r) for r in rows if r in users]])
        generator = torch.Generator().manual_seed(2)
        experiment.train(alone, images, labels, epochs=2, batch_size=16, generator=generator)
        return alone(images)

    assert torch.allclose(trained([0, 1])[1], trained([1])[0], atol=1e-4)


def test_the_experiment_runs_small_and_is_the_same_for_the_same_seed():
    first, second = (
        experiment.population(3, networks=6, epochs=3, source="digits", least_accuracy=0.0)
        for _ in range(2)
    )
    assert first["networks"] == 6
    for key, value in first.items():
        assert np.array_equal(value, second[key]), key
    assert -1 <= first["pre_post"] <= 1
    assert first["inflation_post"] > 1
