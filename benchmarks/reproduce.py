"""Run every experiment of the paper, judge every claim, and draw every figure.

    python benchmarks/reproduce.py
    python benchmarks/reproduce.py --only fig2,fig4 --seeds 0,1,2 --jobs 2
    python benchmarks/reproduce.py --preset paper --data-root data
    python benchmarks/reproduce.py --preset paper --estimate

--estimate makes no run: it times a few passes of each net and tells hours, memory and disk of every run here,
in the order in which they would be made.

Runs that are finished are skipped, broken ones resumed; repeat the command to go on after an interruption.
Ends with a table of all claims, in --out also as results.json, results.md and report.html with all figures.

Exit codes: 0 done (whether claims held or not), 2 bad input or a run that failed, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from study.cli import (
    Parser,
    check_device,
    check_folder,
    exit_code,
    filled,
    integers,
    name_list,
    positive,
    script,
    threads,
)
from study.config import LARGEST, PRESETS, Config
from study.errors import UserError
from study.experiments import TABLE, Row, check_experiments, run_of

RUN = Path(__file__).with_name("run.py")
_MARKS = ("<!-- results: begin -->", "<!-- results: end -->")


def parser() -> Parser:
    p = Parser(prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--only",
        type=name_list,
        metavar="IDS",
        help=f"experiments, by commas (default: all): {', '.join(TABLE)}",
    )
    p.add_argument("--preset", choices=PRESETS, help="default: paper with a GPU, else small")
    p.add_argument("--seeds", type=integers, default=[0], metavar="0,1,...", help="default: 0")
    p.add_argument(
        "--epochs", type=positive(int, LARGEST["epochs"]), metavar="N", help="of each run, to try things out"
    )
    p.add_argument("--jobs", type=positive(int), default=1, metavar="N", help="runs at a time (default: 1)")
    p.add_argument("--threads", type=threads, help="of each run (default: the cores over --jobs)")
    p.add_argument("--device", type=filled, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    p.add_argument("--data-root", type=filled, metavar="DIR", help="folder of the datasets (default: data)")
    p.add_argument(
        "--out", type=filled, metavar="DIR", help="folder of all runs (default: runs/reproduce-PRESET)"
    )
    p.add_argument("--overwrite", action="store_true", help="make all runs anew")
    p.add_argument("--estimate", action="store_true", help="only tell what this would take on this machine")
    p.add_argument(
        "--markdown", type=filled, metavar="FILE", help="also put the table into this file, between its marks"
    )
    return p


# ---- what there is to run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run to be made: the row whose settings it has, and where it is written."""

    row: Row
    config: Config
    path: Path

    @property
    def name(self) -> str:
        return f"{self.row.id} seed {self.config.seed}"

    def state(self) -> str:
        """ "finished" or "diverged" if there is nothing left to do, "broken", or "new".

        Raises:
            UserError: the folder holds a run with other settings, or cannot be read.
        """
        from study.folder import CONFIG, VERDICT, read_config

        if not (self.path / CONFIG).exists():
            return "new"
        theirs, ours = read_config(self.path)[0].to_dict(), self.config.to_dict()
        # Where it ran is not what it is; run.py itself asks for the same when it resumes.
        if differing := [k for k in ours if ours[k] != theirs[k] and k not in ("threads", "device")]:
            what = ", ".join(f"{k} ({theirs[k]}, now {ours[k]})" for k in differing)
            raise UserError(f"{self.path} holds another run: {what}; use --overwrite or another --out")
        try:
            state = json.loads((self.path / VERDICT).read_text())["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return "broken"
        return state if state in ("finished", "diverged") else "broken"

    def left(self, overwrite: bool) -> int:
        """How many epochs are still to be made."""
        from study.folder import VERDICT

        state = "new" if overwrite else self.state()
        if state in ("finished", "diverged"):
            return 0
        try:  # an interrupted run has written how far it came
            done = int(json.loads((self.path / VERDICT).read_text())["epochs"]) if state == "broken" else 0
        except (OSError, ValueError, KeyError, TypeError):
            done = 0
        return max(0, self.config.epochs - done)

    def command(self, options: argparse.Namespace) -> list[str]:
        """The command that makes the run, or goes on with it."""
        from study.folder import CONFIG

        words = [sys.executable, str(RUN), "--out", str(self.path)]
        if options.data_root:
            words += ["--data-root", options.data_root]
        if (self.path / CONFIG).exists() and not options.overwrite:
            return [*words, "--resume"]
        words += [
            "--experiment",
            self.row.id,
            "--preset",
            self.config.preset,
            "--seed",
            str(self.config.seed),
        ]
        words += ["--epochs", str(self.config.epochs)] if options.epochs else []
        words += ["--device", self.config.device, "--threads", str(self.config.threads)]
        return [*words, "--overwrite"] if options.overwrite else words


def plan(options: argparse.Namespace, preset: str, device: str, out: Path) -> tuple[list[Row], dict]:
    """The rows asked for; the jobs by (row of the run, seed), those that they are compared with included."""
    rows = check_experiments(options.only) if options.only else list(TABLE.values())
    rows = sorted(set(rows), key=list(TABLE.values()).index)
    needed = [run_of(row, preset) for row in rows]
    needed += [run_of(TABLE[row.beside], preset) for row in rows if row.beside]
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    jobs = {}
    for seed in options.seeds:
        for row in sorted(set(needed), key=list(TABLE.values()).index):
            config = row.config(preset, seed=seed, device=device, threads=threads)
            config = config if options.epochs is None else config.with_epochs(options.epochs)
            jobs[row.id, seed] = Job(row, config, out / f"{row.id}-seed{seed}")
    return rows, jobs


# ---- running -----------------------------------------------------------------------------------------------


class Runner:
    """Makes jobs, some at a time; a signal stops them all so that they can be resumed."""

    def __init__(self, options: argparse.Namespace, logs: Path, say: Callable[[str], None]) -> None:
        self._options, self._logs, self._say = options, logs, say
        self._running: dict[Job, tuple[subprocess.Popen, float]] = {}
        self.failures: dict[Job, str] = {}
        self.caught: list[int] = []

    def run(self, jobs: Sequence[Job]) -> None:
        """Make all `jobs`, or as many as there is time for until SIGINT or SIGTERM."""
        before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            waiting = list(jobs)
            total = len(waiting)
            while self._running or (waiting and not self.caught):
                while waiting and len(self._running) < self._options.jobs and not self.caught:
                    self._start(waiting.pop(0))
                for job in [job for job, (process, _) in self._running.items() if process.poll() is not None]:
                    done = total - len(waiting) - len(self._running) + 1
                    self._end(job, f"[{done}/{total}]")
                time.sleep(0.1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: object) -> None:
        self.caught.append(number)
        for process, _ in self._running.values():
            process.send_signal(number)

    def _start(self, job: Job) -> None:
        with (self._logs / f"{job.path.name}.log").open("ab") as log:
            # A session of its own: the terminal's Ctrl-C comes through us, once.
            process = subprocess.Popen(
                job.command(self._options), stdout=log, stderr=log, start_new_session=True
            )
        self._running[job] = process, time.monotonic()

    def _end(self, job: Job, count: str) -> None:
        process, started = self._running.pop(job)
        seconds = time.monotonic() - started
        if process.returncode in (0, 3):
            how = "done" if process.returncode == 0 else "diverged"
            self._say(f"{count} {job.name}: {how} in {seconds:.0f} s")
        elif not self.caught:
            log = (self._logs / f"{job.path.name}.log").read_text(errors="replace").strip().splitlines()
            self.failures[job] = log[-1] if log else f"exit code {process.returncode}"
            self._say(f"{count} {job.name}: failed: {self.failures[job]}")


# ---- what it would take ------------------------------------------------------------------------------------


def tell(options: argparse.Namespace, jobs: Sequence[Job], out: Path) -> int:
    """Print hours, memory and disk of the runs that are left, in their order; one of each shape is timed."""
    from rich.console import Console
    from rich.table import Table

    from study.estimate import Estimate, estimate

    table = Table("", "run", "epochs", "s an epoch", "hours", "memory, GiB", "disk, MiB", "")
    known: dict[Config, Estimate] = {}
    hours, disk, stuck = 0.0, 0, 0
    for number, job in enumerate(jobs, start=1):
        left = job.left(options.overwrite)
        shape = replace(job.config, experiment="", lr=1e-9, seed=0)
        if left and shape not in known:
            print(f"timing {job.name}", file=sys.stderr, flush=True)
            known[shape] = estimate(shape, options.data_root, beside=options.jobs)
        if not left:
            table.add_row(str(number), job.name, "0", "", "", "", "", "finished before")
            continue
        found = known[shape]
        stuck += bool(found.problem)
        disk += found.disk
        its_hours = found.seconds * left / 3600
        hours += 0.0 if found.problem else its_hours
        told = (
            f"{found.seconds:.3g}",
            f"{its_hours:.3g}",
            f"{found.peak / 2**30:.1f}",
            f"{found.disk / 2**20:.0f}",
        )
        why = f"cannot run here: {found.problem}" if found.problem else found.note
        table.add_row(str(number), job.name, str(left), *told, why)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{hours / options.jobs:.3g} hours in all with --jobs {options.jobs}; {_room(disk, out)}")
    if stuck:
        print(f"{stuck} of {len(jobs)} runs cannot be made here; leave them out with --only")
    return 0


def _room(disk: int, out: Path) -> str:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    enough = "" if disk <= free else ", which is not enough: give another --out"
    return f"{disk / 2**30:.2f} GiB on the disk of {out}, where {free / 2**30:.1f} are free{enough}"


# ---- results -----------------------------------------------------------------------------------------------


def gather(rows: Sequence[Row], jobs: dict, preset: str, out: Path, seeds: Sequence[int]):
    """The outcome of every row, with figures of its first seed; the machines and dates of the runs."""
    from study import figure, report, results
    from study.rules import judge

    runs: dict[tuple[str, int], results.Run] = {}
    problems: dict[tuple[str, int], str] = {}
    for key, job in jobs.items():
        try:
            runs[key] = results.read(job.path)
        except UserError as error:
            problems[key] = str(error)
    outcomes, drawn = [], set()
    for row in rows:
        of, other = run_of(row, preset).id, None
        verdicts, links, parts = [], [], {}
        for seed in seeds:
            run = runs.get((of, seed))
            if run is None:
                links.append((seed, "", "not run"))
                continue
            other = runs.get((run_of(TABLE[row.beside], preset).id, seed)) if row.beside else None
            record = replace(run.record, beside=None if other is None else other.record)
            links.append((seed, f"{run.path.name}/report.html", run.state))
            if run.state == "interrupted":
                continue
            verdicts.append(judge(row.claims, record))
            if not parts:
                parts["figure"] = figure.svg(figure.draw(record, run.matrices, run.config, row.shows))
                if other is not None:
                    pair = figure.draw_beside(record, run.config, other.record, other.config)
                    parts["beside"] = figure.svg(pair)
                if of not in drawn:  # once for all rows of a run
                    parts["heat"] = report.heat_map(record.layers, record.history.layer_names, "correlation")
                    drawn.add(of)
        config = jobs[of, seeds[0]].config
        outcomes.append(report.Outcome(row.id, config, verdicts, links, **parts))
    return outcomes, list(runs.values())


def notes(runs: Sequence, seeds: Sequence[int], preset: str) -> list[str]:
    """What the numbers were measured on and when."""
    if not runs:
        return ["Nothing has been run."]
    machines = [run.machine for run in runs]
    processors = sorted({f"{m['gpu'] or m['processor']} ({m['cores']} cores)" for m in machines})
    dates = sorted(str(m["date"])[:10] for m in machines)
    versions = sorted({f"torch {m['torch']}, oscopt {m['oscopt']}" for m in machines})
    threads = sorted({run.config.threads for run in runs})
    minutes = statistics.median(run.record.seconds.sum() / 60 for run in runs)
    slowest = max(run.record.seconds.sum() / 60 for run in runs)
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        f"{len(runs)} runs, preset {preset}, seeds {', '.join(map(str, seeds))}; {period}; "
        f"{' and '.join(processors)}, {' or '.join(map(str, threads))} thread(s) a run; "
        f"{' and '.join(versions)}.",
        f"Training took {minutes:.1f} minutes a run (median), {slowest:.1f} at most.",
    ]


