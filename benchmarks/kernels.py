"""Microbenchmarks of the optimizer step: how close to the memory limit, how far ahead of the alternatives.

    python benchmarks/kernels.py --quick
    python benchmarks/kernels.py --sets resnet34 gpt2 --threads 1 2 --sizes
    python benchmarks/kernels.py --device cuda --sets resnet34 gpt2 llama-1b --sizes

Every contender steps once a round, interleaved in one process; medians over rounds, ratios paired by round.
Writes kernels.csv (one row a contender and set) and a roofline, kernels.png and .svg, into --out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from run import machine

from study.cli import (
    Parser,
    check_device,
    exit_code,
    filled,
    name_list,
    positive,
    script,
    threads,
    writable_folder,
)

COLUMNS = (
    "date device threads cold torch triton numba oscopt set tensors elements dtype contender rounds "
    "median_ms min_ms max_ms bytes_per_parameter gb_per_s percent_of_copy base ratio host_ms "
    "extra_bytes_per_parameter"
).split()
QUICK = {"sets": ["resnet34"], "seconds": 12.0}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def parser() -> Parser:
    from micro.sets import MODELS, SWEEP

    p = Parser(prog="kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--sets", nargs="*", metavar="NAME", help=f"models: {', '.join(MODELS)} (default: resnet34)"
    )
    p.add_argument(
        "--sizes",
        nargs="*",
        metavar="N",
        help=f"flat sizes, ELEMENTS or ELEMENTSxTENSORS (alone: {' '.join(SWEEP)}, on a GPU 1e9 too)",
    )
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", type=filled, help="default: cuda where there is a GPU, else cpu")
    p.add_argument("--threads", nargs="+", type=threads, metavar="N", help="of the CPU (default: torch's)")
    p.add_argument("--seconds", type=positive(float), help="for each set (default: 30)")
    p.add_argument(
        "--contenders",
        type=name_list,
        metavar="NAME,...",
        help="these, and what they are compared to (default: all)",
    )
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--cold", action="store_true", help="empty the caches before each step, as training does")
    p.add_argument(
        "--markdown", type=filled, metavar="CSV", help="print the tables of such a file, and do nothing else"
    )
    p.add_argument("--quick", action="store_true", help="resnet34 only, without torch.compile, in a minute")
    p.add_argument("--out", type=filled, default="runs/kernels", metavar="DIR", help="default: %(default)s")
    return p


def chosen_sets(options: argparse.Namespace, gpu: bool) -> list:
    """The parameter sets that the command line names.

    Raises:
        UserError: one is unknown.
    """
    from micro.sets import MODELS, SWEEP, flat_set, model_set
    from study.errors import UserError

    names = options.sets
    if names is None:
        names = QUICK["sets"] if options.quick or options.sizes is None else []
    if unknown := [name for name in names if name not in MODELS]:
        raise UserError(f"unknown parameter set {unknown[0]!r}; there are {', '.join(MODELS)}")
    sizes = options.sizes
    if sizes == []:
        sizes = [*SWEEP, "1e9"] if gpu else SWEEP
    try:
        return [model_set(name) for name in names] + [flat_set(text) for text in sizes or ()]
    except ValueError as error:
        raise UserError(str(error)) from None


def chosen_contenders(options: argparse.Namespace, names: list[str]) -> list:
    """What the command line names, and what the tables and the plot need.

    Raises:
        UserError: one is unknown.
    """
    from micro.contenders import BASE, CEILING, contenders
    from study.errors import UserError

    found = {c.name: c for c in contenders(names, compiled=not (options.quick or options.no_compile))}
    if options.contenders is None:
        return list(found.values())
    wanted = list(options.contenders)
    if unknown := [name for name in wanted if name not in found]:
        raise UserError(f"--contenders: there is no {unknown[0]!r}; there are {', '.join(found)}")
    wanted += [CEILING, BASE]
    for name in wanted:  # grows: what one is compared with is compared as well
        if found[name].base not in wanted:
            wanted.append(found[name].base)
    return [c for name, c in found.items() if name in wanted]


def backends(device) -> list[str]:
    """Names of the backends that run on `device`, the fastest first."""
    from oscopt import kernels

    names = []
    for name in kernels.BACKENDS:
        if name == "triton" and device.type == "cpu":
            continue  # its interpreter, which is for tests
        try:
            kernels.backend(name, device)
        except (RuntimeError, ImportError):
            continue
        names.append(name)
    return names


def rows_of(timings: Sequence, what, dtype: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contender, with :data:`COLUMNS`."""
    import torch

    from micro.contenders import CEILING
    from micro.timing import paired_ratio

    by_name = {t.contender.name: t for t in timings}
    itemsize = getattr(torch, dtype).itemsize

    def speed(timing) -> float:
        moved = timing.contender.arrays * itemsize * what.elements
        return moved / statistics.median(timing.step_ms) / 1e6

    rows = []
    for timing in timings:
        c, times = timing.contender, timing.step_ms
        numbers = {
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "max_ms": max(times),
            "bytes_per_parameter": c.arrays * itemsize,
            "gb_per_s": speed(timing),
            "percent_of_copy": 100 * speed(timing) / speed(by_name[CEILING]),
            "ratio": paired_ratio(timing, by_name[c.base]),
            "host_ms": statistics.median(timing.host_ms),
            "extra_bytes_per_parameter": timing.extra_bytes / what.elements,
        }
        labels = {"set": what.name, "tensors": len(what.shapes), "elements": what.elements, "dtype": dtype}
        labels |= {"contender": c.name, "base": c.base, "rounds": len(times)}
        rows.append(about | labels | {key: float(f"{value:.5g}") for key, value in numbers.items()})
    return rows


