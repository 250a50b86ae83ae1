"""The bivariate law of encoder and decoder against closed forms, scipy, torch and enumeration."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from tests.plots import js
from workbench import lab
from workbench.plots import export
from workbench.scaling_laws import figures_nmt_scaling as figures
from workbench.scaling_laws.experiments import nmt_scaling as study
from workbench.scaling_laws.experiments.nmt_languages import make_languages
from workbench.scaling_laws.nmt_scaling import (
    NmtLaw,
    Seq2Seq,
    budget_for,
    decoder_for,
    fit_bivariate,
    fit_soft_l1,
    fit_total,
    loss_at,
    loss_at_budget,
    optimal_split,
    split_penalty,
)

LAW = NmtLaw(alpha=0.7, p_e=0.22, p_d=0.35, L_inf=1.3, Ne_ref=8e7, Nd_ref=1.1e8)
exponents = st.floats(0.05, 1.5)


def sweeps(law=LAW):
    """The paper's three sweeps: encoder only, decoder only, both."""
    depth = np.array([1, 2, 4, 8, 16]) / 4
    e, d = law.Ne_ref * depth, law.Nd_ref * depth
    cells = (
        [(x, law.Nd_ref) for x in e] + [(law.Ne_ref, y) for y in d] + list(zip(e, d, strict=True))
    )
    frame = pd.DataFrame(cells, columns=["Ne", "Nd"]).drop_duplicates(ignore_index=True)
    return frame.assign(loss=loss_at(frame.Ne, frame.Nd, law))


# --- the law


