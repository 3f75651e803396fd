"""A record in bounded memory: thinned, streamed to a folder, drained, cut back."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from helpers import append, small_net, train

from oscopt import History, OscGD
from oscopt.rows import RECORDED

ARRAYS = ("steps", *RECORDED, "lr", "prev_lr")


def record(history: History, first: int, last: int, layers: int = 2, lr=lambda t: 0.1) -> History:
    """Steps `first` to `last` - 1, whose sums tell their step."""
    history.add_layers([f"layer{i}" for i in range(layers)])
    for t in range(first, last):
        append(history, t, np.arange(9.0)[:, None] + 10 * t + 0.5 * np.arange(layers), lr(t), lr(t - 1))
    return history


def assert_equal(one: History, other: History, index=slice(None)) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name)[index], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [511, 2_000, 5_000, 20_000])
def test_thinned_to_its_limit(steps):
    """At most `limit` steps, the last quarter of it whole, every row what it was."""
    history = record(History(limit=512), 0, steps, lr=lambda t: t // 700)
    assert len(history) == len(history.steps) <= 512 and history.next_step == steps
    assert history.steps[0] == 0 and history.steps[-128:].tolist() == list(range(steps - 128, steps))
    gaps = np.diff(history.steps)
    assert set(gaps) <= {2**i for i in range(9)} and gaps.max() <= max(1, 4 * steps / 512)
    whole = record(History(limit=None), 0, steps, lr=lambda t: t // 700)
    assert_equal(history, whole, history.steps)
    for other in (copy.deepcopy(history), pickle.loads(pickle.dumps(history))):
        assert_equal(other, history)
    again = History.from_state_dict(history.state_dict())
    assert_equal(again, history)
    for t in range(steps, 2 * steps):
        record(again, t, t + 1)
        assert len(again) <= 512
    assert again.next_step == 2 * steps


@pytest.mark.parametrize("limit", [512, 1_000, 2_048])
def test_the_limit_holds_at_every_moment(limit):
    """However often blocks are closed early, which reading, saving and adding layers do."""
    history = History(limit=limit)
    for t in range(3 * limit):
        record(history, t, t + 1)
        assert len(history) <= limit
        if t % 7 == 0 or t < 600:
            history.flush()
        assert history.next_step == t + 1
    assert history.steps[0] == 0 and len(history) > limit / 2


@pytest.mark.slow
def test_memory_is_bounded():
    history = record(History(limit=512), 0, 4_000, layers=50)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    record(history, 4_000, 40_000, layers=50)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 36_000 * 50 * 8  # one number for each step and layer of the seven


def test_limit():
    with pytest.raises(ValueError, match="Invalid limit: 100; use at least 512 steps, or None"):
        History(limit=100)
    assert len(record(History(limit=None), 0, 3_000)) == 3_000


def test_drain_gives_each_step_once():
    history = History()
    seen = []
    for first, last in [(0, 3), (3, 3), (3, 300), (300, 512), (512, 513), (513, 1500)]:
        record(history, first, last)
        new = history.drain()
        assert new.steps.tolist() == list(range(first, last)) and new.layer_names == history.layer_names
        np.testing.assert_array_equal(new.dot[:, 0], 10.0 * new.steps)
        seen += new.steps.tolist()
    assert seen == list(range(1500)) and len(history.drain()) == 0
    history.cut(1490)
    record(history, 1490, 1495)
    assert history.drain().steps.tolist() == list(range(1490, 1495))


def test_drained_often_nothing_is_lost_to_thinning():
    history, seen = History(limit=512), []
    for first in range(0, 20_000, 125):
        record(history, first, first + 125)
        seen += history.drain().steps.tolist()
    assert seen == list(range(20_000)) and len(history) <= 512


@pytest.mark.parametrize("step", [0, 1, 255, 256, 257, 400, 600, 601, 900])
def test_cut(step):
    history = record(History(), 0, 600)
    history.cut(step)
    kept = min(step, 600)
    assert len(history) == kept and history.next_step == kept
    record(history, kept, 700)
    assert_equal(history, record(History(), 0, 700))


def test_streamed_to_a_folder(tmp_path):
    """Every step is on disk, thinned or not; memory stays bounded."""
    history = record(History(limit=512), 0, 100)
    history.stream_to(tmp_path / "steps")
    record(history, 100, 3_000, lr=lambda t: t)
    history.flush()
    assert len(history) <= 512
    loaded = History.load(tmp_path / "steps")
    assert loaded.steps.tolist() == list(range(3_000))
    np.testing.assert_array_equal(loaded.dot[:, 1], 10.0 * loaded.steps + 0.5)
    assert not list((tmp_path / "steps").glob(".*"))


def test_streaming_goes_on_after_a_kill(tmp_path):
    """What was written after the checkpoint that a run goes on from is replaced."""
    first = record(History(), 0, 300)
    first.stream_to(tmp_path)
    checkpoint = first.state_dict()
    for t in range(300, 1_000):  # another future
        append(first, t, -1.0, 0.0)
    second = History.from_state_dict(checkpoint)
    second.stream_to(tmp_path)
    record(second, 300, 1_400)
    second.flush()
    assert_equal(History.load(tmp_path), record(History(limit=None), 0, 1_400))
    with pytest.raises(ValueError, match="holds a record up to step 1399 already"):
        History().stream_to(tmp_path)
    (tmp_path / "steps-00000001.npz").write_text("damaged")
    with pytest.raises(ValueError, match=r"steps-00000001.npz' is no history"):
        History.load(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no files of steps"):
        History.load(tmp_path)


def test_to_numpy_and_xarray():
    history = record(History(), 0, 5)
    arrays = history.to_numpy()
    assert {"steps", "layer_names", "dot", "correlation", "curvature", "lr"} <= set(arrays)
    xarray = pytest.importorskip("xarray")
    dataset = history.to_xarray()
    assert isinstance(dataset, xarray.Dataset) and dict(dataset.sizes) == {"step": 5, "layer": 2}
    assert dataset["dot"].sel(step=3, layer="layer1").item() == 30.5


def test_files_of_other_formats_are_refused(tmp_path):
    history = record(History(), 0, 300)
    arrays = {name: getattr(history, name) for name in ARRAYS}
    np.savez(tmp_path / "old.npz", format=1, layer_names=np.array(history.layer_names), **arrays)
    with pytest.raises(ValueError, match=r"old.npz' is a history of format 1, this oscopt reads 2"):
        History.load(tmp_path / "old.npz")
    del arrays["alignment"]
    np.savez(tmp_path / "part.npz", format=2, layer_names=np.array(history.layer_names), **arrays)
    with pytest.raises(ValueError, match=r"part.npz' is damaged: it lacks 'alignment'"):
        History.load(tmp_path / "part.npz")


@pytest.mark.slow
def test_files_that_are_no_histories(tmp_path):
    """Other files of numpy's, and flipped bits, which zlib, zipfile and numpy tell in many ways."""
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"array.npy' is no history, or .*: it holds a single array"):
        History.load(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="other.npz' is no history: it lacks 'format'"):
        History.load(tmp_path / "other.npz")
    record(History(), 0, 40).save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        (tmp_path / "flipped.npz").write_bytes(
            whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        )
        try:
            History.load(tmp_path / "flipped.npz")
        except ValueError as error:
            assert "flipped.npz' is" in str(error)
            refused += 1
    assert refused > len(whole) / 6  # in dates and the like they do no harm
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "nothing.npz")


def test_loading_a_state_cuts_the_history_back():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    train(net, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 4)
    optimizer.load_state_dict(state)
    train(net, optimizer, 2)
    assert optimizer.history.steps.tolist() == [0, 1, 2, 3, 4]
    assert not np.isnan(optimizer.history.correlation()[1:]).any()


def test_learning_rate_of_the_step_before_survives_a_checkpoint():
    net = small_net()
    optimizer = OscGD(net.named_parameters(), lr=0.01)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.02
    state, history = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.history)
    other = OscGD(net.named_parameters(), lr=0.5, history=history)
    other.load_state_dict(state)
    train(net, other, 1)
    assert other.history.prev_lr[:, 0].tolist()[1:] == [0.01] and other.history.lr[1, 0] == 0.02
