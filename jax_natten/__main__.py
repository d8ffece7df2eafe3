"""``python -m jax_natten info``: versions, devices, what was built, and which implementation runs where."""

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
from jax_natten import dispatch, native

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
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, what was built, and which implementation runs where")
    parser.parse_args(arguments)
    print(info())
    return 0


def info() -> str:
    """The text that the command ``info`` prints."""
    rows = [
        ("jax_natten", f"{jax_natten.__version__}, {Path(jax_natten.__file__).parent}"),
        ("jax", f"{jax.__version__}, jaxlib {jaxlib.__version__}"),
        ("python", f"{platform.python_version()}, {sys.executable}"),
        ("devices", _devices()),
        ("CPU library", _library("cpu")),
        ("CUDA library", _library("cuda")),
    ]
    table = [("platform", "dtype", *_COLUMNS)]
    for name in _PLATFORMS:
        for dtype in map(jnp.dtype, _DTYPES):
            table.append((name, dtype.name, *(_implementations(name, dtype, ops) for ops in _COLUMNS.values())))
    return "\n".join(
        [
            *_align(rows),
            "",
            "Implementations that apply, best first, for a 7x7 window and head dim 64:",
            *_align(table),
            "",
            _DERIVATIVES,
        ]
    )


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


def _implementations(platform_name: str, dtype, operations: Iterable[str]) -> str:
    window = jax_natten.Neighborhood.make(7, rank=2)
    found = set()
    for operation in operations:
        problem = dispatch.Problem(operation, window, dtype, 4, 4, 64, 64, 0, False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.add(", ".join(dispatch.candidates(problem, platform_name)))
    return " or ".join(sorted(found))


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
