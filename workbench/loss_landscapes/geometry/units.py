"""Which axes of a network's tensors count the same hidden units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from workbench.lab.models import CNN, MLP
from workbench.loss_landscapes.geometry.parameters import eager

# For each tensor by name, and each of its axes: the group of units that the axis counts, or None.
Spec = Mapping[str, tuple[str | None, ...]]

_EACH = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout,
)  # fmt: skip
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_BY_PLACE = (*_CONVOLUTIONS, *_POOLS)
_BY_UNIT = (nn.Linear, nn.LayerNorm)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def chain_spec(model: nn.Module) -> Spec:
    """Units of a chain of layers: ``nn.Sequential`` (nested as you like), lab.models' MLP and CNN.

    Layers may be Linear, Conv1d and Conv2d (also depthwise), BatchNorm, LayerNorm over the units of
    linear layers, elementwise activations, dropout, pooling and Flatten. A group of units is named
    by the layer that makes them. What the last layer makes is the output and stays in order.

    For other models write the mapping yourself: parameter (or buffer) name -> for each axis the
    name of its group, or None. All axes of one group are renumbered together: in a residual
    network, whatever is added has one group. A flattened axis may be a multiple of the group.

    Raises:
        TypeError: the model, or one of its layers, is not among these; the message names it.
        ValueError: a parameter is used in two places, or no layer has units.
    """
    spec: dict[str, tuple[str | None, ...]] = {}
    units: str | None = None
    places = False  # whether units are channels with places behind them
    seen: dict[int, str] = {}
    for name, layer in _layers(eager(model)):
        prefix = f"{name}." if name else ""
        if isinstance(layer, nn.Flatten):
            places = False
        elif units is not None and isinstance(layer, _BY_PLACE if not places else _BY_UNIT):
            needed = "nn.Flatten" if places else "a convolution"
            raise TypeError(f"model: {name} is {type(layer).__name__} without {needed} before it")
        axes, units = _axes(layer, name, units)
        for key, tensor in layer.named_parameters():
            if id(tensor) in seen:
                raise ValueError(f"model: {prefix}{key} is also {seen[id(tensor)]}; pass spec=")
            if key not in axes:
                raise TypeError(f"model: {prefix}{key} is no weight or bias; pass spec=")
            seen[id(tensor)] = f"{prefix}{key}"
        spec |= {f"{prefix}{key}": axes[key] for key in layer.state_dict() if key in axes}
        places = places or isinstance(layer, _CONVOLUTIONS)
    if not spec:
        raise ValueError("model: has no layer with weights, so there are no units to match")
    last = units
    return {
        name: tuple(None if group == last else group for group in axes)
        for name, axes in spec.items()
    }


def sizes(spec: Spec, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of units in each group.

    Raises:
        ValueError: an entry of ``spec`` does not fit the tensors; the message names it.
    """
    lengths: dict[str, list[tuple[int, str]]] = {}
    for name, axes in spec.items():
        if name not in state:
            raise ValueError(f"spec: {name} is not in the models")
        if len(axes) != state[name].ndim:
            raise ValueError(
                f"spec: {name} has {len(axes)} axes; expected {state[name].ndim}, one for each of "
                f"shape {tuple(state[name].shape)}"
            )
        for group, length in zip(axes, state[name].shape, strict=True):
            if group is not None:
                lengths.setdefault(group, []).append((length, name))
    found = {group: min(entries)[0] for group, entries in lengths.items()}
    for group, entries in lengths.items():
        for length, name in entries:
            if length % found[group]:
                raise ValueError(
                    f"spec: {name} has {length} entries for the {found[group]} units of {group}"
                )
    return found


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and layer, in the order in which they are applied."""
    if isinstance(model, (nn.Sequential, MLP, CNN)):
        if type(model).forward not in (nn.Sequential.forward, MLP.forward, CNN.forward):
            raise TypeError(f"model: {type(model).__name__} has a forward of its own; pass spec=")
        for name, child in model._modules.items():  # with those that occur twice
            assert child is not None
            yield from _layers(child, f"{prefix}{name}.")
        return
    yield prefix.removesuffix("."), model


def _axes(
    layer: nn.Module, name: str, units: str | None
) -> tuple[dict[str, tuple[str | None, ...]], str | None]:
    """Axes of the layer's tensors, and the units that it hands on."""
    if isinstance(layer, nn.Linear):
        return {"weight": (name, units), "bias": (name,)}, name
    if isinstance(layer, _CONVOLUTIONS):
        kernel = (None,) * len(layer.kernel_size)
        if layer.groups == 1:
            return {"weight": (name, units, *kernel), "bias": (name,)}, name
        if layer.groups == layer.in_channels == layer.out_channels:
            return {"weight": (units, None, *kernel), "bias": (units,)}, units
        raise TypeError(f"model: {name} is a convolution in {layer.groups} groups; pass spec=")
    if isinstance(layer, _BATCH_NORMS):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (units,)), units
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return {"weight": (units,), "bias": (units,)}, units
    if isinstance(layer, nn.PReLU):
        return {"weight": (units if layer.num_parameters > 1 else None,)}, units
    flatten = isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)
    if flatten or isinstance(layer, (*_EACH, *_POOLS)):
        return {}, units
    label = f"{name} is {type(layer).__name__}" if name else type(layer).__name__
    raise TypeError(
        f"model: {label}; expected a chain of Linear, Conv, BatchNorm and elementwise layers. For "
        "others pass spec= (parameter name -> group of units for each axis)"
    )