def markdown(outcomes: Sequence, lines: Sequence[str]) -> str:
    """The tables of docs/results.md."""
    from study.report import number

    text = [*lines, ""]
    text += ["| experiment | held of judged, by seed | not held | otherwise with 80 % of the epochs |"]
    text += ["|---|---|---|---|"]
    for outcome in outcomes:
        counts = [f"{sum(v.held for v in verdicts)} of {len(verdicts)}" for verdicts in outcome.verdicts]
        row = TABLE[outcome.id]
        what = f"{outcome.id} ({outcome.settings.model}; {row.title})"
        failed = _failures(outcome, lambda v: not v.held)
        unsettled = _failures(outcome, lambda v: not v.settled)
        text.append(f"| {what} | {', '.join(counts)} | {failed} | {unsettled} |")
    text += ["", "<details><summary>Every claim, every number</summary>", ""]
    text += ["| experiment | claim: rule | measured, by seed | held | same with 80 % of the epochs |"]
    text += ["|---|---|---|---|---|"]
    for outcome in outcomes:
        for i, verdict in enumerate(outcome.verdicts[0] if outcome.verdicts else ()):
            of_seeds = [verdicts[i] for verdicts in outcome.verdicts]
            measured = ", ".join(number(v.measured) for v in of_seeds)
            held = f"{sum(v.held for v in of_seeds)} of {len(of_seeds)}"
            same = f"{sum(v.settled for v in of_seeds)} of {len(of_seeds)}"
            text.append(f"| {outcome.id} | {verdict.claim}: {verdict.rule} | {measured} | {held} | {same} |")
    text += ["", "</details>", "", "<details><summary>Settings of the runs</summary>"]
    text += ["", "| experiment | settings | ended |", "|---|---|---|"]
    for outcome in outcomes:
        c = outcome.settings
        size = f"{c.n_train or 'all'} pictures" + (f" of {c.image_size} pixels" if c.image_size else "")
        width = "" if c.model == "linear" else f", width {c.width}"
        states = ", ".join(state for _, _, state in outcome.runs)
        same = "" if run_of(TABLE[outcome.id], c.preset).id == outcome.id else f" (run of {c.experiment})"
        text.append(
            f"| {outcome.id}{same} | {c.name}, {size}{width}, micro-batch {c.micro_batch}, {c.epochs} epochs "
            f"| {states} |"
        )
    return "\n".join([*text, "", "</details>"]) + "\n"