@settings(max_examples=40, deadline=None)
@given(exponents, exponents, st.floats(1e4, 1e9))
def test_the_best_split_is_found_by_brute_force_too(p_e, p_d, budget):
    law = NmtLaw(0.4, p_e, p_d, 0.0, 1e6, 3e6)  # a floor would drown the last digits of the rest
    found = minimize_scalar(
        lambda r: math.log(float(loss_at_budget(budget, law, r)) - law.L_inf),
        bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert found.x == pytest.approx(optimal_split(p_e, p_d), abs=1e-5)
    assert math.exp(found.fun) == pytest.approx(
        float(loss_at_budget(budget, law)) - law.L_inf, rel=1e-7
    )


@settings(max_examples=40, deadline=None)
@given(exponents, exponents, st.floats(0.01, 0.99), st.floats(1e4, 1e9))
def test_the_penalty_of_a_split_is_the_same_at_every_budget(p_e, p_d, share, budget):
    law = NmtLaw(0.4, p_e, p_d, 1.0, 1e6, 3e6)
    ratio = (loss_at_budget(budget, law, share) - 1) / (loss_at_budget(budget, law) - 1)
    penalty = float(split_penalty(share, p_e, p_d))
    assert penalty == pytest.approx(float(ratio), rel=1e-6)
    assert penalty >= 1 - 1e-12
    assert float(split_penalty(optimal_split(p_e, p_d), p_e, p_d)) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(exponents, exponents, st.floats(0.01, 0.99))
def test_swapping_encoder_and_decoder_swaps_their_exponents(p_e, p_d, share):
    law, other = NmtLaw(0.4, p_e, p_d, 1.0, 2e6, 3e6), NmtLaw(0.4, p_d, p_e, 1.0, 3e6, 2e6)
    assert loss_at(5e5, 7e6, law) == pytest.approx(loss_at(7e6, 5e5, other))
    assert optimal_split(p_e, p_d) == pytest.approx(1 - optimal_split(p_d, p_e))
    assert split_penalty(share, p_e, p_d) == pytest.approx(split_penalty(1 - share, p_d, p_e))


def test_along_the_best_split_the_law_is_one_power_of_the_budget():
    budget = np.geomspace(1e7, 1e10, 7)
    p, r = LAW.p_e + LAW.p_d, LAW.p_e / (LAW.p_e + LAW.p_d)
    star = LAW.alpha * (LAW.Ne_ref / r) ** LAW.p_e * (LAW.Nd_ref / (1 - r)) ** LAW.p_d
    np.testing.assert_allclose(loss_at_budget(budget, LAW), star * budget**-p + LAW.L_inf)


def test_contours_and_budgets_undo_the_law():
    Ne = np.geomspace(1e7, 1e9, 5)
    Nd = decoder_for(1.9, Ne, LAW)
    np.testing.assert_allclose(loss_at(Ne, Nd, LAW), 1.9)
    np.testing.assert_allclose(np.diff(np.log(Nd)) / np.diff(np.log(Ne)), -LAW.p_e / LAW.p_d)
    for share in (None, 0.8):
        assert float(loss_at_budget(budget_for(1.9, LAW, share), LAW, share)) == pytest.approx(1.9)


# --- estimation


@pytest.mark.parametrize("reference", [(8e7, 1.1e8), None])
def test_exact_losses_return_the_constants(reference):
    fit = fit_bivariate(sweeps(), reference=reference, starts=15)
    for name in ("p_e", "p_d", "L_inf"):
        assert getattr(fit.law, name) == pytest.approx(getattr(LAW, name), rel=1e-6), name
    at = fit.law.Ne_ref, fit.law.Nd_ref
    assert fit.law.alpha == pytest.approx(float(loss_at(*at, LAW)) - LAW.L_inf, rel=1e-6)
    assert fit.r2 == pytest.approx(1)


def test_the_papers_listing_and_the_batch_of_starts_agree():
    frame = sweeps()
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(frame))
    frame = frame.assign(loss=frame.loss + noise)
    ours, theirs = fit_bivariate(frame).law, fit_soft_l1(frame, scale=1.0)
    for name in ("alpha", "p_e", "p_d", "L_inf"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name
    frame.loc[0, "loss"] += 0.3  # one broken run moves squares, hardly the soft L1
    robust = fit_soft_l1(frame, scale=1e-3)
    assert abs(robust.p_d - LAW.p_d) < 0.1 * abs(fit_bivariate(frame).law.p_d - LAW.p_d)


def test_the_total_sees_one_number_of_parameters():
    frame = sweeps(NmtLaw(0.7, 0.3, 0.3, 1.0, 1e6, 1e6)).rename(columns={"Ne": "enc"})
    fit = fit_total(frame, columns={"Ne": "enc"}, starts=15)
    assert fit.predict(x=2e6) == pytest.approx(fit.predict(x=np.array([2e6]))[0])
    swapped = fit_total(frame.rename(columns={"enc": "Nd", "Nd": "Ne"}), starts=15)
    assert swapped.params["alpha"] == pytest.approx(fit.params["alpha"], rel=1e-5)
    diagonal = frame[frame.enc == frame.Nd].rename(columns={"enc": "Ne"})
    assert fit_total(diagonal, starts=15).params["alpha"] == pytest.approx(0.6, rel=1e-5)


def test_intervals_come_with_a_bootstrap():
    draws = fit_bivariate(sweeps(), bootstrap=5, starts=4).draws
    assert list(draws) == ["alpha", "L_inf", "p_e", "p_d"] and len(draws) == 5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NmtLaw(0.1, -0.2, 0.3, 1.0), "p_e"),
        (lambda: loss_at(0, 1, LAW), "Ne"),
        (lambda: loss_at(1, [1, -1], LAW), "Nd"),
        (lambda: decoder_for(1.3, 1e6, LAW), "irreducible"),
        (lambda: budget_for(1.2, LAW), "irreducible"),
        (lambda: optimal_split(0.2, 0), "p_d"),
        (lambda: split_penalty(1.0, 0.2, 0.3), "share"),
        (lambda: loss_at_budget(1e6, LAW, 0.0), "share"),
        (lambda: loss_at_budget(-1, LAW), "budget"),
        (lambda: fit_bivariate(sweeps().drop(columns="Nd")), "Nd"),
        (lambda: fit_bivariate(sweeps().assign(Ne=1e6)), "Ne"),
        (lambda: fit_bivariate(sweeps(), reference=(0, 1)), "reference"),
        (lambda: fit_soft_l1(sweeps(), scale=0), "scale"),
        (lambda: Seq2Seq(1, (4, 4), 3, d=(6, 7)), "heads"),
        (lambda: Seq2Seq(1, (4, 4), 3, layers=(0, 1)), "layers"),
        (lambda: Seq2Seq(1, (4, 4), 2)(*2 * [torch.zeros(1, 1, 3, dtype=torch.long)]), "at most 2"),
        (lambda: make_languages(0, slip=1.5), "slip"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the translation models


def model(models=2, layers=(2, 1), d=(8, 12), seed=0):
    with lab.seeded(seed):
        net = Seq2Seq(models, (5, 7), 4, layers=layers, d=d).double()
    g = torch.Generator().manual_seed(seed)
    words = (torch.randint(v, (models, 3, 4), generator=g) for v in (5, 7))
    return net, *words


def test_each_model_is_the_transformer_of_torch():
    net, x, y = model(layers=(2, 2), d=(8, 8))
    logits = net(x, y)
    for i in range(2):
        options = {"norm_first": True, "activation": "gelu", "batch_first": True, "dropout": 0.0}
        sides = nn.ModuleList()
        for stack, kind in (
            (net.encoder, nn.TransformerEncoderLayer), (net.decoder, nn.TransformerDecoderLayer)
        ):  # fmt: skip
            peers = nn.ModuleList()
            for layer in stack:
                peer = kind(8, 2, 16, **options).double()
                weights = {
                    "self_attn.in_proj_weight": layer.qkv[i].T,
                    "self_attn.out_proj.weight": layer.out[i].T,
                    "linear1.weight": layer.up[i].T, "linear1.bias": layer.bias[i, 0],
                    "linear2.weight": layer.down[i].T,
                }  # fmt: skip
                if layer.memory:
                    weights["multihead_attn.in_proj_weight"] = torch.cat(
                        [layer.q[i], layer.kv[i]], 1
                    ).T
                    weights["multihead_attn.out_proj.weight"] = layer.read[i].T
                state = {
                    q: weights.get(q, torch.ones_like(w) if "norm" in q and "weight" in q
                                   else torch.zeros_like(w))
                    for q, w in peer.state_dict().items()
                }  # fmt: skip
                peer.load_state_dict(state)
                peers.append(peer)
            sides.append(peers)
        memory = net.source_words[i][x[i]] + net.source_places[i]
        for peer in sides[0]:
            memory = peer(memory)
        memory = nn.functional.layer_norm(memory, (8,))
        before = torch.cat([torch.full((3, 1), 7), y[i, :, :-1]], 1)
        out = net.target_words[i][before] + net.target_places[i]
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        for peer in sides[1]:
            out = peer(out, memory, tgt_mask=mask, tgt_is_causal=True)
        expected = nn.functional.layer_norm(out, (8,)) @ net.head[i]
        torch.testing.assert_close(logits[i], expected)


def test_no_word_sees_itself_or_what_follows():
    net, x, y = model()
    changed = y.clone()
    changed[..., 2] = (y[..., 2] + 1) % 7
    before, after = net(x, y), net(x, changed)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3], after[:, :, 3])


