"""Which implementation takes a case, and why one does not.

An implementation is a set of kernels behind the same primitives:

========  =========  ===============================================================================
name      platforms  what it is
========  =========  ===============================================================================
"sm90"    CUDA       tensor-core kernels for Hopper: the fused operations in float16 and bfloat16
"sm80"    CUDA       tensor-core kernels for compute capability 8.0 and later: every operation in
                     float16, bfloat16 and float32, head dims up to 256
"naive"   CUDA       direct CUDA kernels, one query at a time; takes every case
"cpu"     CPU        multi-threaded, vectorised C++; takes every case
"xla"     any        pure JAX, blocked so that memory is bounded; takes every case
========  =========  ===============================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence

import numpy as np

from jax_natten import native, tiles, tuned_tiles
from jax_natten.neighborhood import Neighborhood

# Every name of the interface.
IMPLEMENTATIONS = ("sm90", "sm80", "naive", "cpu", "xla")

# In order of preference; the last one of each platform takes everything.
_PREFERENCE = {"cuda": ("sm90", "sm80", "naive", "xla"), "cpu": ("cpu", "xla")}
_PLATFORM = {"sm90": "cuda", "sm80": "cuda", "naive": "cuda", "cpu": "cpu"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel needs to know to tell whether it takes a case."""

    operation: str  # "fused_forward", "fused_backward", "pn", "nn" or "in"
    neighborhood: Neighborhood
    dtype: np.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    additional_keys: int
    has_bias: bool
    # Of the fused operations only; no other kernel has limits that depend on them.
    batch: int = 0
    grid: tuple[int, ...] = ()


def parse(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Checks the ``implementation`` argument of a public function; None stays None.

    Raises:
      TypeError: not a string, a sequence of strings or None.
      ValueError: an unknown name, or an empty sequence.
    """
    if implementation is None:
        return None
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"implementation must be None, a name or a sequence of names; got {implementation!r}")
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(f"implementation must be among {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    return tuple(names)


def why_not(name: str, problem: Problem) -> str | None:
    """The limit that keeps implementation ``name`` from taking this problem on its own platform, or None."""
    if name == "sm90" and problem.operation not in ("fused_forward", "fused_backward"):
        return f"{name!r} has no kernel for {problem.operation} yet"
    if name in ("sm90", "sm80"):
        reason = tiles.why_not(name, problem)
        return reason and f"{name!r} {reason}"
    return None


def check(problem: Problem, requested: tuple[str, ...] | None) -> None:
    """Raises NotImplementedError at trace time if no requested implementation could take the problem anywhere."""
    if requested is None:
        return
    reasons = [why_not(name, problem) for name in requested]
    if all(reasons):
        raise NotImplementedError(
            f"no implementation among {requested} takes this case: {'; '.join(map(str, reasons))}"
        )


def check_tiles(problem: Problem, requested: tuple[str, ...] | None, asked: tiles.Tiles | None) -> None:
    """Raises if tiles are asked for, but not the implementation that they are for, or if they do not fit the problem.

    Raises:
      TypeError: not :class:`jax_natten.tiles.Tiles`.
      NotImplementedError: the implementation that they are for is not requested.
      ValueError: they do not fit; says why.
    """
    if asked is None:
        return
    if not isinstance(asked, tiles.Tiles):
        raise TypeError(f"tiles must be None or jax_natten.Tiles; got {asked!r}")
    if asked.implementation not in (requested or _defaults("cuda")):
        raise NotImplementedError(
            f"tiles of structure {asked.structure} are for implementation {asked.implementation!r}; "
            f"got implementation={requested!r}"
        )
    reason = tiles.why_not_tiles(problem, asked)
    if reason is not None:
        raise ValueError(f"{asked} do not fit this case: {reason}")


def own_tiles(problem: Problem, name: str, asked: tiles.Tiles | None) -> tiles.Tiles | None:
    """The tiles that implementation ``name`` obeys; None: those of its own choice.

    They are those that the caller asks for, if they are for this implementation, or else those of
    :mod:`jax_natten.tuned_tiles`, if their use is enabled.
    """
    if problem.operation != "fused_forward" or name not in tiles.ATTRIBUTES:
        return None
    return asked if asked is not None and asked.implementation == name else tuned_tiles.lookup(problem, name)


def tile_attributes(problem: Problem, names: Sequence[str], asked: tiles.Tiles | None) -> dict[str, np.ndarray]:
    """The custom-call attributes that tell implementations their tiles, one for each that has some."""
    attributes = {}
    for name in names:
        own = own_tiles(problem, name, asked)
        if own is not None:
            check_tiles(problem, (name,), own)  # again, for the shapes of one device
            attributes[tiles.ATTRIBUTES[name]] = np.asarray(own.fields(), np.int64)
    return attributes


def _defaults(platform: str) -> tuple[str, ...]:
    return _PREFERENCE.get(platform, ("xla",))


def candidates(problem: Problem, platform: str, requested: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Names of the implementations that take a problem on a platform, best first.

    Args:
      problem: the case.
      platform: "cpu", "cuda", or any other platform of JAX ("tpu", ...), where only "xla" runs.
      requested: as returned by :func:`parse`; None picks every one that applies.

    Raises:
      NotImplementedError: none of the requested ones applies; says which limit each of them hit.
    """
    names = requested or _defaults(platform)
    reasons = {name: _why_not_here(name, problem, platform) for name in names}
    able = tuple(name for name in names if reasons[name] is None)
    if not able:
        raise NotImplementedError(
            f"no implementation among {names} takes this case on platform {platform!r}: "
            + "; ".join(map(str, reasons.values()))
        )
    if requested is None and platform in ("cpu", "cuda") and able == ("xla",):
        _warn_slow(platform)
    return able


def _why_not_here(name: str, problem: Problem, platform: str) -> str | None:
    if name == "xla":
        return None
    if _PLATFORM[name] != platform:
        return f"{name!r} runs on platform {_PLATFORM[name]!r} only"
    if getattr(native, platform) is None:
        return f"{name!r} needs the library jax_natten._{platform}, which was not built"
    return why_not(name, problem)


@functools.cache
def _warn_slow(platform: str) -> None:
    warnings.warn(
        f"jax_natten was installed without its {platform.upper()} kernels: using the slower 'xla' implementation. "
        "See `python -m jax_natten info`.",
        stacklevel=2,
    )