def _failures(outcome, fails: Callable) -> str:
    """The claims that `fails` in some seeds, with how many these are if not all."""
    told = []
    for of_seeds in zip(*outcome.verdicts, strict=True):
        if count := sum(map(fails, of_seeds)):
            part = f" ({count} of {len(of_seeds)})" if count < len(of_seeds) else ""
            told.append(f"{of_seeds[0].claim}{part}")
    return ", ".join(told)


def show(outcomes: Sequence) -> None:
    """The table of all claims, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from study.report import number

    table = Table("experiment", "claim", "rule", "measured", "held")
    for outcome in outcomes:
        for i, verdict in enumerate(outcome.verdicts[0] if outcome.verdicts else ()):
            of_seeds = [verdicts[i] for verdicts in outcome.verdicts]
            count = sum(v.held for v in of_seeds)
            held = "no" if not count else "yes" if count == len(of_seeds) else f"{count} of {len(of_seeds)}"
            measured = ", ".join(number(v.measured) for v in of_seeds)
            table.add_row(outcome.id, verdict.claim, verdict.rule, measured, held)
        if not outcome.verdicts:
            table.add_row(outcome.id, "", "", ", ".join(state for _, _, state in outcome.runs), "")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def link_pages(jobs: Sequence[Job]) -> None:
    """Let every run's page lead to all runs, and to the same run with other seeds."""
    from oscopt import atomic
    from study.report import link

    for job in jobs:
        page = job.path / "report.html"
        if not page.exists():
            continue
        seeds = [other for other in jobs if other.row == job.row and other != job]
        links = [("all runs", "../report.html")]
        links += [(f"seed {j.config.seed}", f"../{j.path.name}/report.html") for j in seeds]
        linked = link(page.read_text(), links)
        with atomic.writing(page, "w") as file:
            file.write(linked)


