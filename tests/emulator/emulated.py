"""A pytest plugin that runs the GPU suite without a GPU: ``pytest -p emulated tests/gpu``.

The CUDA custom calls take the place of those of the CPU, and the emulator runs their kernels. To be imported before
jax_natten; needs ``_emulated`` (``make _emulated``) and this directory on the path.
"""

from __future__ import annotations

import os
import secrets
import sys

import _emulated

sys.modules["jax_natten._cpu"] = _emulated
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_NATTEN_TEST_SEED", str(secrets.randbelow(2**31)))

from jax_natten import dispatch, native  # noqa: E402

_emulated.configure(seed=int(os.environ["JAX_NATTEN_TEST_SEED"]))
native.cuda = _emulated
dispatch._PREFERENCE["cpu"] = dispatch._PREFERENCE["cuda"]
for _name in dispatch._PLATFORM:
    dispatch._PLATFORM[_name] = "cpu"
