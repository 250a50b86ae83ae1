"""Any torch model as a function of one vector, and left exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from workbench.lab import models, seeded
from workbench.loss_landscapes.geometry import Objective, random_plane, slice_2d
from workbench.loss_landscapes.geometry.parameters import Parameters


def data(n: int = 40, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(n, *(shape or (5,)), generator=source)
    return x, torch.randint(0, classes, (n,), generator=source)


def mlp() -> nn.Module:
    with seeded(0):
        return models.MLP((5, 7, 3), "tanh")


def cnn() -> nn.Module:
    with seeded(0):
        return models.CNN((4, 6), 3)


def held(model: nn.Module) -> dict[str, Any]:
    """All that a look must leave alone, memory addresses included."""
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    flags = {k: m.training for k, m in model.named_modules()}
    asked = {k: (p.requires_grad, None if p.grad is None else p.grad.clone())
             for k, p in model.named_parameters()}  # fmt: skip
    return {"state": state, "flags": flags, "asked": asked}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = held(model)
    assert after["flags"] == before["flags"]
    for name, (address, value) in before["state"].items():
        assert after["state"][name][0] == address, f"{name} has moved"
        assert torch.equal(after["state"][name][1], value), f"{name} has changed"
    for name, (flag, gradient) in before["asked"].items():
        found = after["asked"][name]
        assert found[0] == flag
        assert gradient is None or torch.equal(found[1], gradient)


class TestValues:
    def test_it_is_the_mean_loss(self) -> None:
        model, (x, y) = mlp(), data()
        assert Objective(model, F.cross_entropy, (x, y))() == pytest.approx(
            F.cross_entropy(model(x), y).item(), rel=1e-6
        )

    def test_at_another_vector_it_is_the_loss_of_a_model_that_holds_it(self) -> None:
        model, (x, y) = mlp(), data()
        objective = Objective(model, F.cross_entropy, (x, y))
        theta = objective.theta * 1.3 + 0.1
        other = copy.deepcopy(model)
        nn.utils.vector_to_parameters(theta, other.parameters())
        assert objective(theta) == pytest.approx(F.cross_entropy(other(x), y).item(), rel=1e-6)
        with objective.at(theta) as same:
            torch.testing.assert_close(same(x), other(x))

    @pytest.mark.parametrize("batch_size", [7, 40])
    def test_a_loader_gives_what_tensors_give(self, batch_size: int) -> None:
        model, (x, y) = mlp(), data()
        whole = Objective(model, F.cross_entropy, (x, y))
        parts = Objective(
            model, F.cross_entropy, DataLoader(TensorDataset(x, y), batch_size=batch_size)
        )
        v = torch.randn(whole.size, generator=torch.Generator().manual_seed(1))
        assert parts() == pytest.approx(whole(), rel=1e-5)
        torch.testing.assert_close(parts.gradient()[1], whole.gradient()[1])
        torch.testing.assert_close(parts.hvp(v), whole.hvp(v), rtol=1e-4, atol=1e-6)

    def test_a_loader_is_gone_through_once_for_many_points(self) -> None:
        passes = 0

        class Counting:
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                nonlocal passes
                passes += 1
                yield from zip(*(part.split(16) for part in data()), strict=True)

        objective = Objective(mlp(), F.cross_entropy, Counting())
        assert len(list(objective.values([objective.theta] * 100))) == 100
        assert passes == 2  # 64 points and 36

    @pytest.mark.parametrize("make", [mlp, cnn])
    @pytest.mark.parametrize("batch_norm", ["frozen", "batch"])
    def test_points_together_are_points_one_by_one(self, make: Any, batch_norm: str) -> None:
        x, y = data(40, *((1, 8, 8) if make is cnn else (5,)))
        objective = Objective(make(), F.cross_entropy, (x, y), batch_norm=batch_norm)
        thetas = [objective.theta * (1 + 0.1 * i) for i in range(5)]
        together = list(objective.values(thetas, together=3))
        assert together == pytest.approx(list(objective.values(thetas)), rel=1e-5)

    def test_rows_taken_a_few_at_a_time_give_the_same_mean(self) -> None:
        x, y = data(700, 1, 8, 8)
        model = cnn().eval()
        objective = Objective(model, F.cross_entropy, (x, y))
        assert objective._chunk() is not None
        assert objective() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)

    def test_a_loss_that_is_no_mean_over_rows_gets_all_rows(self) -> None:
        def spread(out: Tensor, y: Tensor) -> Tensor:
            return out.var(0).sum() * len(y)

        x, y = data(700, 1, 8, 8)
        model = cnn().eval()
        objective = Objective(model, spread, (x, y))
        assert objective() == pytest.approx(float(spread(model(x), y)), rel=1e-4)

    def test_a_closure(self) -> None:
        model, (x, y) = mlp(), data()
        closure = Objective(model, lambda: F.cross_entropy(model(x), y))
        usual = Objective(model, F.cross_entropy, (x, y))
        theta = usual.theta * 0.7
        assert closure(theta) == pytest.approx(usual(theta), rel=1e-6)
        v = torch.ones(usual.size)
        torch.testing.assert_close(closure.hvp(v), usual.hvp(v))


class TestModels:
    def test_several_inputs_and_named_inputs(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(5, 3), nn.Linear(2, 3)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return self.first(a) + self.second(b)

        model, (x, y) = Two(), data()
        b = torch.randn(40, 2)
        expected = F.cross_entropy(model(x, b), y).item()
        by_place = Objective(model, F.cross_entropy, (x, b, y), inputs=2)
        batches = [
            {"b": b[i : i + 20], "label": y[i : i + 20], "a": x[i : i + 20]} for i in (0, 20)
        ]
        by_name = Objective(model, F.cross_entropy, batches, inputs=["a", "b"])
        assert by_place() == pytest.approx(expected, rel=1e-6)
        assert by_name() == pytest.approx(expected, rel=1e-6)
        with pytest.raises(ValueError, match="no 'c'"):
            Objective(model, F.cross_entropy, batches, inputs=["a", "c"])()

    def test_tied_parameters_count_once_and_move_together(self) -> None:
        with seeded(0):
            model = models.GPT(11, 16, 1, 2, 8)
        tokens = torch.randint(0, 11, (6, 8), generator=torch.Generator().manual_seed(0))
        objective = Objective(model, lambda out, t: F.cross_entropy(out.mT, t), (tokens, tokens))
        assert objective.size == sum(p.numel() for p in model.parameters())
        with objective.at(objective.theta * 2):
            assert model.head.weight is model.embed.weight
            doubled = model.head.weight.detach().clone()
        torch.testing.assert_close(doubled, 2 * model.embed.weight)
        one, many = (
            objective([objective.theta][0]),
            list(objective.values([objective.theta], together=2)),
        )
        assert many == pytest.approx([one], rel=1e-5)

    def test_second_derivatives_pass_through_attention(self) -> None:
        with seeded(0):
            model = models.GPT(5, 8, 1, 2, 4).double()
        tokens = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(0))
        objective = Objective(model, lambda out, t: F.cross_entropy(out.mT, t), (tokens, tokens))
        source = torch.Generator().manual_seed(1)
        v = F.normalize(torch.randn(objective.size, dtype=torch.float64, generator=source), dim=0)
        eps = 1e-5
        ahead, behind = (objective.gradient(objective.theta + s * eps * v)[1] for s in (1, -1))
        expected = (ahead - behind) / (2 * eps)
        torch.testing.assert_close(objective.hvp(v), expected, rtol=1e-5, atol=1e-8)

    def test_different_parameters_in_one_memory_are_refused_by_name(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = nn.Parameter(model[0].weight.data)
        with pytest.raises(ValueError, match=r"0\.weight and 1\.weight .* same memory"):
            Objective(model, F.mse_loss, (torch.ones(2, 4), torch.ones(2, 4)))

    def test_frozen_parameters_stay_unless_asked_for(self) -> None:
        model, xy = mlp(), data()
        model.head.requires_grad_(False)
        objective = Objective(model, F.cross_entropy, xy)
        assert objective.names == ["body.1.weight", "body.1.bias"]
        everything = Objective(model, F.cross_entropy, xy, frozen=True)
        assert everything.size == sum(p.numel() for p in model.parameters())
        before = held(model)
        assert everything.gradient()[1].norm() > objective.gradient()[1].norm()
        assert_untouched(model, before)
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameters"):
            Objective(model, F.cross_entropy, xy)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_has_values_but_no_curvature(self, dtype: torch.dtype) -> None:
        model, (x, y) = mlp().to(dtype), data()
        objective = Objective(
            model, lambda out, t: F.cross_entropy(out.float(), t), (x.to(dtype), y)
        )
        assert objective.theta.dtype == torch.float32
        before = held(model)
        assert objective(objective.theta * 2) != objective()
        assert_untouched(model, before)
        with pytest.raises(TypeError, match=r"body\.1\.weight is .*needs float32"):
            objective.hvp(objective.theta)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_models(self, backend: str) -> None:
        model, (x, y) = mlp(), data()
        plain = Objective(model, F.cross_entropy, (x, y))
        compiled = Objective(torch.compile(model, backend=backend), F.cross_entropy, (x, y))
        assert compiled.names == plain.names
        theta, v = plain.theta * 1.5, torch.ones(plain.size)
        assert compiled(theta) == pytest.approx(plain(theta), rel=1e-5)
        assert compiled() == pytest.approx(plain(), rel=1e-5)
        torch.testing.assert_close(compiled.hvp(v), plain.hvp(v))
        closure = Objective(compiled.model, lambda: F.cross_entropy(compiled.model(x), y))
        with pytest.raises(ValueError, match="model: is compiled"):
            closure.hvp(v)

    def test_dropout_is_off(self) -> None:
        model, (x, y) = models.MLP((5, 7, 3), dropout=0.5).train(), data()
        objective = Objective(model, F.cross_entropy, (x, y))
        assert objective() == objective()
        assert model.training

    def test_statistics_are_reestimated_as_torch_does_it(self) -> None:
        model, (x, y) = cnn(), data(60, 1, 8, 8)
        objective = Objective(model, F.cross_entropy, (x, y), batch_norm="reestimate")
        theta = objective.theta * 1.7
        other = copy.deepcopy(model)
        nn.utils.vector_to_parameters(theta, other.parameters())
        update_bn([x], other)
        expected = F.cross_entropy(other.eval()(x), y).item()
        assert objective(theta) == pytest.approx(expected, rel=1e-5)
        assert expected != pytest.approx(
            Objective(model, F.cross_entropy, (x, y))(theta), rel=1e-2
        ), "the frozen statistics must differ, or this test shows nothing"

    def test_batch_statistics_are_those_of_training(self) -> None:
        model, (x, y) = cnn(), data(60, 1, 8, 8)
        expected = F.cross_entropy(copy.deepcopy(model).train()(x), y).item()
        objective = Objective(model, F.cross_entropy, (x, y), batch_norm="batch")
        assert objective() == pytest.approx(expected, rel=1e-5)


class TestDerivatives:
    @pytest.mark.parametrize("keep", [True, False])
    def test_products_are_those_of_the_dense_hessian(self, keep: bool) -> None:
        model, (x, y) = mlp().double(), data()
        x = x.double()
        objective = Objective(model, F.cross_entropy, (x, y))
        theta = objective.theta * 1.2

        def loss(vector: Tensor) -> Tensor:
            weights = dict(zip(objective.names, objective.parameters.split(vector), strict=True))
            return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

        dense = torch.func.hessian(loss)(theta)
        v = torch.randn(3, objective.size, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
        with objective.curvature(theta, keep=keep) as product:
            torch.testing.assert_close(product(v), v @ dense)
            torch.testing.assert_close(product(v[0]), dense @ v[0])
            assert product.products == 4
        value, gradient = objective.gradient(theta)
        assert value == pytest.approx(float(loss(theta)))
        torch.testing.assert_close(gradient, torch.func.grad(loss)(theta))

    def test_a_linear_loss_has_no_curvature(self) -> None:
        model = nn.Linear(3, 1)
        objective = Objective(model, lambda out: out.mean(), (torch.ones(4, 3),))
        assert objective.hvp(torch.ones(4)).norm() == 0

    def test_gradients_of_the_user_are_left_alone(self) -> None:
        model, (x, y) = mlp(), data()
        F.cross_entropy(model(x), y).backward()
        before = held(model)
        objective = Objective(model, F.cross_entropy, (x, y))
        objective.gradient()
        objective.hvp(objective.theta)
        assert_untouched(model, before)


class TestRestored:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("batch_norm", ["frozen", "batch", "reestimate"])
    def test_after_an_interruption_everything_is_what_it_was(
        self, error: type[BaseException], batch_norm: str
    ) -> None:
        model, (x, y), calls = cnn().train(), data(40, 1, 8, 8), 0

        def failing(out: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise error
            return F.cross_entropy(out, labels)

        before = held(model)
        objective = Objective(model, failing, (x, y), batch_norm=batch_norm)
        with pytest.raises(error):
            list(objective.values([objective.theta * 3] * 10))
        assert_untouched(model, before)

    def test_ctrl_c_gives_the_part_of_a_slice_that_was_computed(self) -> None:
        model, (x, y), calls = mlp(), data(), 0

        def failing(out: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 60:
                raise KeyboardInterrupt
            return F.cross_entropy(out, labels)

        before = held(model)
        objective = Objective(model, failing, (x, y))
        part = slice_2d(objective, *random_plane(objective, generator=0), points=13)
        assert not part.complete
        assert (~torch.tensor(part.values).isnan()).sum() == 60
        assert not torch.tensor(part.values[::2, ::2]).isnan().any(), "coarse points come first"
        assert_untouched(model, before)


class TestBadInput:
    def test_what_cannot_be_used_is_named(self) -> None:
        model, (x, y) = mlp(), data()
        ok = Objective(model, F.cross_entropy, (x, y))
        cases: list[tuple[type[Exception], str, Any]] = [
            (TypeError, "model: expected", lambda: Objective(3, F.cross_entropy, (x, y))),
            (TypeError, "loss_fn: expected", lambda: Objective(model, 3, (x, y))),
            (TypeError, "data: is an iterator",
             lambda: Objective(model, F.cross_entropy, iter([(x, y)]))),
            (TypeError, "data: expected tensors", lambda: Objective(model, F.cross_entropy, 3)),
            (ValueError, "same number of rows",
             lambda: Objective(model, F.cross_entropy, (x, y[:3]))),
            (ValueError, "data: is empty",
             lambda: Objective(model, F.cross_entropy, (x[:0], y[:0]))),
            (ValueError, "data: the loader gave no batch",
             lambda: Objective(model, F.cross_entropy, [])()),
            (ValueError, "batch_norm: expected", lambda: Objective(model, F.cross_entropy, (x, y),
                                                                   batch_norm="train")),
            (ValueError, "needs data", lambda: Objective(model, lambda: None,
                                                         batch_norm="reestimate")),
            (ValueError, "loss_fn: expected one number",
             lambda: Objective(model, lambda out, t: out, (x, y))()),
            (ValueError, r"theta: expected shape \(66,\)", lambda: ok(torch.ones(3))),
            (ValueError, "theta: has no 'body.1.weight'", lambda: ok({"a": torch.ones(2)})),
            (ValueError, r"v: expected shape", lambda: ok.hvp(torch.ones(3))),
            (ValueError, "together:", lambda: list(
                Objective(model, lambda: torch.ones(())).values([ok.theta], together=2))),
        ]  # fmt: skip
        for kind, words, make in cases:
            with pytest.raises(kind, match=words):
                make()

    def test_parameters_that_hold_nothing_to_vary(self) -> None:
        with pytest.raises(ValueError, match="weight is not initialised"):
            Parameters(nn.LazyLinear(3))
        with pytest.raises(ValueError, match="weight holds no numbers"):
            Parameters(nn.Linear(0, 3, bias=False))

    def test_state_dicts_and_models_are_vectors_too(self) -> None:
        model, xy = mlp(), data()
        objective = Objective(model, F.cross_entropy, xy)
        for given in (model, model.state_dict(), list(model.parameters())):
            assert torch.equal(objective.flatten(given), objective.theta)
        back = objective.unflatten(objective.theta)
        assert all(torch.equal(back[n], p) for n, p in model.named_parameters())
