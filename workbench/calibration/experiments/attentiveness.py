"""Attentiveness in a synthetic world: facts, four-option questions, three wordings of each answer.

A small transformer is trained on one of three mixtures: plain text (facts as sentences, and lists
from which one entry is taken, unrelated to any fact), questions with choices about half of the
facts, or both. It is then asked about the *other* half in the paper's three formats, with 0 to 4
demonstrations. Every word of the prompts occurs in the plain text, but no question with choices.

The sizes were chosen on a seed of their own (1000) by what each model does on its *training* task:
finish held-out facts as plain sentences, put mass on the choices of questions it was trained on. A
first world, with longer sentences and all tokens of the questions in the loss, failed this: no
model looked at the choices at all. Thresholds and seeds of the claims were fixed before the first
run; the central claim was judged first on the model trained on plain text, in that first world, and
refuted, and was moved to the model trained on both kinds of text with the second world.
"""

from __future__ import annotations

import itertools
import random
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench import lab
from workbench.calibration import attentiveness as at

MIXTURES = ("plain", "questions", "both")
SHOTS = (0, 1, 2, 4)
SCORED = (
    ("none", "sequence"), ("string", "sequence"), ("enumerated", "label"),
    ("none", "pmi_dc"), ("string", "pmi_dc"),
)  # fmt: skip
PREMISE = "answer"  # what stands before an answer, and says nothing about the question

_ITEM = "{question} ? {choices} answer"
FORMATS = {
    "none": at.PromptFormat("{question}", between=" . "),
    "string": at.PromptFormat(_ITEM, comma=" , ", last=" or ", between=" . "),
    "enumerated": at.PromptFormat(_ITEM, "{label} {text}", comma=" ", last=" ", between=" . "),
}
_THINGS = {
    "wears": """red/scarlet/blood red, blue/azure/sky blue, green/emerald/leaf green,
        black/ebony/coal black, white/ivory/snow white, yellow/golden/corn yellow,
        brown/tan/nut brown, grey/silver/ash grey""",
    "roams": """cave/cavern/rock hollow, lake/pond/still water, forest/wood/tall trees,
        desert/dunes/dry sand, hill/mound/low ridge, island/isle/sea rock,
        river/stream/running water, field/meadow/open grass""",
    "eats": """bread/loaf/baked dough, fruit/pear/sweet apples, nuts/acorns/hard seeds,
        honey/nectar/bee syrup, milk/cream/cow drink, meat/steak/roast beef,
        rice/grain/boiled kernels, soup/broth/hot stew""",
}
THINGS = {
    relation: [tuple(thing.strip().split("/")) for thing in things.split(",")]
    for relation, things in _THINGS.items()
}
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la"), ("lo", "ra", "ti", "zu")
NAMES = ["".join(pair) for pair in itertools.product(*_SYLLABLES)]
WORDS = sorted(
    {*NAMES, *THINGS, *".,?ABCD", "answer", "or"}
    | {word for things in THINGS.values() for forms in things for f in forms for word in f.split()}
)