class Markdown:
    """A file that has a table between its marks.

    Args:
        file: its path; it is created if only its folder is there.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, file: str) -> None:
        self._path = Path(file)
        try:
            self._read()
        except OSError as error:
            raise UserError(f"--markdown {file}: {error.strerror}; give a file that can be written") from None
        except UnicodeDecodeError:
            raise UserError(f"--markdown {file}: it is no text; give a Markdown file") from None
        folder = self._path.parent
        if not os.access(self._path if self._path.exists() else folder, os.W_OK) or not folder.is_dir():
            raise UserError(f"--markdown {file}: it cannot be written; give a file in a folder that is there")

    def _read(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def put(self, text: str) -> None:
        """Replace what is between the marks by `text`, or append both."""
        from oscopt import atomic

        block = f"{_MARKS[0]}\n\n{text}\n{_MARKS[1]}"
        pattern = re.compile(f"{re.escape(_MARKS[0])}.*{re.escape(_MARKS[1])}", re.DOTALL)
        old = self._read()  # anew: it may have been edited while the runs were made
        new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old}{block}\n"
        with atomic.writing(self._path, "w") as file:
            file.write(new)


# ---- the command -------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(options: argparse.Namespace) -> int:
    if options.only:
        check_experiments(options.only)
    check_folder("--data-root", options.data_root)
    target = None if options.markdown is None else Markdown(options.markdown)
    import torch

    from study.folder import Folder

    gpu = torch.cuda.is_available()
    preset = options.preset or ("paper" if gpu else "small")
    device = options.device or ("cuda" if gpu else "cpu")
    check_device(device)
    out = Path(options.out or f"runs/reproduce-{preset}")
    rows, jobs = plan(options, preset, device, out)
    if options.estimate:
        return tell(options, list(jobs.values()), out)
    root = Folder(out)
    try:
        return _reproduce(options, preset, rows, jobs, root, target)
    finally:
        root.close()


def _reproduce(options: argparse.Namespace, preset: str, rows: list[Row], jobs: dict, root, target) -> int:
    from study import report
    from study.results import as_json

    states = {job: "new" if options.overwrite else job.state() for job in jobs.values()}
    todo = [job for job, state in states.items() if state not in ("finished", "diverged")]
    print(
        f"{len(rows)} experiments are {len(jobs)} runs; {len(jobs) - len(todo)} finished before", flush=True
    )
    logs = root.path / "logs"
    logs.mkdir(exist_ok=True)
    runner = Runner(options, logs, lambda line: print(line, flush=True))
    runner.run(todo)
    outcomes, runs = gather(rows, jobs, preset, root.path, options.seeds)
    lines = notes(runs, options.seeds, preset)
    root.write_json("results.json", {
        "notes": lines,
        "experiments": [
            {"id": o.id, "runs": o.runs, "claims": [as_json(v) for v in o.verdicts]}
            for o in outcomes
        ],
    })  # fmt: skip
    text = markdown(outcomes, lines)
    with root.writing("results.md") as file:
        file.write(text)
    with root.writing("report.html") as file:
        file.write(report.index_page(f"Gradient oscillation: {len(rows)} experiments", lines, outcomes))
    link_pages(list(jobs.values()))
    if target is not None and not runner.caught:
        target.put(text)
    show(outcomes)
    print(f"files: {root.path}/report.html, results.json, results.md")
    if runner.caught:
        command = shlex.join(["python", *sys.argv])
        print(f"interrupted; go on with: {command}", file=sys.stderr)
        return 128 + runner.caught[0]
    for job, reason in runner.failures.items():
        print(f"error: {job.name} failed: {reason}", file=sys.stderr)
    return 2 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(script(main, "interrupted; repeat the command to go on"))