def test_models_side_by_side_share_nothing():
    net, x, y = model()
    gradient = torch.autograd.grad(net.losses(x, y)[0].sum(), list(net.parameters()))
    assert all(float(g[1].abs().max()) == 0 for g in gradient)
    assert any(float(g[0].abs().max()) > 0 for g in gradient)


@pytest.mark.parametrize("layers, d", [((1, 1), (8, 12)), ((3, 2), (4, 6))])
def test_sizes_are_those_of_the_layers(layers, d):
    net, *_ = model(layers=layers, d=d)
    encoder, decoder = (w * w * 8 + 2 * w for w in d)  # 4 of attention, 2 x 2 of the MLP
    decoder += 2 * d[1] * d[1] + 2 * d[0] * d[1]  # queries and output; keys and values
    assert net.sizes == (layers[0] * encoder, layers[1] * decoder)


# --- the languages


def every_sentence(v, length):
    return torch.tensor(list(itertools.product(range(v), repeat=length)))


def by_hand(pair, x, y):
    """p(x) T(y | x) and q(y) T'(x | y), one word after the other; sentences are reversed."""

    def side(chain, table, words, out):
        p, before = 1.0, pair.v
        for w, o in zip(words, out, strict=True):
            p *= float(chain[before, w]) * float(table[before, w, o])
            before = w
        return p

    x, y = x.tolist(), y.tolist()
    return side(pair.source, pair.forth, x, y[::-1]), side(pair.target, pair.back, y, x[::-1])


@pytest.mark.parametrize("natural", [0.0, 0.3, 1.0])
def test_translation_probabilities_are_those_of_enumeration(natural):
    pair = make_languages(3, meanings=2, words=2)
    targets = every_sentence(4, 3)
    for x in torch.tensor([[0, 1, 3], [2, 2, 0]]):
        joint = np.array([by_hand(pair, x, y) for y in targets]) @ [1 - natural, natural]
        found = pair.log_probs(x.expand(len(targets), -1), targets, natural).exp()
        np.testing.assert_allclose(found, joint / joint.sum(), atol=1e-12)


