"""Tiles that were measured to be fastest, kept on disk: whether they are used, and the files that hold them.

:mod:`jax_natten.tuning` measures and writes; :mod:`jax_natten.dispatch` looks up when a program is lowered.

A file holds one problem for one implementation, kind of GPU and version of the package. Its name is a hash of these,
and it repeats them, so that no other file is ever taken for it. It is written elsewhere and then moved to its name:
readers see all of it or nothing, and of several writers the last one stays. What cannot be read, or does not fit, is as
good as not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

import jax_natten
from jax_natten import tiles

if TYPE_CHECKING:
    from jax_natten.dispatch import Problem

# Environment variables: "1" enables the use of tuned tiles; where they are.
ENABLED_VARIABLE, DIRECTORY_VARIABLE = "JAX_NATTEN_TUNED_TILES", "JAX_NATTEN_CACHE_DIR"


@dataclasses.dataclass
class _Use:
    """Whose tiles are used."""

    decided: bool = False  # else the environment decides
    gpu: str | None = None  # as gpu_name() has it; None: none are


_use = _Use()


def enable(device: jax.Device | str | None = None) -> None:
    """Has programs that are lowered from now on use the tiles that :func:`tune` found, where it has been run.

    A lookup happens when a program is lowered, for the shapes of one device. What is found travels in the program, as
    if asked for by ``tiles=``, which has precedence. So the choice depends on nothing but the files at that moment:
    compiled programs, also those in JAX's caches, keep theirs; call ``jax.clear_caches()`` to have them compiled anew.
    Where several processes run one program, all of them must see the same files.

    The environment variable ``JAX_NATTEN_TUNED_TILES=1`` does the same from the start.

    Args:
      device: the GPU whose tiles to use, or its name as :func:`gpu_name` has it; by default the first one of this
        process. Programs are lowered with the tiles of this one, wherever they will run.

    Raises:
      TypeError: not a device, a string or None.
      ValueError: the device is no GPU.
      RuntimeError: no device is given, and there is no GPU.
    """
    _use.gpu = device if isinstance(device, str) else gpu_name(find_gpu(device))
    _use.decided = True


def disable() -> None:
    """Undoes :func:`enable`: implementations choose their tiles themselves, as they do by default."""
    _use.gpu, _use.decided = None, True


def in_use() -> str | None:
    """The name of the GPU whose tiles are used, or None.

    Raises:
      ValueError: the environment variable is neither 0 nor 1.
    """
    if not _use.decided:
        value = os.environ.get(ENABLED_VARIABLE, "0")
        if value not in ("", "0", "1"):
            raise ValueError(f"{ENABLED_VARIABLE} must be 0 or 1; got {value!r}")
        gpus = local_gpus() if value == "1" else []
        _use.gpu, _use.decided = (gpu_name(gpus[0]) if gpus else None), True
    return _use.gpu


def local_gpus() -> list[jax.Device]:
    """The GPUs of this process."""
    return [device for device in jax.local_devices() if device.platform == "gpu"]


def find_gpu(device: jax.Device | None) -> jax.Device:
    """The device, or the first GPU of this process.

    Raises:
      TypeError, ValueError, RuntimeError: see :func:`enable`.
    """
    if device is not None:
        if not isinstance(device, jax.Device):
            raise TypeError(f"device must be a jax.Device, its name or None; got {device!r}")
        if device.platform != "gpu":
            raise ValueError(f"device must be a GPU; got {device}")
        return device
    gpus = local_gpus()
    if not gpus:
        raise RuntimeError(f"tuned tiles are those of a GPU; jax has none here: {', '.join(map(str, jax.devices()))}")
    return gpus[0]


def gpu_name(device: jax.Device) -> str:
    """The kind of a GPU, e.g. "NVIDIA H100 80GB HBM3, compute capability 9.0"."""
    return f"{device.device_kind}, compute capability {getattr(device, 'compute_capability', 'unknown')}"


def compute_capability(gpu: str) -> str:
    """E.g. "9.0", of a GPU whose name :func:`gpu_name` has made."""
    return gpu.rpartition(" ")[2]


def directory() -> Path:
    """Where the files are: ``JAX_NATTEN_CACHE_DIR``, or ``jax_natten`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_natten"


def lookup(problem: Problem, implementation: str) -> tiles.Tiles | None:
    """The tuned tiles of a problem for an implementation, if their use is enabled and it has some."""
    gpu = in_use()
    if gpu is None or 0 in (problem.batch, *problem.grid):  # empty, or not known before the program runs
        return None
    return read(problem, implementation, gpu)


def read(problem: Problem, implementation: str, gpu: str) -> tiles.Tiles | None:
    """The tiles that were stored for an implementation on a GPU. None, after a warning, if they cannot be used."""
    path = path_of(problem, implementation, gpu)
    try:
        content = json.loads(path.read_text())
        if content["key"] != _key(problem, implementation, gpu):
            raise ValueError("it is of another problem")
        found = tiles.Tiles(**content["tiles"])
        if found.implementation != implementation:
            raise ValueError(f"the tiles are for {found.implementation!r}")
        reason = tiles.why_not_tiles(problem, found)
        if reason is not None:
            raise ValueError(f"the tiles do not fit: {reason}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"tuned tiles in {path} are ignored: {error!r}", stacklevel=2)
        return None
    return found


def write(problem: Problem, gpu: str, best: tiles.Tiles, measured: list[dict]) -> Path:
    """Stores the best tiles of a problem on a GPU, and what was measured, which nothing reads. Returns the file."""
    path = path_of(problem, best.implementation, gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"key": _key(problem, best.implementation, gpu), "tiles": dataclasses.asdict(best), "measured": measured}
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def path_of(problem: Problem, implementation: str, gpu: str) -> Path:
    """The file of a problem for an implementation on a GPU, whether it is there or not."""
    text = json.dumps(_key(problem, implementation, gpu), sort_keys=True)
    return directory() / "tiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _key(problem: Problem, implementation: str, gpu: str) -> dict:
    """All that a choice depends on, as JSON has it."""
    fields = dataclasses.asdict(problem) | {"dtype": np.dtype(problem.dtype).name}
    version = jax_natten.__version__
    key = {"gpu": gpu, "implementation": implementation, "jax_natten": version, "problem": fields}
    return json.loads(json.dumps(key))
