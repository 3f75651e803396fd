"""Run any experiment of the paper: full-batch gradient descent with every gradient measured.

    python benchmarks/run.py --model resnet34
    python benchmarks/run.py --experiment fig2 --preset paper --data-root data
    python benchmarks/run.py --model cnn --optimizer adam --beside runs/fig2-mnist5k-small
    python benchmarks/run.py --resume --out runs/fig5-mnist5k-small
    torchrun --nproc-per-node 2 benchmarks/run.py --model resnet18 --micro-batch 250

Exit codes: 0 done, 2 bad input or a full disk, 3 the loss diverged, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from study.cli import (
    Parser,
    check_device,
    check_folder,
    check_threads,
    exit_code,
    filled,
    integer,
    name_list,
    positive,
    script,
    threads,
)
from study.config import DATASETS, LARGEST, LAYERS, MODELS, OPTIMIZERS, PRECISIONS, PRESETS, Config
from study.errors import Diverged, Interrupted, UserError
from study.experiments import DEFAULT_ROW, LR_OF, TABLE, check_experiments


def setting(name: str):
    """The type of an option that is a whole number among the settings."""
    return positive(int, LARGEST[name])


def parser() -> Parser:
    p = Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to run")
    what.add_argument("--model", choices=MODELS, help="the paper's experiment with this model")
    what.add_argument("--experiment", metavar="ID", help=f"a row of the table: {', '.join(TABLE)}")
    what.add_argument("--preset", choices=PRESETS, help="default: paper with a GPU, else small")
    settings = p.add_argument_group("settings, instead of the preset's")
    settings.add_argument("--dataset", choices=DATASETS)
    settings.add_argument("--optimizer", choices=OPTIMIZERS)
    settings.add_argument("--lr", type=positive(float))
    settings.add_argument("--epochs", type=setting("epochs"))
    settings.add_argument("--n-train", type=setting("n_train"), metavar="N", help="pictures to train on")
    settings.add_argument("--width", type=setting("width"), help="channels of the first block")
    settings.add_argument("--image-size", type=setting("image_size"), metavar="PIXELS")
    settings.add_argument(
        "--micro-batch",
        type=setting("micro_batch"),
        metavar="N",
        help="pictures at a time, at most: all parts are of one size, or differ by one picture",
    )
    settings.add_argument("--layers", choices=LAYERS, help="what is measured together (default: module)")
    settings.add_argument("--seed", type=integer)
    settings.add_argument("--device", type=filled, help="cpu, cuda, cuda:1, ...")
    settings.add_argument("--threads", type=threads, help="of the CPU")
    exact = settings.add_mutually_exclusive_group()
    exact.add_argument("--precision", choices=PRECISIONS, help="default: fp32")
    for name in PRECISIONS[1:]:
        exact.add_argument(f"--{name}", dest="precision", action="store_const", const=name)
    settings.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    settings.add_argument(
        "--sharpness-every",
        type=setting("sharpness_every"),
        metavar="N",
        help="epochs between two Hessian eigenvalues",
    )
    judged = p.add_argument_group("how it is judged and drawn")
    judged.add_argument(
        "--claims", type=name_list, metavar="RULES", help="rules, by commas, instead of the experiment's"
    )
    judged.add_argument(
        "--beside", type=filled, metavar="DIR", help="folder of a finished run to compare with"
    )
    where = p.add_argument_group("where")
    where.add_argument(
        "--data-root", type=filled, metavar="DIR", help="folder of the datasets (default: data)"
    )
    where.add_argument(
        "--out", type=filled, metavar="DIR", help="folder of the run (default: runs/ID-DATASET-PRESET)"
    )
    where.add_argument("--resume", action="store_true", help="go on with the run in --out")
    where.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    where.add_argument("--checkpoint-seconds", type=positive(float), default=30.0, metavar="S")
    where.add_argument("--checkpoint-epochs", type=positive(int), metavar="N", help="and every N epochs")
    return p


SETTINGS = ("dataset", "optimizer", "lr", "epochs", "n_train", "width", "image_size", "micro_batch")
SETTINGS += ("layers", "seed", "device", "threads", "precision", "compile", "sharpness_every")


def configure(options: argparse.Namespace) -> Config:
    """The settings that the command line asks for; says which preset, and why."""
    import torch

    if options.experiment is not None:
        check_experiments([options.experiment])
    if options.experiment is None and options.model is None:
        raise UserError("say what to run: --model resnet34, or --experiment fig5 (--help shows all options)")
    row = TABLE[options.experiment or DEFAULT_ROW[options.model]]
    if options.model not in (None, row.model):
        raise UserError(f"--experiment {row.id} is about {row.model}, not {options.model}; leave out --model")
    gpu = torch.cuda.is_available()
    preset = options.preset or ("paper" if gpu else "small")
    why = "as asked" if options.preset else f"there is {'a' if gpu else 'no'} GPU; --preset overrides it"
    device = options.device or ("cuda" if gpu else "cpu")
    chosen = row.config(preset, device=device, threads=torch.get_num_threads())
    config = replace(chosen, **given(options) | {"epochs": chosen.epochs})
    if options.epochs is not None:
        config = config.with_epochs(options.epochs)
    usual = config.optimizer != row.optimizer and options.lr is None and LR_OF[config.optimizer]
    if usual:
        config = replace(config, lr=usual)
    print(f"{row.id}: {row.model}, preset {preset} ({why}){changes(chosen, config)}")
    if usual:
        print(f"learning rate {usual:g}, usual for {config.optimizer}; --lr overrides it")
    return config


def changes(preset: Config, config: Config) -> str:
    """What of the numbers that `preset` gives is another in `config`, in words; where it runs is not told."""
    names = [name for name in SETTINGS if name not in ("device", "threads")]
    changed = [name for name in names if getattr(config, name) != getattr(preset, name)]
    return f", changed: {', '.join(changed)}" if changed else ""


def given(options: argparse.Namespace) -> dict[str, object]:
    """The settings that the command line names."""
    return {key: getattr(options, key) for key in SETTINGS if getattr(options, key) is not None}


def machine() -> dict[str, object]:
    """What a run's numbers may depend on besides its settings."""
    import numpy
    import torch

    import oscopt

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "oscopt": oscopt.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def note_machine(folder, config: Config, epoch: int) -> None:
    """Write down, and say, that a run goes on where its last bits may be others than where it began."""
    from study.folder import CONFIG, read_config

    here, there = machine(), read_config(folder.path)[1]
    last = there | (there["resumed"][-1] if there.get("resumed") else {})
    if differing := {key: here[key] for key in MACHINE if here[key] != last.get(key)}:
        there["resumed"] = [*there.get("resumed", ()), {"epoch": epoch, "date": here["date"]} | differing]
        folder.write_json(CONFIG, {"settings": config.to_dict(), "machine": there})
        what = ", ".join(f"{key} {last.get(key)}, now {value}" for key, value in differing.items())
        print(f"begun elsewhere ({what}): from here on the last bits of the numbers may be others")


