"""Where "auto" ends: widths, batch sizes, runs that go on, rows that are seldom met, losses of any scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contenders import OURS
from .longer import Make, Runs, grid, method, summary, where
from .results import Row
from .tasks import Problem, Task, classify, load, pictures, tasks
from .train import train

TIMES = {OURS: (0.3, 1.0, 3.0)}
ADAMW = {"adamw": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Case:
    """One line of a section: a task, and what runs on it.

    Attributes:
        section: the table that it is in.
        rates: of each method.
        cosine: whether the rate decays to 0.
    """

    section: str
    task: Task
    batch: int | None
    rates: dict[str, tuple[float, ...]]
    cosine: bool = False


def _mlp(width: int, n_train: int) -> Callable[[int], Problem]:
    """Two hidden layers."""

    def start(seed: int) -> Problem:
        x, y = load("mnist5k", n_train, 16, None, seed)
        torch.manual_seed(seed)
        sizes = (256, width, width)
        hidden = [
            part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())
        ]
        return classify(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10)), x, y)

    return start


WORDS, CLASSES, PAIRS = 2000, 32, 4096


def _pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Words drawn by Zipf's law, and their classes: to know a word's, its row must have been trained."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, WORDS + 1)
    words = torch.multinomial(weights, PAIRS, replacement=True, generator=generator)
    return words, torch.randint(0, CLASSES, (WORDS,), generator=generator)[words]


def _zipf(seed: int) -> Problem:
    words, classes = _pairs(seed)
    torch.manual_seed(seed)
    return classify(nn.Sequential(nn.Embedding(WORDS, 32), nn.Linear(32, CLASSES)), words, classes)


@torch.no_grad()
def _loss_on_rare(problem: Problem, seed: int) -> float:
    """On the pairs of words that occur once or twice."""
    words, _ = _pairs(seed)
    rare = torch.bincount(words, minlength=WORDS)[words] <= 2
    return problem.loss(rare.nonzero().flatten()).item()


def _scaled(start: Callable[[int], Problem], factor: float) -> Callable[[int], Problem]:
    def scaled(seed: int) -> Problem:
        problem = start(seed)
        return Problem(problem.model, lambda index: factor * problem.loss(index), problem.samples)

    return scaled


def cases(quick: bool) -> Iterable[Case]:
    """All of them, or few and small ones."""
    both = TIMES | ADAMW
    for width in (16,) if quick else (16, 64, 256):
        n, epochs = (64, 2) if quick else (1024, 20)
        yield Case("width", Task(f"mlp {width}", epochs, 0, _mlp(width, n)), 128, both, cosine=True)
    for width in () if quick else (8, 16, 32):
        task = Task(f"resnet18 {width}", 12, 0, pictures("resnet18", "mnist5k", 256, 8, width, None))
        yield Case("width", task, 64, both, cosine=True)
    n = 64 if quick else 512
    for name, start in (("mlp", _mlp(64, n)), ("cnn", pictures("cnn", "mnist5k", n, 12, 8, None))):
        for batch in (32,) if quick else (8, 32, 128, 512):
            epochs = 2 if quick else max(10, 100 * batch // n)  # at least 100 steps
            yield Case("batch", Task(name, epochs, 0, start), batch, both, cosine=True)
    one = {OURS: (1.0,), "adamw": (3e-3,)}
    for batch in (None,) if quick else (None, 128):
        for name in ("quadratic-1e2",) if quick else ("logistic", "mlp", "cnn", "cnn_bn", "transformer"):
            task = tasks(batch is not None)[name]
            yield Case("long", Task(name, 10 if quick else 3 * task.epochs, 0, task.start), batch, one)
    rates = TIMES | {"adamw": (3e-3, 1e-2, 3e-2, 1e-1), "heavy ball": (0.3, 1.0, 3.0, 10.0)}
    yield Case("rare rows", Task("zipf", 1 if quick else 20, 0, _zipf), 128, rates)
    for factor in (1.0, 1e-6, 1e6):
        for name, start in (("mlp", _mlp(64, n)), ("cnn", pictures("cnn", "mnist5k", n, 12, 8, None))):
            scaled = Task(f"{name}, loss x {factor:g}", 2 if quick else 20, 0, _scaled(start, factor))
            yield Case("scale", scaled, 128, one)


def _run(case: Case, make: Make, seed: int) -> Row:
    """The columns of a line. Training losses are of the whole set after each epoch; the final one is the mean
    of the last twentieth of a long run, else the last one; held out: the loss on rare rows."""
    problem = case.task.start(seed)
    task = Task(case.task.name, case.task.epochs, 0, lambda seed: problem)
    steps = case.task.epochs * (1 if case.batch is None else -(-problem.samples // case.batch))

    def scheduled(named) -> torch.optim.Optimizer:
        optimizer = make(named)
        if case.cosine:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    run = train(task, seed, scheduled, batch=case.batch)
    last = max(1, case.task.epochs // 20) if case.section == "long" else 1
    row = summary(run.losses, last) | {"steps": steps}
    if len(run.losses) <= case.task.epochs:
        row["final"] = math.inf
    elif case.section == "rare rows":
        row["held_out"] = _loss_on_rare(problem, seed)
    return row


def fill(runs: Runs, seeds: list[int], quick: bool) -> None:
    """Every case."""
    for seed in seeds:
        for case in cases(quick):
            for name, rates in case.rates.items():
                for rate in rates:
                    title = f"{case.section}: {case.task.name}"
                    runs.once(
                        title,
                        seed,
                        case.batch,
                        name,
                        rate,
                        lambda case=case, name=name, rate=rate, seed=seed: _run(
                            case, method(name, rate), seed
                        ),
                    )


def markdown(rows: list[Row]) -> str:
    """A table a section, with what its numbers are."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    parts = [
        where(rows[0], seeds),
        "",
        "`auto` times 0.3 and 3: its `lr`, which multiplies its own steps.",
        "",
    ]
    for section, (title, about, table) in _SECTIONS.items():
        mine = [
            row | {"task": row["task"].partition(": ")[2]} for row in rows if row["task"].startswith(section)
        ]
        parts += [f"## {title}", "", about, "", table(mine), ""]
    return "\n".join(parts)


