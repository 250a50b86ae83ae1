r"""All losses of the family and their rivals under one calling convention for training.

`lab.members.train` wants ``loss(logits (m, b, k), y (m, b), index (m, b)) -> (m,)``: one number for
each of m networks. `ZOO` names each loss with its paper and its needs; `member_loss` turns a name,
or a loss of your own, into that form. Hyper-parameters are the papers' defaults.

Losses of two classes take the probability (or score) of class 1 against class 0. With more classes
EnsLoss and AnyLoss are summed or averaged over "this class or not", which is an extension of ours.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks

if TYPE_CHECKING:
    import pandas as pd

MemberLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """What a loss is built for.

    Attributes:
        classes: k.
        rows: training rows n; the row numbers given to the loss are taken modulo n.
        members: m, networks trained together.
        seed: of the losses that draw.
    """

    classes: int
    rows: int
    members: int
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """A loss and what it needs.

    Attributes:
        label: what it is called in tables and figures.
        paper: slug of the family's paper that it stands for, or "".
        build: makes the loss for a setting.
        source: whose loss it is.
        per: ``row`` (a mean over rows) or ``set`` (a function of the whole minibatch).
        binary: whether its paper is about two classes only.
        memory: whether it keeps a number for each training row.
        bag: size of the bags of which it sees mean labels only; 0 when it sees each label.
        least: fewest classes that it can learn.
    """

    label: str
    paper: str
    build: Callable[[Setting], MemberLoss] = field(repr=False)
    source: str = ""
    per: str = "row"
    binary: bool = False
    memory: bool = False
    bag: int = 0
    least: int = 2


Given = str | Entry | nn.Module | Callable[..., Tensor]


def by_row(fn: Callable[..., Tensor], **hyper: Any) -> MemberLoss:
    """A loss ``fn(logits (n, k), y (n,), reduction="none")`` as a mean over each member's rows."""

    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        m, b, k = logits.shape
        values = fn(logits.reshape(m * b, k), y.reshape(m * b), reduction="none", **hyper)
        return values.view(m, b).mean(1)

    return loss


def _comp_sum(tau: float) -> Callable[[Setting], MemberLoss]:
    def build(setting: Setting) -> MemberLoss:
        from workbench.losses.comp_sum import comp_sum_loss

        return by_row(comp_sum_loss, tau=tau)

    return build


def _ldr(setting: Setting) -> MemberLoss:
    from workbench.losses.ldr_loss import ldr_kl

    return by_row(ldr_kl)


def _aldr(setting: Setting) -> MemberLoss:
    from workbench.losses.ldr_loss import ALDR, aldr_kl, aldr_lambda, normalised

    default = ALDR(1, setting.classes)
    lambdas = torch.full((setting.members, setting.rows), default.lam0)
    who = torch.arange(setting.members)[:, None]

    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        scores = normalised(logits, softplus=default.softplus)
        at = index % setting.rows
        lam = aldr_lambda(scores, lambdas[who, at], lam0=default.lam0, alpha=default.alpha)
        lambdas[who, at] = lam.to(lambdas)
        return aldr_kl(
            scores, y, lam, lam0=default.lam0, alpha=default.alpha, margin=default.margin
        ).mean(1)

    return loss


def _ensloss(setting: Setting) -> MemberLoss:
    from workbench.losses.ensloss import ensloss, one_vs_rest

    draws = torch.Generator().manual_seed(setting.seed)

    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if setting.classes == 2:
            return ensloss(logits[..., 1] - logits[..., 0], y, generator=draws)
        return one_vs_rest(logits, y, generator=draws)

    return loss


def _z_loss(setting: Setting) -> MemberLoss:
    from workbench.losses.z_loss import z_loss

    return by_row(z_loss)


def _taylor(setting: Setting) -> MemberLoss:
    from workbench.losses.z_loss import taylor_softmax_loss

    return by_row(taylor_softmax_loss)


def _anyloss(metric: str) -> Callable[[Setting], MemberLoss]:
    def build(setting: Setting) -> MemberLoss:
        from workbench.losses.anyloss import anyloss, one_vs_rest

        def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
            if setting.classes == 2:
                return anyloss(logits.softmax(-1)[..., 1], y, metric=metric)
            return one_vs_rest(logits, y, metric=metric)

        return loss

    return build


def _dice(name: str) -> Callable[[Setting], MemberLoss]:
    def build(setting: Setting) -> MemberLoss:
        from workbench.losses import dice_loss

        return by_row(getattr(dice_loss, f"softmax_{name}"))

    return build


def _batch_dice(setting: Setting) -> MemberLoss:
    from workbench.losses.dice_loss import batch_dice

    return lambda logits, y, index: batch_dice(logits, y)