MACHINE = ("processor", "gpu", "torch", "numpy", "oscopt")
"""What decides the last bits of a run's numbers, besides its settings."""


def open_folder(options: argparse.Namespace):
    """The run's folder and settings; checks that the folder may be used so."""
    from study.folder import Folder

    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if options.resume and options.out and options.model is options.experiment is None:
        folder = Folder(options.out)
        config = folder.read_config()
        asked = replace(config, **given(options), **({"preset": options.preset} if options.preset else {}))
    else:
        asked = configure(options)
        folder = Folder(options.out or f"runs/{asked.experiment}-{asked.dataset}-{asked.preset}")
        if folder.holds_run and not (options.resume or options.overwrite):
            raise UserError(f"{folder.path} holds a run already; use --resume, --overwrite or another --out")
        config = folder.read_config() if options.resume else asked
    ours, theirs = asked.to_dict(), config.to_dict()
    if differing := [f"{key} ({theirs[key]}, now {ours[key]})" for key in ours if ours[key] != theirs[key]]:
        raise UserError(f"cannot resume {folder.path} with other settings: {', '.join(differing)}")
    check_device(config.device)
    check_threads(config.threads)
    check_folder("--data-root", options.data_root)
    return folder, config


class Display:
    """A live line on a terminal, a line every few seconds elsewhere."""

    def __init__(self, epochs: int, quiet_seconds: float = 10.0) -> None:
        self._live = sys.stdout.isatty()
        self._interval = 0.2 if self._live else quiet_seconds
        self._last, self._first = -math.inf, None
        self._epochs = epochs

    def __call__(self, trainer) -> None:
        now, progress = time.monotonic(), trainer.progress
        if self._first is None:
            self._first = (now, len(progress))
        done = len(progress)
        if now - self._last < self._interval and done < self._epochs:
            return
        self._last = now
        text = f"epoch {done}/{self._epochs}  loss {progress.loss[-1]:.4f}"
        text += f"  accuracy {progress.accuracy[-1]:6.1%}"
        if math.isfinite(mu := trainer.meter.global_correlation.item()):
            text += f"  correlation {mu:+.3f}"
        if done > self._first[1] and now > self._first[0]:  # not yet known in the first epoch
            speed = (done - self._first[1]) / (now - self._first[0])
            left = datetime.timedelta(seconds=round((self._epochs - done) / speed))
            text += f"  {speed:.2f} epochs/s  {left} left"
        print(f"\r\x1b[2K{text}" if self._live else text, end="" if self._live else "\n", flush=True)

    def close(self) -> None:
        if self._live:
            print()


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _main(parser().parse_args(arguments)))


