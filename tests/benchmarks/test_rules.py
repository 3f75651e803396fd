"""The table of experiments, and the rules that judge them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import append
from hypothesis import given
from hypothesis import strategies as st

from oscopt import History
from oscopt.rows import RECORDED
from study import experiments, rules
from study.errors import UserError

# ---- the table ---------------------------------------------------------------------------------------------

PAPER = {  # design, section 7: model, data, lr, epochs
    "fig1": ("linear", "mnist", 0.01, 2500),
    "fig2": ("cnn", "cifar10", 0.1, 1500),
    "fig3": ("vgg16", "cifar10", 0.1, 1500),
    "fig4": ("resnet18", "cifar10", 0.1, 500),
    "fig5": ("resnet34", "cifar10", 0.1, 500),
    "fig10": ("cnn", "cifar10", 0.001, 30000),
    "fig11": ("resnet18", "cifar10", 0.001, 500),
    "mnist-vgg16": ("vgg16", "mnist", 0.1, 1500),
    "svhn-resnet34": ("resnet34", "svhn", 0.1, 500),
    "cifar10-resnet34-lr0.01": ("resnet34", "cifar10", 0.01, 500),
    "svhn-resnet18-lr0.001": ("resnet18", "svhn", 0.001, 500),
    "adam-resnet18": ("resnet18", "cifar10", 0.001, 500),
}


@pytest.mark.parametrize("id", PAPER)
def test_the_papers_settings(id):
    row = experiments.TABLE[id]
    assert (row.model, row.paper.dataset, row.paper.lr, row.paper.epochs) == PAPER[id]


def test_every_figure_and_every_run_that_the_text_mentions():
    rows = experiments.TABLE
    assert [f"fig{i}" for i in range(1, 12)] == [id for id in rows if id.startswith("fig")]
    models = ("cnn", "vgg16", "resnet18", "resnet34")
    assert {f"{data}-{model}" for data in ("mnist", "svhn", "adam") for model in models} <= set(rows)
    slow = {("cifar10", 0.01), ("svhn", 0.01), ("svhn", 0.001)}
    assert {f"{data}-{model}-lr{lr}" for data, lr in slow for model in models[2:]} <= set(rows)
    assert rows["fig2"].paper.matrices == (5, 675) and rows["fig3"].paper.matrices == (5, 915)
    assert rows["fig4"].paper.matrices == (60, 490)


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_rows_are_consistent(preset):
    for row in experiments.TABLE.values():
        settings = row.settings(preset)
        assert row.claims and set(row.claims) <= set(rules.RULES), row.id
        assert settings.matrices and all(m + 5 <= settings.epochs for m in settings.matrices), row.id
        if row.beside:  # nothing but the optimizer, and with it the learning rate, differs
            other = experiments.TABLE[row.beside]
            assert replace(settings, lr=other.settings(preset).lr) == other.settings(preset), row.id
            assert row.model == other.model and row.optimizer != other.optimizer
        if preset == "small":
            assert settings.dataset in ("mnist5k", "digits"), row.id


def test_rows_of_one_run():
    names = {id: experiments.run_of(row, "small").id for id, row in experiments.TABLE.items()}
    assert names["fig6"] == names["mnist-cnn"] == "fig2" and names["fig9"] == "fig5"
    assert names["svhn-cnn"] == "svhn-cnn" and names["adam-cnn"] == "adam-cnn"
    paper = experiments.run_of(experiments.TABLE["mnist-cnn"], "paper")
    assert paper.id == "mnist-cnn"  # CIFAR-10 there, MNIST here


def test_unknown_names():
    with pytest.raises(UserError, match="unknown experiment 'fig99'; there are fig1, fig2"):
        experiments.check_experiments(["fig1", "fig99"])
    with pytest.raises(UserError, match="unknown rule 'rises'; there are correlated_throughout"):
        rules.check_claims(["smooth_first", "rises"])


# ---- the rules ---------------------------------------------------------------------------------------------


def record(correlations=None, loss=None, layers=None, sizes=None, beside=None) -> rules.Record:
    """A run with these global correlations; or with those of `layers`, whose gradients have these `sizes`."""
    values = np.asarray(layers if layers is not None else np.array(correlations)[:, None], float)
    weights = np.ones(values.shape[1]) if sizes is None else np.asarray(sizes, float)
    history = History()
    history.add_layers([f"layer{i}" for i in range(values.shape[1])])
    for t, row in enumerate(values):
        target = np.tile(weights, (len(RECORDED), 1))
        target[0] = row * weights if t else np.nan
        append(history, t, target, lr=1.0)
    losses = np.asarray(loss if loss is not None else np.linspace(2, 1, len(values)), float)
    return rules.Record(history, losses, beside=beside)


DOWN_EARLY = [2.0 - 0.05 * t for t in range(30)] + [0.5] * 30
DOWN_LATE = [2.0] * 30 + [2.0 - 0.05 * t for t in range(30)]
SWITCH = [-0.8] * 30 + [0.99] * 30
OTHER = [0.99] * 30 + [-0.8] * 30
TWO = np.ones((60, 2))
GD = record(layers=-0.9 * TWO)
CASES = {
    "correlated_throughout": (record([0.95] * 60), record([0.95] * 30 + [0.1] * 30)),
    "smooth_first": (record(OTHER), record(SWITCH)),
    "oscillates_first": (record(SWITCH), record([0.99] * 40 + SWITCH)),
    "oscillates_later": (record(OTHER), record(SWITCH)),
    "stable_later": (record(SWITCH), record([-0.8] * 30 + [0.6] * 30)),
    "decrease_while_negative": (record(SWITCH, DOWN_EARLY), record(SWITCH, DOWN_LATE)),
    "layers_agree": (record(layers=-0.9 * TWO), record(layers=TWO * [-0.9, 0.5])),
    "dots_of_one_order": (record(layers=TWO, sizes=[3, 1]), record(layers=TWO, sizes=[1, 30])),
    "first_layer_negative": (record(layers=TWO * [-0.9, 0.9]), record(layers=TWO * [-0.3, -0.9])),
    "last_layer_positive": (record(layers=TWO * [-0.9, 0.95]), record(layers=TWO * [0.95, 0.2])),
    "first_layer_dominates": (record(layers=TWO * [-0.9, 0.1]), record(layers=TWO * [0.1, 0.9])),
    "first_layer_follows": (
        record(layers=TWO * [-0.9, 0.9], sizes=[50, 1]),
        record(layers=TWO * [-0.9, 0.9], sizes=[1, 50]),
    ),
    "last_layer_higher": (
        record(layers=TWO * [-0.9, 0.5], sizes=[50, 1]),
        record(layers=TWO * [-0.9, -0.7], sizes=[50, 1]),
    ),
    "suppressed": (record([0.4] * 60), record([0.4] * 40 + [-0.4] * 20)),
    "suppressed_beside_gd": (record(layers=0.5 * TWO, beside=GD), record(layers=-0.5 * TWO, beside=GD)),
}


@pytest.mark.parametrize("claim", rules.RULES)
def test_rules_can_hold_and_fail(claim):
    holds, fails = CASES[claim]
    (yes,), (no,) = rules.judge((claim,), holds), rules.judge((claim,), fails)
    assert yes.held and not no.held, (yes, no)
    assert np.isfinite([yes.measured, no.measured]).all()


def test_too_short_a_run_holds_nothing():
    verdicts = rules.judge(tuple(rules.RULES), record([0.5]))
    assert not any(v.held for v in verdicts) and all(np.isnan(v.measured) for v in verdicts)


def test_nothing_to_compare_with_holds_nothing():
    (verdict,) = rules.judge(("suppressed_beside_gd",), record([0.9] * 60))
    assert not verdict.held and np.isnan(verdict.measured)


# ---- phases ------------------------------------------------------------------------------------------------


def phases(correlations) -> list[int]:
    return rules.phase_signs(record(correlations).windowed).tolist()


@pytest.mark.parametrize("usual, odd", [(0.9, -1.0), (0.05, -1.0), (-0.05, 1.0), (-0.9, 1.0)])
def test_no_single_pair_begins_or_cuts_a_phase(usual, odd):
    """However large it is against its neighbours."""
    values = [usual] * 40
    values[20] = odd
    assert phases(values)[1:] == [int(np.sign(usual))] * 39


def test_phases_need_five_epochs_and_begin_where_the_sign_changes():
    w = np.array([np.nan, 0.3, -0.2, 0.1, -0.1, *[-0.4] * 5, *[0.2] * 4, -0.3, *[0.01] * 5, 0.0, np.nan, 0.4])
    # Until a sign has lasted, there is no phase; 4 epochs of +0.2 make none; 0 and NaN keep the sign.
    assert rules.phase_signs(w).tolist() == [0] * 4 + [-1] * 11 + [1] * 8
    assert rules.phase_signs(np.full(7, np.nan)).tolist() == [0] * 7
    assert rules.phase_signs(np.array([])).tolist() == []


def test_a_spike_in_the_loss_decrease_does_not_decide():
    """The single negative pair at the one large decrease stays within the positive phase."""
    loss = np.r_[np.full(20, 2.0), np.full(20, 0.5)]
    correlations = np.full(40, 0.6)
    correlations[19] = -1.0
    (verdict,) = rules.judge(("decrease_while_negative",), record(correlations, loss))
    assert verdict.measured == 0.0


def test_decrease_share():
    loss = np.array([4.0, 3.0, 3.5, 1.0, 0.0])
    assert rules.decrease_share(loss, np.array([1, -1, -1, 1, 1])) == (-0.5 + 2.5) / 4
    assert np.isnan(rules.decrease_share(loss[::-1], np.ones(5)))


# ---- stretches ---------------------------------------------------------------------------------------------


def cuts(*parts: tuple[float, int]) -> list[tuple[int, int, int]]:
    """The stretches of w that has these values for so many epochs."""
    w = np.concatenate([[np.nan], *(np.full(count, value) for value, count in parts)])
    return [(stretch.sign, stretch.start, stretch.stop) for stretch in rules.stretches(w)]


def test_stretches_end_where_w_turns():
    assert cuts((0.9, 30), (-0.8, 40)) == [(1, 0, 31), (-1, 31, 71)]
    assert cuts((-0.6, 20), (0.97, 30), (-0.7, 10)) == [(-1, 0, 21), (1, 21, 51), (-1, 51, 61)]
    assert cuts((1.0, 200)) == [(1, 0, 201)]


def test_what_adds_up_to_less_than_five_makes_no_stretch():
    onset = (0.9, 82), (-0.5, 5), (0.6, 8), (-0.9, 140)  # an onset, a recovery, and then the oscillation
    assert cuts(*onset) == [(1, 0, 96), (-1, 96, 236)]
    assert cuts((0.3, 8), (-0.1, 15), (-0.7, 40), (0.97, 50)) == [(-1, 0, 64), (1, 64, 114)]
    assert cuts((-0.8, 40), (0.9, 5)) == [(-1, 0, 46)]
    assert cuts((0.9, 5)) == cuts((0.05, 90)) == cuts() == []


SEQUENTIAL = (
    "smooth_first",
    "oscillates_later",
    "oscillates_first",
    "stable_later",
    "decrease_while_negative",
)
LEVEL = st.integers(55, 99).map(lambda percent: percent / 100 + 0.003)  # never a bound itself
STRETCHES = st.lists(st.tuples(LEVEL, st.integers(14, 40)), min_size=1, max_size=5)


@pytest.mark.slow
@given(STRETCHES, st.sampled_from([-1, 1]), st.integers(1, 300), st.integers(0, 99))
def test_more_of_the_last_stretch_changes_no_verdict(parts, sign, more, seed):
    levels = [sign * (-1) ** i * level for i, (level, _) in enumerate(parts)]
    correlations = np.repeat(levels, [count for _, count in parts])
    loss = np.random.default_rng(seed).random(len(correlations))
    short = rules.judge(SEQUENTIAL, record(correlations, loss))
    longer = record(np.pad(correlations, (0, more), "edge"), np.pad(loss, (0, more), "edge"))
    for verdict, later in zip(short, rules.judge(SEQUENTIAL, longer), strict=True):
        assert (verdict.held, later.measured) == (later.held, pytest.approx(verdict.measured, nan_ok=True))


@given(st.lists(st.floats(-1, 1), min_size=20, max_size=120), st.integers(1, 100))
def test_what_comes_later_moves_no_end(values, count):
    early, late = (rules.stretches(np.array(w)) for w in (values[:-count], values))
    assert [(s.sign, s.start) for s in early] == [(s.sign, s.start) for s in late[: len(early)]]


def test_an_oscillation_after_a_smooth_beginning_is_first_only_if_it_ends():
    parts = [0.99] * 12, [-0.8] * 60, [0.99] * 30
    for run, value in ((parts[:2], np.nan), (parts, -0.8)):
        (verdict,) = rules.judge(("oscillates_first",), record(np.concatenate(run)))
        assert verdict.measured == pytest.approx(value, nan_ok=True) and verdict.held == (value < 0)


@pytest.mark.parametrize(
    "claim, correlations, why",
    [
        ("oscillates_first", SWITCH, ""),
        ("oscillates_first", [-0.3] * 40 + [0.99] * 30, "in the paper's direction, but less than the bound"),
        ("oscillates_first", [0.99] * 40 + SWITCH, "the other way round"),
        (
            "oscillates_first",
            OTHER,
            "it oscillates after a smooth beginning, and no end of that is in the run",
        ),
        ("stable_later", [-0.8] * 60, "oscillating to the end of the run"),
        ("oscillates_later", [0.9] * 60, "smooth to the end of the run"),
        ("smooth_first", [0.01] * 60, "too short or too noisy a run for any stretch"),
    ],
)
def test_what_is_not_held_has_a_reason(claim, correlations, why):
    (verdict,) = rules.judge((claim,), record(correlations))
    assert (verdict.held, verdict.why) == (not why, why)


def test_verdicts_of_the_first_epochs():
    """The last fifth of the run decides: 80 % of it say something else."""
    (early,) = rules.judge(("stable_later",), record([-0.8] * 60 + [0.99] * 40))
    (late,) = rules.judge(("stable_later",), record([-0.8] * 85 + [0.99] * 15))
    assert early.held and early.settled and late.held and not late.settled
    beside = record([-0.9] * 60)
    (verdict,) = rules.judge(("suppressed_beside_gd",), record([0.9] * 30 + [-0.9] * 30, beside=beside))
    assert verdict.measured == pytest.approx(28 / 59) and verdict.held and verdict.settled


def test_every_rule_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for claim, rule in rules.RULES.items():
        assert f"| `{claim}` | {rule.says} | {rule.text} |" in text
