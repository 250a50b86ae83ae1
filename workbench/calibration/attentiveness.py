r"""Attentiveness to answer choices: the probability mass a model puts on the valid answers.

A language model M answers a multiple-choice question by comparing the strings in the set of
choices L. Whatever mass it puts elsewhere may belong to other wordings of the same answers
("surface-form competition"). That mass is unknowable, but bounded:

.. math::
    P_M(\ell \mid x) = \prod_t P_M(\ell_t \mid x, \ell_{<t}), \qquad
    PMV(x) = \sum_{\ell \in L} P_M(\ell \mid x), \qquad SFC(x) \le 1 - PMV(x).

A prediction cannot be changed by any unseen wording when
:math:`1 - PMV(x) < P_{(1)} - P_{(2)}`, the lead of the first choice over the second.

Reference: Wiegreffe, Finlayson, Tafjord, Clark and Sabharwal (2023), "Increasing Probability Mass
on Answer Choices Does Not Always Improve Accuracy" (arXiv 2305.14596), section 3 for PMV and the
bound, section 4 for prompts and scorers. PMI-DC: Holtzman et al. (2021).

Not included: greedy decoding of a free answer and its string matching (a measure of the decoder,
not of the mass); scores divided by length, which the paper does not use; encoder-decoder models.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.lab import checks

if TYPE_CHECKING:
    import pandas as pd

LABELS = string.ascii_uppercase


@dataclass(frozen=True)
class ScoringLM:
    """A causal language model together with its tokenizer, ready to score continuations.

    Attributes:
        model: maps token ids (b, t) to logits (b, t, V), or to an object that holds them as
            ``.logits`` (the convention of the transformers library). A torch module is scored in
            evaluation mode and put back into the mode it was in.
        tokenizer: has ``encode(text)`` returning token ids, or an object that holds them as
            ``.ids``. It may put a start token first; it must not append an end token.
        space: written between prompt and choice unless the prompt already ends in white space.
            Most vocabularies know " red" and "red" as different tokens, and only the first one
            follows a word: scoring without the space asks for a string no text contains.
        end: appended to every choice, for instance "\n". Without it P("red") is the probability
            that the answer *starts* with "red" and contains that of "red wine".
        context: longest input in tokens; longer prompts lose their beginning. None: no limit.
        batch_size: rows in one forward pass.
    """

    model: Callable[[Tensor], Any]
    tokenizer: Any
    space: str = " "
    end: str = ""
    context: int | None = None
    batch_size: int = 64

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids = self.tokenizer.encode(text)
        return [int(i) for i in getattr(ids, "ids", ids)]

    def split(self, prompt: str, option: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the choice that continues it.

        Prompt and choice are encoded together, as the text would be. Where a token straddles the
        border, they are encoded apart, so that the prompt stays the same for all choices.
        """
        text = ("" if prompt[-1:].isspace() else self.space) + option + self.end
        head, both = self.encode(prompt), self.encode(prompt + text)
        tail = both[len(head) :] if both[: len(head)] == head else self.encode(text)
        if not head:
            raise ValueError(
                "prompt: encodes to no token; expected at least one (a content-free one is enough)"
            )
        if not option or not tail:
            raise ValueError(f"options: {option!r} encodes to no token")
        return head, tail

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        if isinstance(self.model, torch.nn.Module):
            parameter = next(self.model.parameters(), None)
            if parameter is not None:
                return parameter.device
        return torch.device("cpu")


def option_logprobs(lm: ScoringLM, prompt: str, options: Sequence[str]) -> Float[Tensor, " m"]:
    """Log-probability of every choice as a continuation of one prompt, by teacher forcing.

    Args:
        lm: model and tokenizer.
        prompt: the text before the answer; not empty.
        options: the m choices.

    Returns:
        (m,) natural logarithms, summed over the tokens of each choice.

    Raises:
        ValueError: no choice, an empty one, or one longer than the context.
    """
    return score_items(lm, [prompt], [options])[0]