class WordTokenizer:
    """Words separated by single spaces; the whole world has fewer than 200 of them."""

    index: ClassVar = {word: i for i, word in enumerate(WORDS)}

    def encode(self, text: str) -> list[int]:
        """Ids of the words; KeyError for a word the world does not know."""
        return [self.index[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The words of the ids."""
        return " ".join(WORDS[i] for i in ids)


class World:
    """Who likes what, drawn from a seed. Each thing has a common, a rarer and a rare wording."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        facts = list(itertools.product(NAMES, THINGS))
        self.truth = {fact: rng.randrange(8) for fact in facts}
        self.common = {
            relation: [rng.sample(wordings, 3) for wordings in things]
            for relation, things in THINGS.items()
        }
        rng.shuffle(facts)
        self.facts, half = facts, len(facts) // 2
        self.asked, self.held_out = facts[:half], facts[half:]

    def wording(self, relation: str, thing: int) -> str:
        """One of the thing's three wordings, with shares 0.6, 0.3 and 0.1."""
        u = self.rng.random()
        return self.common[relation][thing][(u >= 0.6) + (u >= 0.9)]

    def item(self, fact: tuple[str, str]) -> at.Item:
        """A question about a fact: the truth and three other things, in any wording and order."""
        name, relation = fact
        truth = self.truth[fact]
        things = [truth, *self.rng.sample([i for i in range(8) if i != truth], 3)]
        self.rng.shuffle(things)
        choices = tuple(self.wording(relation, thing) for thing in things)
        return at.Item(f"{name} {relation}", choices, things.index(truth))

    def sentence(self) -> str:
        """Plain text: mostly facts, and lists from which any one entry is taken."""
        name, relation = fact = self.rng.choice(self.facts)
        kind = self.rng.random()
        if kind < 0.3:
            item = self.item(fact)
            form = FORMATS["string" if kind < 0.2 else "enumerated"]
            taken = self.rng.randrange(4)
            answer = item.choices[taken] if kind < 0.2 else at.LABELS[taken]
            return f"{form.write(item).removeprefix(f'{item.question} ')} {answer} ."
        return f"{name} {relation} {self.wording(relation, self.truth[fact])} ."

    def question(self) -> str:
        """An answered question with choices, about one of the asked facts."""
        item = self.item(self.rng.choice(self.asked))
        letters = self.rng.random() < 0.25
        form = FORMATS["enumerated" if letters else "string"]
        answer = at.LABELS[item.answer] if letters else item.choices[item.answer]
        return f"{form.write(item)} {answer} ."

    def rows(self, mixture: str, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (n, length) and the targets that follow them, negative where none counts.

        Every row begins with a sentence. Of questions only the answers count, as in instruction
        tuning; of plain text every token.
        """
        if mixture == "both":
            halves = [self.rows(half, n // 2, length) for half in ("plain", "questions")]
            return tuple(torch.cat(side) for side in zip(*halves, strict=True))
        write = self.sentence if mixture == "plain" else self.question
        encode, rows = WordTokenizer().encode, []
        for _ in range(n):
            ids: list[int] = []
            while len(ids) <= length:
                ids += encode(write())
            rows.append(ids[: length + 1])
        tokens = torch.tensor(rows)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
        if mixture == "questions":
            answer = inputs == WordTokenizer.index["answer"]
            answer[:, 1:] |= answer[:, :-1].clone()
            targets[~answer] = -100
        return inputs, targets


def train(
    mixture: str, seed: int, *, steps: int, d: int, layers: int, context: int, device: str = "cpu"
) -> tuple[at.ScoringLM, World]:
    """A transformer trained on one mixture of the world with this seed: short rows, then long."""
    world = World(seed)
    model = small_gpt(len(WORDS), d, layers, context, seed=seed)
    for length, share, batch in ((18, 0.8, 24), (context, 0.2, 8)):
        count = max(1, round(share * steps))
        rows = world.rows(mixture, 2 * batch * (1 + count // 4), length)
        lab.train.fit(
            model, token_loss, rows, steps=count, batch_size=batch, lr=4e-3, schedule="cosine",
            warmup=min(10, count), weight_decay=0.01, clip=1.0, seed=seed, device=device,
        )  # fmt: skip
    return at.ScoringLM(model, WordTokenizer(), context=context, batch_size=256), world


def small_gpt(vocab: int, d: int, layers: int, context: int, *, seed: int) -> torch.nn.Module:
    """A GPT that starts where small ones learn quickly.

    A standard deviation of 0.02 is meant for widths near 768; here the weights start at 0.08. The
    value and output matrices of a layer start as each other's inverse, so that attention copies
    what it attends to, as it does in trained models (Trockman and Kolter 2023).
    """
    with lab.seeded(seed), torch.no_grad():
        model = lab.models.GPT(vocab, d, layers, 4, context)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 4
        for block in model.blocks:
            rotation = torch.linalg.qr(torch.randn(d, d)).Q
            block.attention.qkv.weight[2 * d :] = rotation
            block.attention.out.weight.copy_(rotation.T)
    return model


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, averaged over the counted tokens of a row, then over rows."""
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return (losses.sum(1) / (targets >= 0).sum(1).clamp(min=1)).mean()


def measure(
    seed: int,
    mixture: str = "plain",
    steps: int = 500,
    items: int = 72,
    d: int = 64,
    layers: int = 2,
    context: int = 80,
    shots: tuple[int, ...] = SHOTS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train on one mixture and ask every prompt.

    Returns:
        For each format and scorer (``accuracy_string_sequence``, ``pmv_...``, ``immune_...``), an
        array over the shots; ``correlation`` of PMV and accuracy over the plain scorers; and
        ``pmv_trained``, the PMV of questions the model was trained on, after one demonstration.
    """
    lm, world = train(
        mixture, seed, steps=steps, d=d, layers=layers, context=context, device=device
    )
    asked = [world.item(world.held_out[i % len(world.held_out)]) for i in range(items)]
    demos = [world.item(fact) for fact in world.asked[: max(shots)]]
    out: dict[str, Any] = {}
    for form, scorer in SCORED:
        frames = [
            at.evaluate(lm, asked, FORMATS[form], s, scorer, demos=demos, premise=PREMISE)
            for s in shots
        ]
        for name, column in (("accuracy", "correct"), ("pmv", "pmv"), ("immune", "immune")):
            out[f"{name}_{form}_{scorer}"] = np.array([frame[column].mean() for frame in frames])
    known = [world.item(fact) for fact in world.asked[4:]]
    out["pmv_trained"] = at.evaluate(lm, known, FORMATS["string"], 1, demos=demos)["pmv"].mean()
    plain = [f"{form}_{scorer}" for form, scorer in SCORED if scorer != "pmi_dc"]
    out["correlation"] = at.pmv_accuracy_correlation(
        *(np.concatenate([out[f"{name}_{p}"] for p in plain]) for name in ("pmv", "accuracy"))
    )
    return out


def prompts(frame: pd.DataFrame, shots: tuple[int, ...] = SHOTS) -> pd.DataFrame:
    """The frame of ``measure``, one row a mixture, seed, format, scorer and number of shots."""
    return pd.DataFrame(
        [
            {
                "mixture": row["mixture"], "seed": row["seed"], "format": form, "scorer": scorer,
                "shots": s, **{q: float(row[f"{q}_{form}_{scorer}"][i]) for q in QUANTITIES},
            }
            for row in frame.to_dict("records")
            for form, scorer in SCORED
            for i, s in enumerate(shots)
        ]
    )  # fmt: skip


QUANTITIES = ("accuracy", "pmv", "immune")
RISE, GAIN = 0.2, 0.05  # what counts as more mass, and as more accuracy


def claims(table: pd.DataFrame) -> pd.DataFrame:
    """Per seed, the quantities the claims speak of, from the table of ``prompts``.

    The central claim is about the model trained on both kinds of text and one demonstration, chosen
    beforehand: showing the choices raises PMV by at least ``RISE`` while accuracy rises by no more
    than ``GAIN``. ``slack`` is the smaller of the two distances to these thresholds; it is positive
    exactly when both hold.
    """
    cell = table.set_index(["mixture", "format", "scorer", "shots", "seed"]).sort_index()

    def of(quantity: str, mixture: str, form: str, scorer: str, shots: int) -> pd.Series:
        return cell.loc[(mixture, form, scorer, shots), quantity]

    out = pd.DataFrame(
        {
            "pmv_hidden": of("pmv", "both", "none", "sequence", 1),
            "pmv_shown": of("pmv", "both", "string", "sequence", 1),
            "accuracy_hidden": of("accuracy", "both", "none", "sequence", 1),
            "accuracy_shown": of("accuracy", "both", "string", "sequence", 1),
            "sequence_low": of("accuracy", "plain", "none", "sequence", 0),
            "pmi_low": of("accuracy", "plain", "none", "pmi_dc", 0),
            "sequence_high": of("accuracy", "both", "string", "sequence", 1),
            "pmi_high": of("accuracy", "both", "string", "pmi_dc", 1),
        }
    )
    rise = out["pmv_shown"] - out["pmv_hidden"] - RISE
    gain = GAIN - (out["accuracy_shown"] - out["accuracy_hidden"])
    return out.assign(slack=np.minimum(rise, gain)).reset_index()
