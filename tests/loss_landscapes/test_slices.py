"""Directions, slices and paths against closed forms."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import models, seeded
from workbench.loss_landscapes.geometry import (
    Objective,
    Path,
    barrier,
    bezier,
    filter_normalized_direction,
    linear_path,
    mode_connectivity,
    random_direction,
    random_plane,
    slice_1d,
    slice_2d,
    trajectory_directions,
)
from workbench.loss_landscapes.geometry.slices import refinement


class Vector(nn.Module):
    """Nothing but a vector of parameters."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))


def on_vector(values: Any, loss: Any) -> Objective:
    model = Vector(values)
    return Objective(model, lambda: loss(model.w))


def relu_net(bias: bool = False) -> nn.Module:
    with seeded(3):
        return models.MLP((6, 9, 4), bias=bias).double()


class TestDirections:
    def test_each_filter_has_the_length_of_its_weights(self) -> None:
        with seeded(0):
            model = models.CNN((4, 6), 3)
        direction = filter_normalized_direction(model, seed=1)
        for name, weight in model.named_parameters():
            d = direction[name]
            if weight.ndim < 2:
                assert not d.any(), f"{name}: biases and normalisation stay"
            else:
                torch.testing.assert_close(d.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))

    @settings(max_examples=15, deadline=None)
    @given(st.floats(0.05, 20.0))
    def test_rescaling_a_relu_layer_leaves_the_picture_unchanged(self, c: float) -> None:
        """In-weights times c, out-weights divided by c: the same function, the same picture."""
        x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(1))
        model = relu_net()
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.body[1].weight.mul_(c)
            other.head.weight.div_(c)
        pictures, plain = [], []
        for net in (model, other):
            objective = Objective(net, F.cross_entropy, (x, y))
            d = random_direction(objective, generator=0)
            pictures.append(slice_1d(objective, d, points=7).values)
            unscaled = random_direction(objective, normalize=None, generator=0)
            plain.append(slice_1d(objective, unscaled, points=7).values)
        np.testing.assert_allclose(pictures[0], pictures[1], rtol=1e-9)
        assert abs(c - 1) < 0.1 or not np.allclose(plain[0], plain[1], rtol=1e-3)

    def test_layer_and_adaptive_scales(self) -> None:
        model = relu_net(bias=True)
        objective = Objective(model, F.mse_loss, (torch.ones(2, 6).double(), torch.ones(2, 4)))
        layer = objective.unflatten(random_direction(objective, normalize="layer", generator=0))
        for name, weight in model.named_parameters():
            expected = weight.norm() if weight.ndim > 1 else torch.zeros(())
            torch.testing.assert_close(layer[name].norm(), expected.double().detach())
        with torch.no_grad():
            model.head.weight[0, 0] = 0
        adaptive = random_direction(objective, normalize="adaptive", generator=0)
        plain = random_direction(objective, normalize=None, generator=0)
        weights = objective.unflatten(adaptive)["head.weight"]
        assert weights[0, 0] == 0
        torch.testing.assert_close(
            weights, objective.unflatten(plain)["head.weight"] * model.head.weight.detach().abs()
        )
        with pytest.raises(ValueError, match="normalize: expected"):
            random_direction(objective, normalize="kernel")

    def test_a_seed_gives_the_same_direction_and_another_a_nearly_orthogonal_one(self) -> None:
        objective = Objective(relu_net(), F.mse_loss, (torch.ones(2, 6).double(), torch.ones(2, 4)))
        a, b = (random_direction(objective, generator=7) for _ in range(2))
        assert torch.equal(a, b)
        first, second = random_plane(objective, generator=7)
        assert torch.equal(first, a)
        assert abs(F.cosine_similarity(first, second, dim=0)) < 0.4

    def test_trajectory_plane_is_that_of_pca(self) -> None:
        rng = np.random.default_rng(0)
        path = np.cumsum(rng.normal(size=(12, 5)) * [5, 3, 0.4, 0.2, 0.1], 0)
        objective = on_vector(path[-1], lambda w: w.sum())
        plane = trajectory_directions(
            objective, torch.tensor(path), origin=torch.tensor(path.mean(0))
        )
        pca = PCA(2).fit(path)
        np.testing.assert_allclose(plane.explained, pca.explained_variance_ratio_, rtol=1e-8)
        axes = torch.stack([plane.d1, plane.d2]).numpy()
        np.testing.assert_allclose(np.abs((axes * pca.components_).sum(1)), 1, rtol=1e-8)
        np.testing.assert_allclose(plane.coordinates, (path - path.mean(0)) @ axes.T, atol=1e-9)
        about_last = trajectory_directions(objective, list(torch.tensor(path)))
        np.testing.assert_allclose(about_last.coordinates[-1], 0, atol=1e-12)
        with pytest.raises(ValueError, match="at least 3"):
            trajectory_directions(objective, torch.tensor(path[:2]))
        with pytest.raises(ValueError, match="lie on a line"):
            trajectory_directions(objective, torch.outer(torch.arange(5.0), torch.ones(5)))