def check_columns(path: Path) -> None:
    """Raise if rows cannot be added to the file, if there is one.

    Raises:
        UserError: it has other columns.
    """
    from study.errors import UserError

    if path.exists():
        with open(path, newline="", errors="replace") as file:
            if next(csv.reader(file), None) != COLUMNS:
                raise UserError(f"--out: {path} has other columns; give another folder, or move it away")


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add `rows` to the CSV file, which begins with its header."""
    from oscopt.atomic import writing

    before = path.read_text() if path.exists() else ",".join(COLUMNS) + "\n"
    with writing(path, "w") as file:
        file.write(before)
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def version(package: str) -> str:
    """Of the installed package; empty if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people: text columns left, numbers right."""
    line = "{:<29} {:>9} {:>9} {:>9} {:>6} {:>7} {:>6} {:>7} {:>8} {:>7}"
    head = ("contender", "median ms", "min", "max", "B/par", "GB/s", "% copy", "ratio", "host ms", "+B/par")
    print(line.format(*head))
    for r in rows:
        times = (f"{r[key]:.3f}" for key in ("median_ms", "min_ms", "max_ms"))
        tail = (f"{r['percent_of_copy']:.0f}", f"{r['ratio']:.2f}", f"{r['host_ms']:.3f}")
        extra = f"{r['extra_bytes_per_parameter']:.2f}"
        print(
            line.format(
                r["contender"], *times, f"{r['bytes_per_parameter']:g}", f"{r['gb_per_s']:.1f}", *tail, extra
            )
        )


def print_markdown(path: Path) -> None:
    """The tables of a kernels.csv: a row a contender, two columns a number of threads."""
    from study.errors import UserError

    try:
        with open(path, newline="") as file:
            tables = "\n".join(_tables(csv.DictReader(file)))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"--markdown {path}: it is no kernels.csv ({error})") from None
    print(tables)


def _tables(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("set", "tensors", "elements", "dtype", "cold", "device"))
        groups.setdefault(key, {}).setdefault(row["contender"], {})[row["threads"]] = row
    for (name, tensors, elements, dtype, cold, device), contenders in groups.items():
        threads = sorted({count for by_threads in contenders.values() for count in by_threads})
        row = next(iter(next(iter(contenders.values())).values()))
        start = ", caches emptied before each step" if cold == "True" else ""
        yield (
            f"\n**{name}**: {int(elements):,} parameters in {int(tensors):,} tensors, {dtype}{start}; "
            f"{device}, torch {row['torch']}, {row['date'][:10]}\n"
        )
        columns = [f"ms, {n} threads | ratio" if n else "ms | ratio" for n in threads]
        yield "| contender | bytes | " + " | ".join(columns) + " | % of a copy's GB/s |"
        yield "|---|---|" + "---|---|" * len(threads) + "---|"
        for contender, by_threads in contenders.items():
            of = [by_threads.get(n) for n in threads]
            cells = [f"{float(r['median_ms']):.2f} | {float(r['ratio']):.2f}" if r else "|" for r in of]
            percent = ", ".join(f"{float(r['percent_of_copy']):.0f}" for r in of if r)
            size = float(next(r for r in of if r)["bytes_per_parameter"])
            yield f"| {contender} | {size:g} | " + " | ".join(cells) + f" | {percent} |"


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _run(parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    import torch

    from micro import contenders, plot, timing
    from study import memory

    if options.markdown:
        print_markdown(Path(options.markdown))
        return 0
    gpu = torch.cuda.is_available()
    name = options.device or ("cuda" if gpu else "cpu")
    check_device(name)
    device = torch.device(name)
    sets = chosen_sets(options, device.type == "cuda")
    chosen = chosen_contenders(options, backends(device))
    seconds = options.seconds or (QUICK["seconds"] if options.quick else 30.0)
    out = writable_folder("--out", options.out)
    check_columns(out / "kernels.csv")
    here = machine()
    about = {"date": here["date"], "cold": options.cold}
    about |= {name: version(name) for name in ("torch", "triton", "numba", "oscopt")}
    about["device"] = here["gpu"] if device.type == "cuda" else f"{here['processor']} ({here['cores']} cores)"
    if any("numba" in c.name for c in chosen):
        from oscopt.kernels import numba_backend

        form = numba_backend.FORM
        prefetched = f"prefetched {form.ahead} bytes ahead" if form.ahead else "not prefetched"
        print(f"CPU kernel for {numba_backend.PROCESSOR}: parts of {form.part} bytes, {prefetched}")
    dtype, rows = getattr(torch, options.dtype), []
    threads = [""] if device.type == "cuda" else options.threads or [torch.get_num_threads()]
    for count in threads:
        if count:
            torch.set_num_threads(count)
        for what in sets:
            text = f" with {count} threads" if count else ""
            print(
                f"\n{what.name}: {what.elements:,} parameters in {len(what.shapes):,} tensors{text}",
                flush=True,
            )
            needed = timing.bytes_needed(what.elements, dtype.itemsize, chosen)
            if needed > 0.9 * (free := memory.free(device)):
                print(
                    f"skipped: it needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
                )
                continue
            started = time.monotonic()
            timings = timing.measure(chosen, what, dtype, device, seconds, print, options.cold)
            found = rows_of(timings, what, options.dtype, about | {"threads": count})
            append(out / "kernels.csv", found)
            rows += found
            print_table(found)
            print(f"{found[0]['rounds']} rounds in {time.monotonic() - started:.0f} s")
    if rows:
        plot.draw(rows, out / "kernels")
        print(
            f"\nratio: to {contenders.BASE}, with momentum to {contenders.BASE_MOMENTUM}, with adaptation to "
            "OscGD without, the median of paired rounds"
        )
        print(f"files: {out}/kernels.csv, kernels.png, kernels.svg")
    return 0


if __name__ == "__main__":
    sys.exit(script(main, "interrupted; finished sets are in kernels.csv"))
