"""Loads the compiled libraries and registers their custom-call targets with XLA.

Importing needs neither a GPU nor a driver: XLA looks a target up when it runs a program that calls it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import jax
import jax.export

# The custom-call targets, the same names on every platform. Names and attributes are a wire format: exported programs
# hold them, so their meaning never changes.
TARGETS = (
    "jax_natten_fused_forward",
    "jax_natten_fused_backward",
    "jax_natten_pn",
    "jax_natten_nn",
    "jax_natten_in",
)

# What ``jax.export.export(..., disabled_checks=EXPORT_DISABLED_CHECKS)`` must be told to write calls of these targets.
EXPORT_DISABLED_CHECKS = tuple(jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS)


def _load(name: str, platform: str) -> ModuleType | None:
    try:
        library = importlib.import_module(f"jax_natten.{name}")
    except ModuleNotFoundError:
        return None  # not built
    for target, capsule in library.handlers().items():
        jax.ffi.register_ffi_target(target, capsule, platform=platform)
    return library


cpu = _load("_cpu", "cpu")
# XLA's spelling of this platform is upper case; the lower-case one is silently never looked up.
cuda = _load("_cuda", "CUDA")
# Either library tells which cases and tiles the tensor-core kernels take, and what they cost.
model = cpu or cuda