def score_items(
    lm: ScoringLM, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> Float[Tensor, "n m"]:
    """Log-probabilities of m choices for each of n prompts.

    All pairs are scored together. Different choices often share their input (all one-token
    choices of a prompt do): equal inputs are computed once. Rows are sorted by length, padded on
    the right, where a causal model cannot look, and the vocabulary is normalised only at the
    positions that predict a token of a choice.

    Args:
        lm: model and tokenizer.
        prompts: n texts.
        options: n lists of m choices each.

    Returns:
        (n, m) natural logarithms in float64, on the CPU.
    """
    checks.same_length(prompts=prompts, options=options)
    if not prompts:
        raise ValueError("prompts: is empty; expected at least one")
    m = len(options[0])
    if m == 0 or any(len(choices) != m for choices in options):
        raise ValueError("options: expected the same number (at least one) for every prompt")

    rows: dict[tuple[int, ...], int] = {}
    wanted: list[tuple[int, int, int, int]] = []  # row, position, token, flat index of the pair
    for i, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
        for j, option in enumerate(choices):
            head, tail = lm.split(prompt, option)
            ids = head + tail[:-1]
            if lm.context is not None:
                if len(tail) > lm.context:
                    raise ValueError(f"options: {option!r} is longer than the context")
                ids = ids[-lm.context :]
            row = rows.setdefault(tuple(ids), len(rows))
            first = len(ids) - len(tail)
            wanted += [(row, first + t, token, i * m + j) for t, token in enumerate(tail)]
    return _gather(lm, list(rows), torch.tensor(wanted), len(prompts) * m).view(-1, m)


def _gather(lm: ScoringLM, rows: list[tuple[int, ...]], wanted: Tensor, n: int) -> Tensor:
    """Sum, for each of n pairs, the log-probabilities of the wanted (row, position, token)."""
    order = sorted(range(len(rows)), key=lambda r: len(rows[r]))
    place = torch.empty(len(rows), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(rows))
    wanted = torch.cat([place[wanted[:, :1]], wanted[:, 1:]], 1)
    wanted = wanted[wanted[:, 0].argsort()]
    total = torch.zeros(n, dtype=torch.float64)
    model, device = lm.model, lm.device
    training = isinstance(model, torch.nn.Module) and model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), lm.batch_size):
                chunk = [torch.tensor(rows[r]) for r in order[start : start + lm.batch_size]]
                ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True).to(device)
                low, high = torch.searchsorted(
                    wanted[:, 0].contiguous(), torch.tensor([start, start + len(chunk)])
                ).tolist()
                row, position, token, pair = wanted[low:high].to(device).unbind(1)
                out = model(ids)
                logits = getattr(out, "logits", out)[row - start, position]
                if logits.dtype in (torch.float16, torch.bfloat16):
                    logits = logits.float()
                logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
                total.index_add_(0, pair.cpu(), logp.double().cpu())
    finally:
        if training:
            model.train()
    if total.isnan().any():
        raise ValueError("lm: the model returned NaN for at least one choice")
    return total


def counted_once(lm: ScoringLM, prompt: str, options: Sequence[str]) -> Bool[Tensor, " m"]:
    """Which choices to count when their probabilities are added up.

    The probability of a token string is that of *starting* with it. A choice that begins with
    another choice, or repeats one, is already contained in it; counting it again could push the
    sum above one.

    Returns:
        (m,) False where a choice extends another one or repeats an earlier one.
    """
    tails = [tuple(lm.split(prompt, option)[1]) for option in options]
    return torch.tensor(
        [
            not any(
                tail[: len(other)] == other and (len(other) < len(tail) or k < j)
                for k, other in enumerate(tails)
                if k != j
            )
            for j, tail in enumerate(tails)
        ]
    )


def pmv(logp: Any, counted: Any = None) -> Float[Tensor, " *n"]:
    r"""Attentiveness: probability mass on the valid choices, :math:`\sum_\ell P(\ell \mid x)`.

    Args:
        logp: (..., m) log-probabilities of the choices, at most 0; minus infinity is allowed.
        counted: (..., m) booleans, False for choices contained in others (``counted_once``).

    Returns:
        (...) mass in [0, 1].
    """
    p = _probabilities(logp)
    if counted is not None:
        p = p * torch.as_tensor(counted, device=p.device)
    return p.sum(-1).clamp(max=1)


