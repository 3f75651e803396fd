"""Does step adaptation spare the search for a learning rate? Small tasks, tuned and untuned contenders.

    python benchmarks/compare.py --quick
    python benchmarks/compare.py --seeds 0,1,2,3,4 --out runs/compare
    python benchmarks/compare.py --batch 128 --only cnn,resnet18
    python benchmarks/compare.py --ablations --seeds 0,1
    python benchmarks/compare.py --lm --seeds 0,1,2
    python benchmarks/compare.py --generalize
    python benchmarks/compare.py --limits

Gradient descent's best rate is searched for on a 2x grid for every task and seed: the loss that it ends with
is the target. What else is tuned is so on the first seed. Every finished run is a line of compare.csv in
--out; a second call makes only those that it lacks. Writes compare.png, compare.svg (performance profiles)
and compare.md (tables) from all lines there; compare-128.* with --batch 128, where the tasks have more
pictures and fewer epochs.

--lm: a language model of a million parameters; --generalize: accuracy on held-out pictures; --limits: widths,
batch sizes, long runs, rare rows, scaled losses. They write lm.csv and lm.md, and so on, in the same way.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run import machine

from study.cli import (
    Parser,
    exit_code,
    filled,
    integers,
    name_list,
    positive,
    script,
    threads,
    writable_folder,
)

if TYPE_CHECKING:
    from race.results import Results

QUICK = "the quick tasks with one seed, in some minutes"
TABLES = {
    "lm": "a language model",
    "generalize": "accuracy on held-out pictures",
    "limits": "where 'auto' ends",
}
"""Those of longer runs, each from a module of its own."""


def parser() -> Parser:
    p = Parser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", type=name_list, metavar="TASK,...", help="tasks (default: all)")
    p.add_argument(
        "--contenders",
        type=name_list,
        metavar="NAME,...",
        help="gd and these (default: all)",
    )
    p.add_argument("--seeds", type=integers, metavar="N,...", help="default: 0,1,2,3,4")
    p.add_argument("--batch", type=positive(int), metavar="N", help="samples in a step (default: all)")
    p.add_argument("--data-root", type=filled, metavar="DIR", help="where Fashion-MNIST is (default: data)")
    p.add_argument("--threads", type=threads, default=1, metavar="N", help="default: %(default)s")
    other = p.add_mutually_exclusive_group()
    other.add_argument(
        "--ablations", action="store_true", help="the rule of 'auto' with one part changed each, instead"
    )
    for name, about in TABLES.items():
        other.add_argument(f"--{name}", action="store_true", help=f"{about}, instead")
    p.add_argument("--quick", action="store_true", help=QUICK)
    p.add_argument("--out", type=filled, default="runs/compare", metavar="DIR", help="default: %(default)s")
    return p


def chosen_tasks(options: argparse.Namespace) -> list:
    """The tasks that the command line names; without names, those whose data can be had.

    Raises:
        UserError: one is unknown, or has no mini-batches.
    """
    from race.tasks import tasks
    from study.data import load
    from study.errors import UserError

    there = tasks(options.batch is not None, options.data_root)
    if options.only is not None:
        names = options.only
        if unknown := [name for name in names if name not in tasks()]:
            raise UserError(f"--only: unknown task {unknown[0]!r}; there are {', '.join(tasks())}")
        if without := [name for name in names if name not in there]:
            raise UserError(f"--only: {without[0]} has no form for mini-batches; leave it or --batch out")
        return [there[name] for name in names]
    chosen = [task for task in there.values() if task.quick or not options.quick]
    for dataset in dict.fromkeys(task.dataset for task in chosen if task.dataset):
        try:
            load(dataset, 1, None, options.data_root, 0)
        except UserError:
            if options.data_root is not None:
                raise
            names = [task.name for task in chosen if task.dataset == dataset]
            chosen = [task for task in chosen if task.dataset != dataset]
            print(f"left out, {dataset} is not there: {', '.join(names)} (--data-root says where it is)")
    return chosen


def chosen_contenders(options: argparse.Namespace) -> list:
    """Those that the command line names, by whole names or first words, after gradient descent.

    Raises:
        UserError: there is none of such a name.
    """
    from race.contenders import BASE, ablations, contenders
    from study.errors import UserError

    found, absent = (ablations(), []) if options.ablations else contenders()
    if absent:
        print(f"left out, not installed: {', '.join(absent)} (pip install 'oscopt[compare]')")
    if options.contenders is None:
        return found
    names = options.contenders
    known = {name for c in found for name in (c.name, c.name.split()[0])}
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--contenders: there is no {unknown[0]!r}; there are {', '.join(c.name for c in found)}"
        )
    return [c for c in found if c.name == BASE or {c.name, c.name.split()[0]} & set(names)]


def search(final: Callable[[float], float], start: float, factor: float) -> float:
    """The rate of the lowest `final` loss on a grid around `start`, which grows until both of its neighbours
    are worse; at most 12 rates to a side, for a loss that falls forever."""
    finals = {k: final(start * factor**k) for k in (0, 1, -1)}
    while True:
        best = min(finals, key=finals.__getitem__)
        if math.isinf(finals[best]):
            best = min(finals)  # all diverge: go down
        missing = [k for k in (best + 1, best - 1) if k not in finals and abs(k) <= 12]
        if not missing:
            return start * factor**best
        finals[missing[0]] = final(start * factor ** missing[0])


class Race:
    """Makes the runs that a file lacks.

    Args:
        results: the lines that are there, and where new ones go.
        about: columns that all have: date, machine, versions.
        first: the seed that is tuned on.
    """

    def __init__(self, results, about: dict[str, Any], batch: int | None, first: int) -> None:
        self._results, self._about, self._batch, self._first = results, about, batch, first

    def run(self, task, seed: int, contender, rate: float, best: float, target: float | None) -> float:
        """The final loss of a run, made if it is not there; inf: it diverged."""
        from race.train import train

        key = (task.name, seed, self._batch, contender.name, f"{rate:.6g}")
        row = self._results.get(key)
        if row is None:
            run = train(
                task,
                seed,
                lambda named: contender.make(rate, best, named),
                batch=self._batch,
                target=target,
            )
            epochs = run.reached(run.final if target is None else target)
            row = self._results.add(
                key,
                self._about
                | {
                    "epochs": task.epochs,
                    "target": run.final if target is None else target,
                    "reached": epochs,
                    "seconds": None if epochs is None else run.seconds[epochs],
                    "final": run.final,
                    "diverged": int(run.diverged),
                },
            )
            told = f"reached in {epochs} epochs" if epochs is not None else "not reached"
            told = "diverged" if run.diverged else told
            print(
                f"{task.name} seed {seed}: {contender.name} {rate:.3g}: {run.final:.4g}, {told}", flush=True
            )
        return math.inf if row["diverged"] else row["final"]

    def all(self, task, seed: int, chosen: Sequence) -> None:
        """Every contender on one task and seed."""
        base = chosen[0]
        near = self._results.best(task.name, self._first, self._batch, base.name)
        best = search(
            lambda rate: self.run(task, seed, base, rate, rate, None),
            task.lr if near is None else near["rate"],
            base.factor,
        )
        target = self.run(task, seed, base, best, best, None)
        for contender in chosen[1:]:

            def final(rate: float, contender=contender) -> float:
                return self.run(task, seed, contender, rate, best, target)

            tuned = self._results.best(task.name, self._first, self._batch, contender.name)
            if contender.factor is None:
                final(contender.start(best))
            elif seed == self._first or tuned is None:
                search(final, contender.start(best), contender.factor)
            else:
                final(tuned["rate"])


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    import torch

    from race import plot, table

    for name in TABLES:
        if getattr(options, name):
            return _longer(name, options)
    tasks = chosen_tasks(options)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2, 3, 4])
    out = writable_folder("--out", options.out)
    stem = "ablations" if options.ablations else "compare"
    results = _results(out, stem)
    torch.set_num_threads(options.threads)
    chosen = chosen_contenders(options)
    race = Race(results, _about(options), options.batch, seeds[0])
    for seed in seeds:
        for task in tasks:
            race.all(task, seed, chosen)
    for batch in results.batches():
        name = stem if batch is None else f"{stem}-{batch}"
        rows = results.chosen(batch)
        plot.draw(rows, out / name)
        text = table.markdown(rows)
        (out / f"{name}.md").write_text(text)
        if batch == options.batch:
            print("\n" + text)
            print(f"files: {out}/{stem}.csv, {name}.md, {name}.png, {name}.svg")
    return 0


def _longer(name: str, options: argparse.Namespace) -> int:
    """One of TABLES."""
    import torch

    from race import generalize, language, limits
    from race.longer import Runs
    from race.results import LONGER
    from study.errors import UserError

    for option in ("only", "contenders", "batch"):
        if getattr(options, option) is not None:
            raise UserError(f"--{name} has no --{option}; leave it out")
    module = {"lm": language, "generalize": generalize, "limits": limits}[name]
    out = writable_folder("--out", options.out)
    results = _results(out, name, LONGER)
    torch.set_num_threads(options.threads)
    module.fill(Runs(results, _about(options)), options.seeds or [0], options.quick)
    text = module.markdown(results.rows())
    (out / f"{name}.md").write_text(text)
    print(f"\n{text}\nfiles: {out}/{name}.csv, {name}.md")
    return 0


def _results(out: Path, stem: str, *columns: Sequence[str]) -> Results:
    """The lines in a file of the folder.

    Raises:
        UserError: it cannot be written, or it is something else.
    """
    from race.results import Results
    from study.errors import UserError

    try:
        return Results(out / f"{stem}.csv", *columns)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written") from None
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{out}/{stem}.csv is damaged ({error}); use another --out") from None


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """The columns that all lines have."""
    here = machine()
    about = {key: here[key] for key in ("date", "oscopt", "torch")} | {"threads": options.threads}
    return about | {"device": f"{here['processor']} ({here['cores']} cores)"}


if __name__ == "__main__":
    sys.exit(script(main, "interrupted; finished runs are in the .csv file"))
