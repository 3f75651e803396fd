"""Compile the Triton kernels ahead of time, without a GPU, and report what became of them.

    python -m oscopt.kernels.aot [--target cuda:90 ...] [--dtype float32 ...] [--json]

For every kernel that a training run uses: the accesses to global memory by width (in bits), on the main path
and on the masked one, and registers, stack, spills and shared memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import SUMS, triton_backend, triton_sketch
from .sketch import BUCKETS, kept_dtype

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
_PLAIN = ("measure", "measure+copy", "update")
_MOMENTUM = ("measure+momentum", "measure+momentum+copy", "align+momentum", "update+momentum")
VARIANTS = (
    *(f"{name}{scaled}" for name in (*_PLAIN, *_MOMENTUM) for scaled in ("", "+scaled")),
    *(f"{name}+scaled+bounded" for name in _MOMENTUM),
    *("monitor", "monitor+copy"),
    *(f"sketch{momentum}{scaled}" for momentum in ("", "+momentum") for scaled in ("", "+scaled")),
    "sketch+momentum+scaled+bounded",
    "sketch+monitor",
)
"""Names of the variants of the step kernel: what it does, joined by "+". "measure" is against the last
gradient (and the momentum, where there is any), "align" against the momentum alone, both with the update;
"monitor" is against the last gradient without it; "sketch" sketches, with the update or as a monitor."""

REDUCE, CHUNK = "reduce", "chunk"
"""Names of the kernel that sums up layers, always in float64, and of the one that finishes sketches."""

_TYPES = {
    "pointers_ptr": "*i64",
    "tensor_ptr": "*i32",
    "start_ptr": "*i64",
    "stop_ptr": "*i64",
    "seed_ptr": "*i64",
    "number_ptr": "*i32",
    "runs_ptr": "*i32",
    "tile_ptr": "*fp64",
    "flags_ptr": "*i32",
    "row_ptr": "*i32",
    "hyper_ptr": "*fp64",
    "scale_of_ptr": "*i32",
    "partial_ptr": "*fp64",
    "N": "i32",
    "scale_ptr": "*fp64",
    "bound_ptr": "*fp64",
    "bounds_ptr": "*i32",
    "out_ptr": "*fp64",
    "stride": "i32",
}


@dataclass(frozen=True)
class Report:
    """One compiled variant. Accesses are counted by (kind, bits): {"load 128": 3, "store 128": 1}."""

    target: str
    dtype: str
    variant: str
    main: dict[str, int]
    masked: dict[str, int]
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int


def parse_target(text: str) -> GPUTarget:
    """The target "cuda:90" (compute capability 9.0) or "hip:gfx942".

    Raises:
        ValueError: `text` is neither.
    """
    backend, _, arch = text.partition(":")
    if backend == "cuda" and re.fullmatch(r"\d{2,3}", arch):
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and re.fullmatch(r"gfx[0-9a-f]+", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"unknown target {text!r}; use one such as {', '.join(TARGETS)}")


def compile_variant(target: str, dtype: torch.dtype, variant: str):
    """The compiled kernel; `target` is one that :func:`check_target` lets pass."""
    gpu = parse_target(target)
    if variant == REDUCE:
        kernel = triton_backend.reduce_kernel
        constants = {
            "SUMS": len(SUMS),
            "PAIR": True,
            "ALIGN": True,
            "BLOCK": triton_backend.REDUCE_BLOCK,
        }
        options = triton_backend.REDUCE_OPTIONS
    elif variant == CHUNK:
        kernel = triton_sketch.chunk_kernel
        constants = {"KEPT": triton_backend.ELEMENT[kept_dtype(dtype)], "BUCKETS": BUCKETS}
        options = triton_sketch.SMALL_OPTIONS
    elif variant.startswith("sketch"):
        parts = variant.split("+")
        chosen = {part: part in parts for part in ("momentum", "scaled", "bounded")}
        update = "monitor" not in parts
        constants = triton_backend.constants(dtype, update=update, **chosen, **triton_sketch.VARIANT)
        kernel = triton_backend.step_kernel
        options = triton_backend.options(dtype, gpu.warp_size)
    else:
        parts = variant.split("+")
        constants = triton_backend.constants(
            dtype,
            update="monitor" not in parts,
            measure="update" not in parts,
            pair=not {"update", "align"} & set(parts),
            **{part: part in parts for part in ("momentum", "copy", "scaled", "bounded")},
        )
        kernel = triton_backend.step_kernel
        options = triton_backend.options(dtype, gpu.warp_size)
    names = kernel.arg_names
    types = _TYPES | {"bucket_ptr": "*fp64" if dtype == torch.float64 else "*fp32"}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")},
    )
    return triton.compile(source, target=gpu, options=options)


def check_target(target: str) -> None:
    """Compile something small for `target` in a child process: for one that it does not know, LLVM aborts.

    Raises:
        ValueError: the target is unknown, to us or to the installed compiler.
    """
    parse_target(target)
    child = multiprocessing.get_context("fork").Process(target=_compile_silently, args=(target,))
    child.start()
    child.join()
    if child.exitcode != 0:
        known = ", ".join(TARGETS)
        raise ValueError(
            f"triton {triton.__version__} cannot compile for target {target!r}; use one of {known}"
        )


def _compile_silently(target: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    compile_variant(target, torch.float32, REDUCE)


def report(target: str, dtype: torch.dtype, variant: str) -> Report:
    """Compile one variant and look at what came out."""
    compiled = compile_variant(target, dtype, variant)
    if target.startswith("cuda"):
        main, masked = _paths(compiled.asm["ptx"], _PTX_LABEL, _PTX_BRANCH, _ptx_accesses)
        resources = _cuda_resources(compiled.asm["cubin"])
    else:
        main, masked = _paths(compiled.asm["amdgcn"], _GCN_LABEL, _GCN_BRANCH, _gcn_accesses)
        resources = _hip_resources(compiled.asm["amdgcn"])
    name = "float64" if variant == REDUCE else str(dtype).removeprefix("torch.")
    return Report(target, name, variant, main, masked, shared_bytes=compiled.metadata.shared, **resources)


# ---- reading assembly ------------------------------------------------------------------------------------

_PTX_LABEL = re.compile(r"^(\$\w+):")
_PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_BRANCH = re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)")
_GCN_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
_GCN_BITS |= {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def _paths(assembly: str, label: re.Pattern, branch: re.Pattern, access) -> tuple[dict, dict]:
    """Accesses to global memory on the main path, and on the masked one.

    The main path is all basic blocks with a 128-bit access (on AMD a load: a block that stores partial sums
    has none, but may store two of them at once). The masked one is the loops without any; on AMD, where masks
    become branches out of the loop, it is everything else, the partial sums' stores included.
    """
    lines = assembly.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := label.match(line))}
    block = 0
    block_of: list[int] = []
    loops: set[int] = set()
    for i, line in enumerate(lines):
        block += bool(label.match(line))
        block_of.append(block)
        if match := branch.search(line):
            if labels.get(match[1], i) < i:
                loops.update(range(labels[match[1]], i))
            block += 1
    found = [(i, key) for i, line in enumerate(lines) if (key := access(line))]
    everything = label is _GCN_LABEL
    kinds = ("load 128",) if everything else ("load 128", "store 128")
    wide = {block_of[i] for i, key in found if key in kinds}
    main = Counter(key for i, key in found if block_of[i] in wide)
    masked = Counter(key for i, key in found if block_of[i] not in wide and (everything or i in loops))
    return dict(sorted(main.items())), dict(sorted(masked.items()))


def _ptx_accesses(line: str) -> str:
    match = re.search(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.(v\d))?\.[bufs](\d+)\b", line)
    if not match:
        return ""
    return f"{'load' if match[1] == 'ld' else 'store'} {int(match[3]) * int((match[2] or 'v1')[1:])}"


def _gcn_accesses(line: str) -> str:
    match = re.search(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", line)
    return f"{match[1]} {_GCN_BITS[match[2].partition('_')[0]]}" if match else ""


def _cuda_resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    # On NVIDIA a spilled register lives in local memory, on the stack.
    spills = usage["STACK"] + usage["LOCAL"]
    return {"registers": usage["REG"], "stack_bytes": usage["STACK"], "spills": spills}


def _hip_resources(assembly: str) -> dict[str, int]:
    found = re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly)
    value = {key: int(number) for key, number in found}
    return {
        "registers": value["vgpr_count"],
        "stack_bytes": value["private_segment_fixed_size"],
        "spills": value["vgpr_spill_count"] + value["sgpr_spill_count"],
    }


# ---- command line ----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m oscopt.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--target", nargs="+", default=TARGETS, metavar="T", help="such as cuda:90, hip:gfx942"
    )
    names = [str(d).removeprefix("torch.") for d in triton_backend.DTYPES]
    parser.add_argument("--dtype", nargs="+", default=names, choices=names)
    variants = [*VARIANTS, CHUNK, REDUCE]
    parser.add_argument("--variant", nargs="+", default=variants, choices=variants)
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    options = parser.parse_args(arguments)
    reports = []
    try:
        for target in options.target:
            check_target(target)
        for target in options.target:
            for dtype in options.dtype:
                for variant in options.variant:
                    if variant == REDUCE and dtype != options.dtype[0]:
                        continue
                    reports.append(report(target, getattr(torch, dtype), variant))
                    if not options.json:
                        _print(reports[-1], header=len(reports) == 1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(r) for r in reports], indent=1))
    return 0


def _print(r: Report, header: bool) -> None:
    columns = "{:<11} {:<9} {:<37} {:>4} {:>5} {:>6} {:>6}  {:<28} {}"
    if header:
        head = ("target", "dtype", "variant", "regs", "stack", "spills", "shared", "main path", "masked path")
        print(columns.format(*head))

    def text(counts: dict[str, int]) -> str:
        return ", ".join(f"{n} {key}" for key, n in counts.items())

    row = (r.target, r.dtype, r.variant, r.registers, r.stack_bytes, r.spills, r.shared_bytes)
    print(columns.format(*row, text(r.main), text(r.masked)), flush=True)


def _leave(number: int, frame: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)  # an exception may be swallowed in the midst of a compiler's code


def script() -> int:
    """The exit code of :func:`main` as a process: one line for a signal, a closed pipe and a full disk."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        code = main()
        sys.stdout.flush()
        return code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter tells of it again at the end
        what = error.filename or "the output"
        print(f"error: {what} cannot be read or written ({error.strerror})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(script())