def _bags(setting: Setting) -> MemberLoss:
    """Logits (m, b, size * k) of bags and their mean one-hot labels (m, b, k)."""
    from workbench.losses.aggregate_responses import interpolated_loss

    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        probs = logits.unflatten(-1, (-1, setting.classes)).softmax(-1)
        pred = probs.permute(0, 3, 1, 2)  # (m, k, b, size): a regression for each class
        return interpolated_loss(pred, y.transpose(1, 2), RHO).sum(1)

    return loss


def _baseline(name: str) -> Callable[[Setting], MemberLoss]:
    def build(setting: Setting) -> MemberLoss:
        from workbench.losses import baselines

        return by_row(getattr(baselines, name))

    return build


BAG = 4
RHO = 0.1

_FAMILY = {
    "cross_entropy": ("cross-entropy", "comp_sum", _comp_sum(1.0), "comp-sum at tau = 1"),
    "sum_exponential": ("sum-exponential", "comp_sum", _comp_sum(0.0), "comp-sum at tau = 0"),
    "comp_sum_05": ("comp-sum τ = 0.5", "comp_sum", _comp_sum(0.5), "Mao et al. 2023"),
    "comp_sum_15": ("comp-sum τ = 1.5", "comp_sum", _comp_sum(1.5), "Mao et al. 2023"),
    "mae": ("MAE", "comp_sum", _comp_sum(2.0), "comp-sum at tau = 2; Ghosh et al. 2017"),
    "ldr_kl": ("LDR-KL", "ldr_loss", _ldr, "Zhu et al. 2023"),
    "taylor": ("Taylor softmax", "z_loss", _taylor, "Vincent et al. 2015"),
    "dice": ("dice", "dice_loss", _dice("dice"), "Li et al. 2020, with squares"),
    "tversky": ("Tversky", "dice_loss", _dice("tversky"), "Li et al. 2020"),
    "dsc": ("DSC", "dice_loss", _dice("dsc"), "Li et al. 2020, as printed"),
    "focal": ("focal", "", _baseline("focal"), "Lin et al. 2017"),
    "gce": ("GCE", "", _baseline("gce"), "Zhang and Sabuncu 2018"),
    "sce": ("SCE", "", _baseline("sce"), "Wang et al. 2019"),
    "nce_rce": ("NCE + RCE", "", _baseline("nce_rce"), "Ma et al. 2020"),
    "crammer_singer": ("Crammer-Singer", "", _baseline("crammer_singer"), "2001"),
    "weston_watkins": ("Weston-Watkins", "", _baseline("weston_watkins"), "1998"),
}

ZOO: dict[str, Entry] = {
    **{name: Entry(*about) for name, about in _FAMILY.items()},
    "aldr_kl": Entry("ALDR-KL", "ldr_loss", _aldr, "Zhu et al. 2023", memory=True),
    # of two outputs the standardised ones are always 1 and -1: no gradient
    "z_loss": Entry("Z-loss", "z_loss", _z_loss, "de Brébisson and Vincent 2016", least=3),
    "ensloss": Entry("EnsLoss", "ensloss", _ensloss, "Dai 2024", per="set", binary=True),
    "anyloss_accuracy": Entry(
        "AnyLoss accuracy", "anyloss", _anyloss("accuracy"), "Han et al. 2024", "set", True
    ),
    "anyloss_balanced": Entry(
        "AnyLoss balanced", "anyloss", _anyloss("balanced_accuracy"), "Han et al. 2024", "set", True
    ),
    "anyloss_f1": Entry("AnyLoss F1", "anyloss", _anyloss("f1"), "Han et al. 2024", "set", True),
    "batch_dice": Entry("batch dice", "dice_loss", _batch_dice, "code of Li et al. 2020", "set"),
    "bag_means": Entry(
        f"bag means of {BAG}", "aggregate_responses", _bags,
        f"Javanmard et al. 2024, squares, rho = {RHO:g}", "set", bag=BAG,
    ),
}  # fmt: skip


def table(names: Sequence[str] | None = None) -> pd.DataFrame:
    """What the losses are and need, a row each."""
    import pandas as pd

    chosen = {name: ZOO[name] for name in names or ZOO}
    rows = [
        {
            "loss": e.label,
            "paper": e.paper,
            "source": e.source,
            "computed over": "a bag" if e.bag else "a minibatch" if e.per == "set" else "a row",
            "classes": "paper: 2" if e.binary else f"{e.least} or more",
            "memory of each row": e.memory,
        }
        for e in chosen.values()
    ]
    return pd.DataFrame(rows, index=pd.Index(chosen, name="name"))