def _main(options: argparse.Namespace) -> int:
    from study import parallel

    ranks = parallel.start()
    if ranks.rank > 0:
        return follow(ranks, options)
    folder = None
    try:
        options.claims = None if options.claims is None else check_claims(options.claims)
        beside = None if options.beside is None else read_beside(options.beside)
        folder, config = open_folder(options)
        return _run(folder, config, options, beside, ranks)
    finally:
        ranks.close()
        if folder is not None:
            folder.close()


def follow(ranks, options: argparse.Namespace) -> int:
    """Be one of the other processes of a run: whatever comes, the first one decides."""
    from study.train import Trainer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if (begin := ranks.hear()) is not None:
        config, state = begin
        trainer = Trainer(config, options.data_root, ranks)
        if state is not None:
            trainer.load_state_dict(state)
        while ranks.hear() is not None:
            with suppress(Diverged):
                trainer.epoch()
    ranks.close()
    return 0


def check_claims(names: list[str]):
    from study import rules

    return rules.check_claims(names)


def read_beside(path: str):
    from study import results

    return results.read(path)


def _run(folder, config: Config, options: argparse.Namespace, beside, ranks) -> int:
    from study import results
    from study.folder import CONFIG
    from study.train import Trainer, run

    trainer = Trainer(config, options.data_root, ranks)  # all errors of the input are raised here
    state = None
    if options.resume:
        state, note = folder.load_checkpoint(trainer.load_state_dict)
        if note:
            print(note, file=sys.stderr)
        print(f"resuming {folder.path} at epoch {len(trainer.progress)}")
        note_machine(folder, config, len(trainer.progress))
    else:
        folder.clear()
        folder.write_json(CONFIG, {"settings": config.to_dict(), "machine": machine()})
    ranks.say((config, state))
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{config.model} with {parameters:,} parameters in {len(trainer.meter.layer_names)} layers, "
        f"{trainer.count:,} pictures of {config.dataset}, {config.optimizer} lr {config.lr:g}, "
        f"{config.epochs} epochs, on {config.device} "
        f"({trainer.meter.backend} kernels, {config.threads} threads"
        f"{f', {ranks.size} processes' if ranks.size > 1 else ''})"
    )
    if len(trainer.batches) < ranks.size:
        least = -(-trainer.count // ranks.size)
        print(f"some processes have nothing to do: with --micro-batch {least} there is a part for each")
    display, code, state = Display(config.epochs), 0, results.FINISHED
    every = {"checkpoint_seconds": options.checkpoint_seconds, "checkpoint_epochs": options.checkpoint_epochs}
    try:
        run(trainer, folder, display, **every)
    except Diverged as error:
        code, state = 3, results.DIVERGED
        message = f"error: {error}; everything up to then is in {folder.path}"
    except Interrupted as interruption:
        code, state = interruption.exit_code, results.INTERRUPTED
        command = shlex.join(["python", sys.argv[0], "--resume", "--out", str(folder.path)])
        message = f"interrupted; go on with: {command}"
    finally:
        display.close()
    record = trainer.record
    if beside is not None:
        record = replace(record, beside=beside.record)
    claims = TABLE[config.experiment].claims if options.claims is None else options.claims
    for line in results.write(folder, record, trainer.matrices, config, state, claims, beside):
        print(line)
    print(f"files         {folder.path}/report.html, figure.png, layers.png, history.npz, epochs.csv, ...")
    if code:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    code = script(main, "interrupted at once; the last checkpoint is whole")
    from study.parallel import leave

    leave(code)