def test_sentences_follow_their_probabilities():
    pair, rng = make_languages(5, meanings=1, words=2), np.random.default_rng(0)
    for draw, side in ((pair.source_original, 0), (pair.target_original, 1)):
        x, y = draw(40_000, 2, rng)
        seen = torch.zeros(4, 4)
        seen.index_put_(
            (2 * x[:, 0] + x[:, 1], 2 * y[:, 0] + y[:, 1]), torch.tensor(1 / 40_000), True
        )
        words = every_sentence(2, 2)
        expected = [[by_hand(pair, a, b)[side] for b in words] for a in words]
        np.testing.assert_allclose(seen, expected, atol=0.012)


def test_a_translator_keeps_the_meaning():
    pair = make_languages(0)
    x, y = pair.source_original(50, 6, np.random.default_rng(0))
    assert (x // 4 == y.flip(1) // 4).all()


# --- explorer and experiments


@pytest.mark.parametrize("measured", [True, False])
def test_the_exported_formula_is_the_law(measured):
    explorer = figures.explore_split(LAW, sweeps()) if measured else figures.explore_split()
    assert js.check_formula(explorer, rtol=1e-6) > 100
    explorer.result()
    assert explorer.seconds < 0.05
    assert len(json.dumps(export.payload(explorer, explorer.state))) < 40_000


def test_contours_of_the_explorer_lie_on_their_loss():
    box = np.array([1e7, 1e9, 1e7, 1e9])
    Ne, Nd = figures.contour(0.5, LAW, box)
    np.testing.assert_allclose(loss_at(Ne, Nd, LAW), 0.5 + LAW.L_inf)
    Ne, Nd = figures.contour(1e-6, LAW, box)  # out of reach: both ends on the far corner
    np.testing.assert_allclose([*Ne, *Nd], 1e9)


def test_cells_to_predict_are_none_of_those_to_fit():
    found = study.cells((6, 8, 12, 16, 24), 12)
    assert len(set(found["fit"])) == 9 and len(set(found["predict"])) == 6
    assert not set(found["fit"]) & set(found["predict"])


@pytest.fixture(scope="module")
def runs():
    found = study.cells((4, 6, 8), 6)
    rows = [
        {"widths": cell, "seed": 3, **study.train_cell(3, cell, members=2, steps=8, test=40)}
        for cell in found["fit"] + found["predict"]
    ]
    return pd.DataFrame(rows), found["fit"]


def test_training_lowers_the_loss_but_not_below_the_floor():
    start = study.train_cell(3, (8, 8), members=2, steps=1, test=40)
    end = study.train_cell(3, (8, 8), members=2, steps=30, test=40)
    assert (end["loss_all"] < start["loss_all"] - 0.1).all()
    assert (end["loss_all"] > end["floor_all"]).all()
    np.testing.assert_array_equal(start["floor_all"], end["floor_all"])
    again = study.train_cell(3, (8, 8), members=2, steps=1, test=40)
    assert again["loss_source"].tolist() == start["loss_source"].tolist()


def test_the_fits_see_the_sweeps_only(runs, monkeypatch):
    table, fit_on = runs
    seen = []

    def watched(fit):
        def call(table, *args, **options):
            seen.append(table)
            return fit(table, *args, **options)

        return call

    for name in ("fit_bivariate", "fit_total", "fit_law", "fit_soft_l1"):
        monkeypatch.setattr(study, name, watched(getattr(study, name)))
    frame = study.predict_joint(table, fit_on, starts=3)
    sizes = set(zip(table.Ne[: len(fit_on)], table.Nd[: len(fit_on)], strict=True))
    assert len(seen) == 12
    for rows in seen[:1]:
        assert set(zip(rows.Ne, rows.Nd, strict=True)) == sizes
    assert all(len(rows) == len(fit_on) for rows in seen)
    row = frame.iloc[1]
    error = row.predicted_bivariate - row.loss
    assert frame.seed.tolist() == [3, 4]
    assert row.rmse_bivariate == pytest.approx(math.sqrt((error**2).mean()))
    assert row.floor_all == pytest.approx((row.floor_source + row.floor_target) / 2)


def test_the_side_check_predicts_the_largest_language_model():
    row = study.predict_largest(0, starts=3)
    assert row["rmse_product"] > 0 and row["p_D"] > 0
