"""benchmarks/compare.py as users run it."""

from __future__ import annotations

import csv
import math

import compare
import pytest
import torch

from race import contenders, language, limits, longer, plot, table, tasks
from race.results import COLUMNS, LONGER, Results
from race.train import train
from study import data
from study.errors import UserError

pytestmark = pytest.mark.slow

SMALL = tasks.Task("small", 30, 1.0, tasks._quadratic(20.0))
NET = tasks.Task("net", 3, 0.5, tasks.pictures("linear", "mnist5k", 40, 8, 1, None), dataset="mnist5k")
AWAY = tasks.Task(
    "away", 3, 0.5, tasks.pictures("linear", "fashion-mnist", 40, 8, 1, None), False, "fashion-mnist"
)


@pytest.fixture
def small_tasks(monkeypatch):
    def some(batches=False, data_root=None):
        return {task.name: task for task in ((NET,) if batches else (SMALL, NET, AWAY))}

    monkeypatch.setattr(tasks, "tasks", some)


def rows_in(folder):
    with open(folder / "compare.csv") as file:
        return list(csv.DictReader(file))


def test_a_small_run_goes_on_where_it_ended(small_tasks, tmp_path, capsys, monkeypatch):
    arguments = ["--only", "small", "--seeds", "0,1", "--out", str(tmp_path)]
    assert compare.main(arguments) == 0
    rows = rows_in(tmp_path)
    names = [c.name for c in contenders.contenders()[0]]
    assert list(rows[0]) == list(COLUMNS) and {r["contender"] for r in rows} == set(names)
    gd = {float(r["rate"]): float(r["final"]) for r in rows if (r["contender"], r["seed"]) == ("gd", "0")}
    best = min(gd, key=gd.get)
    assert {best / 2, best, best * 2} <= set(gd)  # it lies inside the grid
    auto = [r for r in rows if r["contender"] == "auto"]
    assert len(auto) == 2 and all(float(r["target"]) in gd.values() for r in auto if r["seed"] == "0")
    chosen = Results(tmp_path / "compare.csv").chosen(None)
    assert len(chosen) == 2 * len(names)
    assert [r["epoch_ratio"] for r in chosen if r["contender"] == "gd"] == [1.0, 1.0]
    for name in ("compare.png", "compare.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    text = (tmp_path / "compare.md").read_text()
    assert text in capsys.readouterr().out and "| auto |" in text

    # Killed while it wrote a line: that run is made again, and nothing else.
    file = tmp_path / "compare.csv"
    whole = file.read_text()
    file.write_text(whole[:-30])
    made = []
    monkeypatch.setattr("race.train.train", lambda *a, **k: made.append(a) or train(*a, **k))
    assert compare.main(arguments) == 0
    assert len(made) == 1 and len(rows_in(tmp_path)) == len(rows)


def test_batches(small_tasks, tmp_path):
    assert compare.main(["--batch", "16", "--quick", "--only", "net", "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert {r["batch"] for r in rows} == {"16"} and {r["seed"] for r in rows} == {"0"}
    assert (tmp_path / "compare-16.md").exists()


def test_the_search_finds_the_grid_point():
    tried = []

    def final(rate):
        tried.append(rate)
        return math.inf if rate > 40 else (math.log2(rate) - 5) ** 2

    assert compare.search(final, 1.0, 2.0) == 32.0 and max(tried) == 64.0
    assert compare.search(lambda rate: math.inf if rate > 0.1 else 1 / rate, 1.0, 2.0) == 2**-4
    assert compare.search(lambda rate: 1 / rate, 1.0, 2.0) == 2**12


@pytest.mark.parametrize("batch", [None, 16])
def test_losses_are_those_of_the_whole_set(batch):
    """After 0, 1, ... epochs; those of plain gradient descent written out."""

    def sgd(named):
        return torch.optim.SGD([p for _, p in named], lr=0.1)

    run = train(NET, 3, sgd, batch=batch)
    problem = NET.start(3)
    optimizer = sgd(problem.model.named_parameters())
    order = torch.Generator().manual_seed(3)
    for loss in run.losses:
        assert loss == pytest.approx(problem.loss(None).item(), rel=1e-5)
        parts = [None] if batch is None else torch.randperm(40, generator=order).split(batch)
        for part in parts:
            optimizer.zero_grad()
            problem.loss(part).backward()
            optimizer.step()
    assert len(run.losses) == len(run.seconds) == 4 and run.final == run.losses[3]
    assert run.reached(run.final) == 3 and run.reached(0.0) is None and not run.diverged


def test_a_target_gives_half_as_much_time_again():
    def sgd(rate):
        return lambda named: torch.optim.SGD([p for _, p in named], lr=rate)

    target = train(SMALL, 0, sgd(1.0)).final
    slow = train(SMALL, 0, sgd(0.75), target=target)
    assert slow.reached(target) == len(slow.losses) - 1 <= 45 and slow.final == slow.losses[30] > target
    gone = train(SMALL, 0, sgd(100.0), target=target)
    assert gone.diverged and gone.final == math.inf and len(gone.losses) < 5


@pytest.mark.parametrize("batches", [False, True])
def test_every_task_starts_alike(batches):
    found = tasks.tasks(batches).values()
    assert all(
        batches is False or task.start(0).samples >= 512 for task in found if task.dataset != "fashion-mnist"
    )
    for task in found:
        if task.dataset == "fashion-mnist":
            continue  # not there
        one, other = (task.start(1).loss(None) for _ in range(2))
        assert one == other != task.start(2).loss(None)
        one.backward()


def test_contenders_by_name(small_tasks, tmp_path):
    arguments = ["--only", "net", "--seeds", "3", "--contenders", "adam,auto", "--out", str(tmp_path)]
    assert compare.main(arguments) == 0
    assert {r["contender"] for r in rows_in(tmp_path)} == {"gd", "adam", "auto"}


def test_ablations(small_tasks, tmp_path, capsys):
    arguments = ["--ablations", "--only", "net", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main([*arguments, "--batch", "16"]) == 0
    text = (tmp_path / "ablations-16.md").read_text()
    assert text in capsys.readouterr().out
    names = [c.name for c in contenders.ablations()]
    assert len(names) == len(set(names)) > 8 and all(f"| {name} |" in text for name in names)
    with open(tmp_path / "ablations.csv") as file:
        finals = {row["contender"]: row["final"] for row in csv.DictReader(file)}
    # With one layer, norms that fall, and a rho that stays above its start.
    same = {f"auto, {name}" for name in ("one rho for all", "sigma from the mean", "lift = pull", "no lift")}
    assert {name for name, final in finals.items() if final == finals["auto"]} == {"auto", *same}


@pytest.mark.parametrize("table", compare.TABLES)
def test_longer_runs_go_on_where_they_ended(table, tmp_path, capsys, monkeypatch):
    arguments = [f"--{table}", "--quick", "--seeds", "0,1", "--out", str(tmp_path)]
    assert compare.main(arguments) == 0
    with open(tmp_path / f"{table}.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(LONGER) and {row["seed"] for row in rows} == {"0", "1"}
    assert {"auto", "adamw", "heavy ball"} <= {row["contender"] for row in rows}
    known = [row for row in rows if row["diverged"] == "0"]
    assert all(0 < float(row["lowest"]) <= float(row["final"]) <= float(row["first"]) for row in known)
    text = (tmp_path / f"{table}.md").read_text()
    assert text in capsys.readouterr().out and "| auto" in text

    lines = (tmp_path / f"{table}.csv").read_text().splitlines(keepends=True)
    (tmp_path / f"{table}.csv").write_text("".join(lines[:-1]))
    made = []
    once = longer.Results.add
    monkeypatch.setattr(longer.Results, "add", lambda *a: made.append(a) or once(*a))
    assert compare.main(arguments) == 0
    assert len(made) == 1 and (tmp_path / f"{table}.md").read_text() == text


def test_a_run_of_the_language_model_is_a_plain_loop():
    """Warm-up and cosine decay, held-out text that is not trained on; a run that diverges ends."""
    text, held, tokens = language.corpus()
    assert len(held) == 40_000 and 0 <= text.min() and text.max() < tokens < 128
    assert tokens == len(torch.cat([text, held]).unique())
    model = language.GPT(tokens, language.FULL.length, language.FULL.width, language.FULL.depth)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    times = language.warmup_cosine(100)
    assert [times(t) for t in (0, 4, 5, 100)] == pytest.approx([0.2, 1.0, 1.0, 0.0])
    away = language.train(longer.method("heavy ball", 1e4), language.QUICK, 0)
    assert away["held_out"] == math.inf and away["steps"] < language.QUICK.steps - 1


def test_losses_of_any_scale_make_the_same_steps():
    """Of "auto"; on rare rows what is held out is the loss on those."""
    found = {}
    for case in limits.cases(True):
        if case.section == "scale" and case.task.name.startswith("mlp"):
            factor = float(case.task.name.rpartition(" ")[2])
            found[factor] = limits._run(case, longer.method("auto", 1.0), 0)["final"] / factor
    assert list(found) == [1.0, 1e-6, 1e6] and list(found.values()) == pytest.approx(
        [found[1.0]] * 3, rel=1e-4
    )
    (case,) = (case for case in limits.cases(True) if case.section == "rare rows")
    row = limits._run(case, longer.method("adamw", 1e-2), 0)
    assert row["final"] < row["held_out"] < 2 * math.log(limits.CLASSES)


def test_pictures_that_are_not_there(small_tasks, tmp_path, capsys, monkeypatch):
    """Their tasks are left out with one line; asked for by name, or by a folder, they are an error."""
    load = data.load

    def without(name, *rest):
        if name == "fashion-mnist":
            raise UserError(f"{name} is not there")
        return load(name, *rest)

    monkeypatch.setattr(data, "load", without)
    monkeypatch.setattr(tasks, "load", without)
    options = ["--contenders", "gd", "--seeds", "0", "--out", str(tmp_path)]
    assert compare.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out, fashion-mnist is not there: away (") == 1
    assert {r["task"] for r in rows_in(tmp_path)} == {"small", "net"}
    assert compare.main([*options, "--only", "away"]) == 2
    assert compare.main([*options, "--data-root", str(tmp_path)]) == 2


def test_no_target_and_divergence_have_their_words(tmp_path):
    row = {"task": "t", "seed": 0, "batch": None, "rate": 1.0, "device": "d", "threads": "1", "torch": "2"}
    row |= {"date": "2026-01-01T00:00:00", "diverged": 0, "epoch_ratio": 1.0, "second_ratio": 1.0}
    never = {"contender": "auto", "epoch_ratio": math.inf, "second_ratio": math.inf, "final_ratio": 3.0}
    rows = [row | {"contender": "gd", "final_ratio": 1.0}, row | never, row | never | {"seed": 1}]
    rows.append(row | never | {"contender": "adam", "diverged": 1, "final_ratio": math.inf})
    text = table.markdown(rows)
    assert "| auto | never (never to never) |" in text and "| adam | diverged |" in text
    assert "| auto | never | 2.00 | never | 0 of 2 | 0 of 2 | 0 | never |" in text
    plot.draw(rows, tmp_path / "p")
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "cnn,unknown"], "unknown task 'unknown'"),
        (["--only", "quadratic-1e2", "--batch", "8"], "quadratic-1e2 has no form for mini-batches"),
        (["--contenders", "adams"], "there is no 'adams'"),
        (["--lm", "--only", "cnn"], "--lm has no --only; leave it out"),
        (["--limits", "--generalize"], "not allowed with argument"),
        (["--batch", "0"], "is not a whole number greater than 0"),
        (["--seeds", "0,x"], "'x' is not a whole number"),
        (["--out", "/dev/null"], "--out /dev/null: it is a file; give a folder that can be written"),
        (
            ["--out", "/dev/null/x"],
            "--out /dev/null/x: a file is where a folder of this path should be; give a",
        ),
    ],
    ids=str,
)
def test_bad_input(arguments, message, capsys):
    try:
        code = compare.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr().err
    assert code == 2 and message in captured and captured.count("\n") == 1


def test_a_file_that_is_something_else(tmp_path, capsys):
    (tmp_path / "compare.csv").write_text("a,b\n1,2\n")
    assert compare.main(["--quick", "--out", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
