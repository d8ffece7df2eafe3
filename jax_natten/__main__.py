"""``python -m jax_natten``: what was built and runs where (info), tiles and their expected speed, measuring, tuning."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

import jax_natten
from jax_natten import commands, dispatch, native, tiles, tuned_tiles
from jax_natten.commands import align

_DERIVATIVES = 'Tangents (jax.jvp) and derivatives of derivatives of fused attention run on "xla" everywhere.'
_PLATFORMS = ("cpu", "cuda", "tpu")
_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
# Columns of the table, and the operations that each of them stands for.
_COLUMNS = {
    "fused forward": ("fused_forward",),
    "fused backward": ("fused_backward",),
    "unfused": ("pn", "nn", "in"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_natten", description=jax_natten.__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subparsers.add_parser("info", help="versions, devices, what was built, and which implementation runs where")
    simulate = subparsers.add_parser(
        "simulate", help="tiles of the tensor-core kernels, the work they make and their expected speed; no GPU needed"
    )
    profile = subparsers.add_parser("profile", help="time and speed of a problem on the GPU at hand")
    tune = subparsers.add_parser(
        "tune", help="measure tiles of the tensor-core kernels on the GPU at hand, store the best"
    )
    for command in (simulate, profile, tune):
        commands.add_problem_arguments(command)
    for command in (simulate, profile):
        commands.add_tile_arguments(command)
    simulate.add_argument("--count", type=int, default=5, help="how many choices of tiles to show")
    simulate.add_argument(
        "--processors", type=int, help="sm90: multiprocessors of the GPU, by default those of an H100"
    )
    simulate.add_argument(
        "--implementation", choices=tuple(tiles.ATTRIBUTES), help="by default sm90, or what --tiles are for"
    )
    profile.add_argument("--implementation", help="as the argument of the functions; several with commas between them")
    tune.add_argument("--count", type=int, default=16, help="how many tiles to time, those that simulate shows first")
    tune.add_argument(
        "--implementation", choices=tuple(tiles.ATTRIBUTES), help="by default what a call runs on this GPU"
    )
    tune.add_argument("--again", action="store_true", help="measure also if the best tiles are stored already")
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        print(info())
        return 0
    try:
        return {"simulate": commands.simulate, "profile": commands.profile, "tune": commands.tune}[parsed.command](
            parsed
        )
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
        return 2


def info() -> str:
    """The text that the command ``info`` prints."""
    rows = [
        ("jax_natten", f"{jax_natten.__version__}, {Path(jax_natten.__file__).parent}"),
        ("jax", f"{jax.__version__}, jaxlib {jaxlib.__version__}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("devices", _devices()),
        ("CPU library", _library("cpu")),
        ("CUDA library", _library("cuda")),
        ("tuned tiles", _tuned_tiles()),
    ]
    table = [("platform", "dtype", *_COLUMNS)]
    for name in _PLATFORMS:
        for dtype in map(jnp.dtype, _DTYPES):
            table.append((name, dtype.name, *(_implementations(name, dtype, ops) for ops in _COLUMNS.values())))
    heading = "Implementations that apply, best first, for a 7x7 window and head dim 64:"
    return "\n".join([*align(rows), "", heading, *align(table), "", _DERIVATIVES])


def _devices() -> str:
    try:
        return ", ".join(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices())
    except RuntimeError as error:
        return f"none ({error})"


def _library(name: str) -> str:
    if getattr(native, name) is None:
        return "not built"
    try:
        build = importlib.import_module("jax_natten._build")
    except ModuleNotFoundError:
        return "built"
    if name == "cuda":
        return f"built with nvcc {build.cuda_compiler} for {build.cuda_archs}, XLA FFI {build.xla_ffi}"
    return f"built with {build.cxx_compiler}, XLA FFI {build.xla_ffi}"


def _tuned_tiles() -> str:
    count = len(list(tuned_tiles.directory().glob("tiles/*.json")))
    gpu = tuned_tiles.in_use()
    return f"{count} in {tuned_tiles.directory()}, {'not used' if gpu is None else f'those for {gpu} are used'}"


def _implementations(platform_name: str, dtype, operations: Iterable[str]) -> str:
    window = jax_natten.Neighborhood.make(7, rank=2)
    found = set()
    for operation in operations:
        problem = dispatch.Problem(operation, window, dtype, 4, 4, 64, 64, 0, False, 1, (32, 32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.add(", ".join(dispatch.candidates(problem, platform_name)))
    return " or ".join(sorted(found))


if __name__ == "__main__":
    sys.exit(main())