def sfc_bound(logp: Any, counted: Any = None) -> Float[Tensor, " *n"]:
    """Largest mass that other wordings of the choices can hold: 1 - PMV."""
    return 1 - pmv(logp, counted)


def sfc_immune(logp: Any, counted: Any = None) -> Bool[Tensor, " *n"]:
    """Whether no attribution of the unseen mass can change the prediction.

    True where the unseen mass is smaller than the lead of the first choice over the second. The
    condition is also necessary: otherwise all unseen mass, given to the second choice, closes the
    gap.

    Args:
        logp: (..., m) log-probabilities, m >= 2.
        counted: see ``pmv``.
    """
    p = _probabilities(logp)
    if p.shape[-1] < 2:
        raise ValueError("logp: expected at least two choices")
    top = p.topk(2, dim=-1).values
    return sfc_bound(logp, counted) < top[..., 0] - top[..., 1]


def pmi_dc(logp: Any, logp0: Any) -> Float[Tensor, "*n m"]:
    r"""Domain-conditional pointwise mutual information, :math:`\log P(\ell|x) - \log P(\ell|x_0)`.

    Args:
        logp: (..., m) log-probabilities after the question.
        logp0: (..., m) log-probabilities after a content-free premise; finite.

    Returns:
        (..., m) scores; the prediction is their argmax.
    """
    x, x0 = _log(logp, "logp"), _log(logp0, "logp0")
    if x.shape[-1] != x0.shape[-1]:
        raise ValueError(f"logp0: has {x0.shape[-1]} choices, but logp has {x.shape[-1]}")
    if not x0.isfinite().all():
        raise ValueError("logp0: holds minus infinity; expected every choice to be possible")
    return x - x0


def _log(values: Any, name: str = "logp") -> Tensor:
    values = torch.as_tensor(values)
    values = values if values.is_floating_point() else values.float()
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name}: is empty; expected (..., m) log-probabilities")
    if values.isnan().any() or (values > 1e-3).any():
        raise ValueError(f"{name}: holds NaN or a positive value; expected log-probabilities <= 0")
    return values


def _probabilities(values: Any) -> Tensor:
    return _log(values).clamp(max=0).exp()


