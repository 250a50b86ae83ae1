"""A network cut at named layers: run from one layer to another, with Jacobians per sample."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lab import checks

OUTPUT = "output"
ROWS = 512  # rows whose Jacobians are held together


@dataclass(frozen=True)
class Chain:
    """A network cut at the inputs of named modules; make one with `cut`.

    Attributes:
        model: a copy in float64 and evaluation mode.
        names: the layers in order of execution; the last is "output".
        activations: per layer, (n, d).
        first: the model's arguments, one row of each.
    """

    model: nn.Module
    names: tuple[str, ...]
    activations: tuple[Float[Tensor, "n d"], ...]
    first: tuple[Tensor, ...]

    @property
    def last(self) -> int:
        """Index of the output."""
        return len(self.names) - 1

    @property
    def outputs(self) -> Float[Tensor, "n c"]:
        """What the network answers."""
        return self.activations[-1]

    def position(self, layer: str) -> int:
        """Index of a layer by name."""
        return self.names.index(checks.one_of(layer, self.names, "layer"))

    def run(
        self,
        start: int,
        stop: int,
        f: Float[Tensor, "m d"],
        *,
        push: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> Float[Tensor, "m e"]:
        """Activations of layer ``stop`` when those of layer ``start`` are ``f``.

        The rest of the network sees one row only, so a call costs what lies between the layers.

        Args:
            start: index of a layer.
            stop: index of a later one.
            f: activations, any number of rows.
            push: added to what the module behind ``start`` returns.
            constant: multiplies all biases, as the constant unit does once they are folded in.
        """
        seen: dict[str, Tensor] = {}

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen["f"] = args[0]
            return (args[0][:1],)

        biases = {}
        if constant is not None:
            named = self.model.named_parameters()
            biases = {k: constant * v for k, v in named if k.rpartition(".")[2] == "bias"}
        with ExitStack() as hooks:
            module = self.model.get_submodule(self.names[start])
            hooks.enter_context(module.register_forward_pre_hook(lambda m, args: (f,)))
            if push is not None:
                hooks.enter_context(module.register_forward_hook(lambda m, args, out: out + push))
            if stop < self.last:
                behind = self.model.get_submodule(self.names[stop])
                hooks.enter_context(behind.register_forward_pre_hook(take))
            answer: Tensor = torch.func.functional_call(self.model, biases, self.first)
        return seen.get("f", answer)

    def jacobians(
        self, start: int, stop: int, f: Float[Tensor, "n d"], turn: Float[Tensor, "e k"]
    ) -> Iterator[Float[Tensor, "m k d"]]:
        """Derivatives of layer ``stop`` times ``turn`` by ``f`` at layer ``start``, in blocks."""
        for rows in f.split(ROWS):
            rows = rows.detach().requires_grad_()
            yield rows_jacobian(self.run(start, stop, rows) @ turn, rows)

    def by_constant(
        self, start: int, stop: int, f: Float[Tensor, "n d"], turn: Float[Tensor, "e k"], at: float
    ) -> Iterator[Float[Tensor, "m k"]]:
        """The same by the constant unit that carries the biases, at its value ``at``."""
        one = torch.tensor(at, dtype=f.dtype, device=f.device)
        for rows in f.split(ROWS):

            def moved(c: Tensor, rows: Tensor = rows) -> Tensor:
                return self.run(start, stop, rows, constant=c) @ turn

            yield torch.autograd.functional.jvp(moved, one, torch.ones_like(one))[1]

    def gradients(self, start: int) -> Iterator[Float[Tensor, "m c e"]]:
        """Derivatives of the outputs by what the module behind a layer returns, in blocks."""
        for rows in self.activations[start].split(ROWS):
            module = self.model.get_submodule(self.names[start])
            push = torch.zeros_like(module(rows)).requires_grad_()
            yield rows_jacobian(self.run(start, self.last, rows, push=push), push)

    def refuse_folding(self) -> None:
        """Raise unless all constants are biases of ``nn.Linear``, which a constant unit carries."""
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and not isinstance(module, nn.Linear | nn.Embedding):
                raise ValueError(
                    f"center: {name!r} is a {type(module).__name__}, whose constants are not "
                    "biases of nn.Linear and cannot be folded in; use center=True"
                )


@torch.no_grad()
def cut(
    model: nn.Module, X: Tensor | tuple[Tensor, ...], layers: Sequence[str] | None = None
) -> Chain:
    """Cut a network into layers and record their activations.

    Args:
        model: any module; it is copied, in float64 and evaluation mode.
        X: the data, shape (n, ...), or a tuple of arguments with n rows each.
        layers: names of submodules whose *inputs* are the layers; by default every ``nn.Linear``.
            The output is always the last layer.

    Raises:
        ValueError: a layer is not called exactly once with one tensor of shape (n, d), or something
            reaches the output on a path around it; the message names it.
    """
    given = X if isinstance(X, tuple) else (X,)
    n = checks.same_length(**{f"X[{i}]": part for i, part in enumerate(given)})
    inputs = tuple(part.double() if part.is_floating_point() else part for part in given)
    net = copy.deepcopy(model).double().eval().requires_grad_(False)
    known = dict(net.named_modules())
    if layers is None:
        layers = [name for name, module in known.items() if isinstance(module, nn.Linear)]
    if not layers or (wrong := [name for name in layers if name not in known]):
        what = f"no module {wrong[0]!r}" if layers else "no nn.Linear; name the layers"
        raise ValueError(f"layers: the model has {what}")
    seen: list[tuple[str, Any]] = []
    with ExitStack() as hooks:
        for name in layers:

            def look(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                seen.append((name, args[0] if len(args) == 1 else args))

            hooks.enter_context(known[name].register_forward_pre_hook(look))
        outputs = net(*inputs)
    calls = Counter(name for name, _ in seen)
    for name in layers:
        if calls[name] != 1:
            raise ValueError(f"layers: {name!r} is called {calls[name]} times; expected once")
    for name, f in [*seen, (OUTPUT, outputs)]:
        if not isinstance(f, Tensor) or f.ndim != 2 or len(f) != n:
            found = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"layers: {name!r} is {found}; expected one tensor of shape ({n}, d)")
        checks.as_floats(f, name)
    names = (*(name for name, _ in seen), OUTPUT)
    first = tuple(part[:1] for part in inputs)
    chain = Chain(net, names, (*(f for _, f in seen), outputs), first)
    for start, name in enumerate(names[:-1]):
        again = chain.run(start, chain.last, chain.activations[start])
        if again.shape != outputs.shape or not torch.allclose(again, outputs, rtol=1e-9):
            raise ValueError(f"layers: {name!r} does not carry everything; a path goes around it")
    return chain


def rows_jacobian(y: Float[Tensor, "m k"], x: Float[Tensor, "m d"]) -> Float[Tensor, "m k d"]:
    """Derivatives of each row of y by its own row of x."""
    m, k = y.shape
    pick = torch.eye(k, dtype=y.dtype, device=y.device)[:, None, :].expand(k, m, k)
    (J,) = torch.autograd.grad(y, x, pick, is_grads_batched=True)
    return J.transpose(0, 1)