def entry(given: Given, name: str = "loss") -> Entry:
    """An entry of the zoo by name, or one made of your own loss.

    A function ``loss(logits (n, k), y (n,)) -> scalar`` or an ``nn.Module`` of that form is called
    once for each network, as it is. One with torch's ``reduction=`` (and, for a module, without
    class weights) is called once for all of them. A module's own parameters are not trained.

    Args:
        given: name in `ZOO`, entry, function or module.
        name: what your own is called.

    Raises:
        KeyError: there is no loss of that name. TypeError: it is neither name nor callable.
    """
    if isinstance(given, Entry):
        return given
    if isinstance(given, str):
        if given not in ZOO:
            raise KeyError(f"losses: no loss is named {given!r}; there are {', '.join(ZOO)}")
        return ZOO[given]
    if not callable(given) or inspect.isclass(given):
        raise TypeError(f"losses: expected a name, a function or a module, got {given!r}")
    return Entry(name, "", lambda setting: _own(given), "yours", per="set")


def _own(given: nn.Module | Callable[..., Tensor]) -> MemberLoss:
    if isinstance(given, nn.Module):
        frozen: Any = copy.deepcopy(given).requires_grad_(False)
        if getattr(frozen, "reduction", None) == "mean" and getattr(frozen, "weight", None) is None:
            frozen.reduction = "none"
            return _flattened(frozen)
        return _each(frozen)
    if "reduction" in inspect.signature(given).parameters:
        return by_row(given)
    return _each(given)


def _flattened(fn: Callable[[Tensor, Tensor], Tensor]) -> MemberLoss:
    return by_row(lambda logits, y, reduction: fn(logits, y))


def _each(fn: Callable[[Tensor, Tensor], Tensor]) -> MemberLoss:
    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        values = [fn(h, t) for h, t in zip(logits, y, strict=True)]
        if values[0].ndim:
            raise ValueError(f"loss: expected a scalar, got shape {tuple(values[0].shape)}")
        return torch.stack(values)

    return loss


def entries(losses: Sequence[Given] | Mapping[str, Given]) -> dict[str, Entry]:
    """Entries by name: of the zoo, or your own by the function's name; a mapping names them all.

    Raises:
        ValueError: there is none, or two have one name.
    """
    if isinstance(losses, Mapping):
        named = [(n, replace(entry(given), label=str(n))) for n, given in losses.items()]
    else:
        names = [given if isinstance(given, str) else _called(given) for given in losses]
        named = [(n, entry(given, n)) for n, given in zip(names, losses, strict=True)]
    labels = [e.label for _, e in named]
    if not labels or len(set(labels)) < len(labels) or len(dict(named)) < len(labels):
        raise ValueError(f"losses: expected at least one, of different names, got {labels}")
    return dict(named)


def _called(given: Any) -> str:
    return str(getattr(given, "__name__", type(given).__name__))


def member_loss(given: Given, setting: Setting) -> MemberLoss:
    """The loss of m networks at once, for `lab.members.train`.

    Args:
        given: as of `entry`.
        setting: classes, rows and members.

    Returns:
        ``loss(logits (m, b, k), y (m, b), index (m, b)) -> (m,)``. For an entry with bags, logits
        are (m, b, size * k) and y the mean one-hot labels (m, b, k).
    """
    found = entry(given)
    checks.count(setting.classes, "classes", minimum=found.least)
    return found.build(setting)


def together(parts: Sequence[tuple[MemberLoss, int]]) -> MemberLoss:
    """Losses of neighbouring groups of members as one: ``[(loss, number of members), ...]``."""
    sizes = [size for _, size in parts]

    def loss(logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        cut = [tensor.split(sizes) for tensor in (logits, y, index)]
        each = [fn(*given) for (fn, _), *given in zip(parts, *cut, strict=True)]
        return torch.cat(each)

    return loss


class Bagged(nn.Module):
    """A network of rows applied to each row of a bag: (b, size, d) -> (b, size * k)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The rows' logits, one after the other."""
        out: Tensor = self.net(x.flatten(0, 1)).view(len(x), -1)
        return out


def bags(x: Tensor, y: Tensor, classes: int, size: int) -> tuple[Tensor, Tensor]:
    """Neighbouring rows in bags, with mean one-hot labels; rows that fill no bag are left out.

    Args:
        x: (n, d), in random order. y: (n,). classes: k. size: rows a bag.

    Returns:
        (n // size, size, d) and (n // size, k).
    """
    whole = len(x) // size
    if not whole:
        raise ValueError(f"x: expected at least {size} rows for a bag, got {len(x)}")
    hot = F.one_hot(y[: whole * size], classes).to(x.dtype)
    return x[: whole * size].unflatten(0, (whole, size)), hot.unflatten(0, (whole, size)).mean(1)