@dataclass(frozen=True)
class Item:
    """A question with its choices; ``answer`` is the index of the correct one."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(LABELS):
            raise ValueError(f"choices: expected 2 to {len(LABELS)}, got {len(self.choices)}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer: expected an index below {len(self.choices)}")


@dataclass(frozen=True)
class PromptFormat:
    """How a question is put to the model.

    Attributes:
        question: template with ``{question}`` and, where the choices are shown, ``{choices}``.
        choice: how one choice is written; may use ``{label}`` and ``{text}``.
        comma, last: between choices, and before the last one.
        between: after a demonstration's answer.
        instruction: first line of the prompt (the paper has one sentence per data set).
    """

    question: str
    choice: str = "{text}"
    comma: str = ", "
    last: str = ", or "
    between: str = "\n\n"
    instruction: str = ""

    def write(self, item: Item) -> str:
        """One question, up to where the answer begins."""
        shown = [
            self.choice.format(label=label, text=text)
            for label, text in zip(LABELS, item.choices, strict=False)
        ]
        choices = self.comma.join(shown[:-1]) + self.last + shown[-1]
        return self.question.format(question=item.question, choices=choices)

    def prompt(self, item: Item, demos: Sequence[Item] = (), *, label: bool = False) -> str:
        """Instruction, answered demonstrations, then the question.

        Args:
            item: the question to be answered.
            demos: demonstrations, in order.
            label: demonstrations answer with the letter instead of the text.
        """
        parts = [self.instruction]
        for demo in demos:
            answer = LABELS[demo.answer] if label else demo.choices[demo.answer]
            parts.append(f"{self.write(demo)} {answer}{self.between}")
        return "".join([*parts, self.write(item)])


FORMATS = {
    "none": PromptFormat("{question}", between="\n"),
    "string": PromptFormat(
        "question: {question}\nanswer choices: {choices}\nThe correct answer is:"
    ),
    "enumerated": PromptFormat(
        "Question: {question}\nChoices:\n{choices}Answer:",
        choice=" {label}: {text}\n", comma="", last="",
    ),
}  # fmt: skip
SCORERS = ("sequence", "pmi_dc", "label")


def evaluate(
    lm: ScoringLM,
    items: Sequence[Item],
    fmt: str | PromptFormat = "string",
    shots: int = 0,
    scorer: str = "sequence",
    *,
    demos: Sequence[Item] = (),
    premise: str = "?",
) -> pd.DataFrame:
    """Ask all questions in one format and say, for each, what the model answered and how surely.

    Args:
        lm: model and tokenizer.
        items: the questions; all with the same number of choices.
        fmt: ``none`` (choices not shown), ``string`` (in a sentence), ``enumerated`` (A, B, ...),
            or a format of your own.
        shots: the first ``shots`` demonstrations are used, the same for every question.
        scorer: ``sequence`` (probability of the choice), ``pmi_dc`` (divided by its probability
            after the premise) or ``label`` (probability of the letter; needs a format with
            letters).
        demos: answered questions to demonstrate with; none of them should be asked.
        premise: the content-free text of PMI-DC. The released code uses "?".

    Returns:
        One row a question: prediction, answer, correct, pmv, immune, first, second (the two
        largest probabilities), shots and scorer. ``pmv`` and ``immune`` speak of the plain
        probabilities under every scorer.

    Raises:
        ValueError: no question, too few demonstrations, or a scorer that does not fit the format.
    """
    import pandas as pd

    form = FORMATS[checks.one_of(fmt, FORMATS, "fmt")] if isinstance(fmt, str) else fmt
    checks.one_of(scorer, SCORERS, "scorer")
    shots = checks.count(shots, "shots", minimum=0)
    if shots > len(demos):
        raise ValueError(f"demos: expected at least {shots} for as many shots, got {len(demos)}")
    if not items:
        raise ValueError("items: is empty; expected at least one question")
    letters = scorer == "label"
    if letters and "{label}" not in form.choice:
        raise ValueError("scorer: 'label' needs a format that shows letters, such as 'enumerated'")

    prompts = [form.prompt(item, demos[:shots], label=letters) for item in items]
    options = [LABELS[: len(item.choices)] if letters else item.choices for item in items]
    logp = score_items(lm, prompts, options)
    counted = torch.stack([counted_once(lm, p, o) for p, o in zip(prompts, options, strict=True)])
    scores = logp
    if scorer == "pmi_dc":
        scores = pmi_dc(logp, score_items(lm, [premise] * len(items), options))
    answer = torch.tensor([item.answer for item in items])
    prediction = scores.argmax(1)
    first, second = logp.exp().topk(2, dim=1).values.T
    return pd.DataFrame(
        {
            "item": range(len(items)), "shots": shots, "scorer": scorer,
            "prediction": prediction, "answer": answer, "correct": prediction == answer,
            "pmv": pmv(logp, counted), "immune": sfc_immune(logp, counted),
            "first": first, "second": second,
        }
    )  # fmt: skip


def pmv_accuracy_correlation(pmv: Any, accuracy: Any) -> float:
    """Pearson correlation of mean PMV and accuracy over prompts; NaN when one never changes.

    Args:
        pmv: (q,) mean PMV of each prompt, q >= 3.
        accuracy: (q,) accuracy of each prompt.
    """
    import numpy as np

    x = checks.to_numpy(checks.as_unit(pmv, "pmv")).astype(float)
    y = checks.to_numpy(checks.as_unit(accuracy, "accuracy")).astype(float)
    if checks.same_length(pmv=x, accuracy=y) < 3:
        raise ValueError("pmv: expected at least three prompts")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