def _mean(rows: list[Row], column: str = "final") -> str:
    if any(row["diverged"] for row in rows):
        return "diverged"
    return f"{sum(row[column] for row in rows) / len(rows):.2g}" if rows else ""


def _columns(rows: list[Row]) -> list[tuple[str, float]]:
    """Methods and rates, in the order of their runs."""
    return list(dict.fromkeys((row["contender"], row["rate"]) for row in rows))


def _name(name: str, rate: float) -> str:
    return f"{name} x {rate:g}" if name == OURS else f"{name} {rate:g}"


def _by_task(rows: list[Row]) -> str:
    """Final losses: a line a task and batch, a column a method and rate."""
    columns = _columns(rows)
    lines = []
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["batch"]) == (task, batch)]
        cells = [_mean([r for r in mine if (r["contender"], r["rate"]) == column]) for column in columns]
        lines.append([task, str(batch or "all"), str(mine[0]["steps"]), *cells])
    return grid(["task", "batch", "steps", *(_name(*column) for column in columns)], lines)


def _long(rows: list[Row]) -> str:
    columns = _columns(rows)
    lines = []
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["batch"]) == (task, batch)]
        cells = []
        for column in columns:
            some = [r for r in mine if (r["contender"], r["rate"]) == column]
            cells += [_mean(some, "lowest"), _mean(some)]
        lines.append([task, str(batch or "all"), str(mine[0]["steps"]), *cells])
    names = [f"{_name(*column)}: {what}" for column in columns for what in ("lowest", "at the end")]
    return grid(["task", "batch", "steps", *names], lines)


def _rare_rows(rows: list[Row]) -> str:
    lines = []
    for column in _columns(rows):
        some = [row for row in rows if (row["contender"], row["rate"]) == column]
        lines.append([_name(*column), _mean(some), _mean(some, "held_out")])
    return grid(["method", "all pairs", "words met once or twice"], lines)


def _scales(rows: list[Row]) -> str:
    """Each final loss divided by its factor."""
    columns = _columns(rows)
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        factor = float(task.rpartition(" ")[2])
        mine = [row | {"final": row["final"] / factor} for row in rows if row["task"] == task]
        cells = []
        for column in columns:
            some = [row for row in mine if (row["contender"], row["rate"]) == column]
            value = sum(row["final"] for row in some) / len(some)
            cells.append("diverged" if any(row["diverged"] for row in some) else f"{value:.5g}")
        lines.append([task, *cells])
    return grid(["task", *(_name(*column) for column in columns)], lines)


_SECTIONS = {
    "width": ("Widths", "Training loss at the end, mean over seeds; cosine decay.", _by_task),
    "batch": (
        "Batch sizes",
        "Training loss at the end, mean over seeds, after 10 epochs or 100 steps, "
        "whichever is more; cosine decay.",
        _by_task,
    ),
    "long": (
        "Long runs",
        "Three times the epochs that compare.py's tasks have, no schedule: the lowest training loss, and "
        "the mean over the last twentieth of the epochs.",
        _long,
    ),
    "rare rows": (
        "Rare rows of an embedding",
        f"{WORDS:,} words by Zipf's law, {PAIRS:,} pairs, each word with a class of its own, 20 epochs, no "
        "schedule: training loss at the end, on all pairs and on those of words that occur once or twice.",
        _rare_rows,
    ),
    "scale": (
        "Losses of any scale",
        "Training loss at the end, divided by the factor, after 20 epochs, no schedule.",
        _scales,
    ),
}