class TestSlices:
    def test_of_a_quadratic(self) -> None:
        scale = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
        objective = on_vector([0.0, 0.0, 0.0], lambda w: (scale * w * w).sum())
        d1, d2 = torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 1.0, 1.0]).double()
        found = slice_2d(objective, d1, d2, span=2.0, points=9)
        np.testing.assert_allclose(
            found.values, found.x[None, :] ** 2 + 13 * found.y[:, None] ** 2, atol=1e-12
        )
        assert found.complete
        frame = found.to_frame()
        np.testing.assert_allclose(frame.loss, frame.a**2 + 13 * frame.b**2, atol=1e-12)
        line = slice_1d(objective, d2, center=d1, span=1.5, points=8)
        np.testing.assert_allclose(line.values, 1 + 13 * line.t**2, atol=1e-12)
        assert list(line.to_frame()) == ["t", "loss"]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 60))
    def test_refinement_visits_every_point_once_and_the_corners_first(self, points: int) -> None:
        levels = list(refinement(points))
        flat = np.concatenate(levels)
        assert sorted(flat) == list(range(points * points))
        first = {(i // points, i % points) for i in levels[0]}
        assert {(0, 0), (points - 1, points - 1)} <= first
        assert len(levels[0]) <= 13**2

    def test_bad_input(self) -> None:
        objective = on_vector([1.0, 2.0], lambda w: w.sum())
        d = torch.ones(2).double()
        for words, make in [
            ("span: expected", lambda: slice_1d(objective, d, span=0)),
            ("points: expected", lambda: slice_2d(objective, d, d, points=0)),
            (r"d2: expected shape \(2,\)", lambda: slice_2d(objective, d, torch.ones(3))),
            ("center: expected shape", lambda: slice_1d(objective, d, center=torch.ones(1))),
        ]:
            with pytest.raises(ValueError, match=words):
                make()


class TestPaths:
    def test_equal_ends_have_no_barrier(self) -> None:
        objective = on_vector([1.0, 2.0], lambda w: (w**4).sum())
        path = linear_path(objective, objective.theta, objective.theta)
        assert path.barrier == 0 and path.connectivity == 0

    def test_a_double_well(self) -> None:
        objective = on_vector([0.0], lambda w: ((w**2 - 1) ** 2).sum())
        path = linear_path(objective, -torch.ones(1).double(), torch.ones(1).double(), points=21)
        assert path.barrier == pytest.approx(1) and path.connectivity == pytest.approx(-1)
        np.testing.assert_allclose(path.values, ((2 * path.t - 1) ** 2 - 1) ** 2, atol=1e-12)

    def test_the_sign_of_connectivity(self) -> None:
        t = np.linspace(0, 1, 3)
        assert mode_connectivity(Path(t, np.array([1.0, 3.0, 2.0]))) == pytest.approx(-1.5)
        assert mode_connectivity(Path(t, np.array([1.0, 0.2, 2.0]))) == pytest.approx(1.3)
        assert barrier(Path(t, np.array([1.0, 0.2, 2.0]))) == 0

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000))
    def test_a_convex_loss_has_no_barrier_anywhere(self, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(25, 4, dtype=torch.float64, generator=source)
        y = torch.randint(0, 3, (25,), generator=source)
        objective = Objective(nn.Linear(4, 3).double(), F.cross_entropy, (x, y))
        ends = torch.randn(2, objective.size, dtype=torch.float64, generator=source) * 3
        path = linear_path(objective, *ends)
        assert path.barrier <= 1e-12
        flat = linear_path(objective, ends[0], ends[0] + 1e-9 * ends[1])
        assert abs(flat.connectivity) < 1e-6

    def test_a_bend_goes_round_the_hill(self) -> None:
        def ring(w: Tensor) -> Tensor:
            return (w.norm() - 1) ** 2

        objective = on_vector([1.0, 0.0], ring)
        ends = torch.tensor([[1.0, 0.05], [-1.0, 0.05]], dtype=torch.float64)
        bend = bezier(objective, ends[0], ends[1], steps=400, lr=0.2, generator=0)
        straight = linear_path(objective, *ends, points=41)
        curved = linear_path(objective, *ends, points=41, bend=bend)
        assert straight.barrier > 0.85
        # A parabola from (1, 0) to (-1, 0) stays within 0.05 of the circle in squared distance.
        assert curved.barrier < 0.05
        assert curved.values[0] == pytest.approx(straight.values[0])
        with pytest.raises(ValueError, match="points: expected at least both ends"):
            linear_path(objective, *ends, points=1)
