"""Runs CUDA kernels once each on ragged problems: a short program for ``compute-sanitizer``.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py [naive] [sm80] [sm90]

Without names the direct kernels and those of sm_80 run, and on a Hopper GPU its own as well.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_NATTEN_TEST_SEED", "0")
# The pool would hide an access past the end of a buffer, and a captured graph the kernel that made it. XLA's own
# products need no tuning, which takes minutes under the sanitizer.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from checks import Case, draw, expected_unfused, jitted_fused, jitted_unfused
from problems import problem

import jax_natten
from jax_natten import Tiles

CASES = (
    Case(problem("1d", 2, 4, 2, 9, [23], [5], [2], [3]), "float16", value_dim=7, additional=3, bias=True),
    Case(problem("2d", 1, 2, 1, 64, [9, 11], [4, 3], [3, 1], [2, 3]), "bfloat16", additional=2, bias=True),
    Case(problem("2d_causal", 1, 2, 2, 32, [9, 11], [4, 3], [3, 1], [2, 3], [True, False]), "float32"),
    Case(problem("3d", 1, 2, 1, 40, [5, 7, 6], [2, 3, 3], [1, 2, 1], [2, 1, 1]), "float64", value_dim=12, bias=True),
    Case(problem("wide", 1, 1, 1, 520, [9], [3]), "float32", value_dim=1030),
)

# The tile kernels and those of small windows, in each rank and dtype; head dimensions padded, and large enough for
# warps of 32 rows and for columns in chunks.
SM80_CASES = (
    Case(problem("sm80_1d", 2, 4, 2, 9, [153], [45], [2], [3]), "float16", value_dim=7, additional=3, bias=True),
    Case(problem("sm80_2d", 1, 2, 1, 128, [37, 41], [21, 18], [3, 1]), "bfloat16", additional=70),
    Case(problem("sm80_2d_bias", 1, 2, 1, 128, [26, 29], [21, 18]), "bfloat16", bias=True),
    Case(problem("sm80_2d_causal", 1, 2, 2, 32, [29, 31], [14, 13], [3, 1], [2, 1], [True, False]), "float32"),
    Case(problem("sm80_3d", 1, 2, 1, 200, [7, 11, 12], [4, 6, 5], [1, 2, 1]), "bfloat16", value_dim=252),
    Case(problem("sm80_3d_wide", 1, 2, 1, 72, [7, 11, 12], [4, 6, 5], [1, 2, 1]), "float32", additional=5),
    Case(problem("sm80_small_1d", 2, 2, 1, 64, [300], [63]), "float16"),
    Case(problem("sm80_small_2d", 2, 4, 2, 32, [20, 18], [7, 7]), "float16", bias=True),
    Case(problem("sm80_small_dilated", 1, 2, 2, 24, [23, 30], [5, 7], [1, 3], [2, 1]), "bfloat16", value_dim=17),
    Case(problem("sm80_small_3d", 1, 2, 1, 24, [6, 11, 14], [3, 5, 7]), "bfloat16", value_dim=32),
)


# Each structure of the forward in each rank, and the backward; ragged dilation groups, padded head dims, padded key
# tiles, fewer key heads.
HOPPER_CASES = (
    (problem("wide_1d", 2, 4, 2, 128, [301], [77], [3], [2], [True]), Tiles("wide", (128,), (64,), (128,))),
    (problem("wide_2d", 1, 2, 1, 40, [37, 41], [13, 11], [1, 4], [2, 1]), Tiles("wide", (8, 16), (8, 8), (8, 15))),
    (
        problem("wide_3d", 1, 2, 2, 256, [9, 11, 13], [5, 4, 7], [1, 2, 1]),
        Tiles("wide", (4, 4, 8), (4, 4, 4), (4, 4, 4)),
    ),
    (problem("warp_1d", 2, 2, 2, 64, [301], [27], [1], [2]), Tiles("warp", (64,), (16,), (90,), 1, 2, 3)),
    (problem("warp_2d", 1, 4, 2, 32, [29, 31], [7, 7], [1, 1], [2, 3]), Tiles("warp", (8, 8), (4, 4), (14, 11))),
    (problem("warp_sliced", 1, 2, 2, 64, [29, 31], [7, 7], [2, 1]), Tiles("warp", (8, 8), (4, 4), (5, 14))),
    (problem("warp_pair", 1, 4, 4, 32, [15, 21], [7, 7], [1, 1], [2, 3]), Tiles("warp", (8, 8), (4, 4), (8, 7), 2)),
    (
        problem("warp_3d", 1, 2, 1, 24, [7, 12, 13], [3, 5, 4], [1, 2, 1]),
        Tiles("warp", (2, 4, 8), (2, 2, 4), (1, 8, 12)),
    ),
    (problem("middle_1d", 2, 2, 1, 128, [301], [77], [3], [2], [True]), Tiles("middle", (64,), (64,), (80,))),
    (problem("middle_2d", 1, 2, 2, 64, [37, 41], [13, 11], [1, 4]), Tiles("middle", (8, 8), (8, 8), (5, 18))),
    (
        problem("middle_3d", 1, 2, 1, 40, [9, 11, 13], [5, 4, 7], [1, 2, 1]),
        Tiles("middle", (2, 4, 8), (2, 4, 8), (2, 4, 13)),
    ),
)


def main() -> None:
    names = sys.argv[1:] or ["naive", "sm80", *(["sm90"] if jax.devices()[0].compute_capability == "9.0" else [])]
    if "naive" in names:
        run(CASES, "naive")
    if "sm80" in names:
        run(SM80_CASES, "sm80")
    if "sm90" in names:
        run_sm90()


def run_sm90() -> None:
    for shape, tiles in HOPPER_CASES:
        for case in (Case(shape, "bfloat16"), Case(shape, "float16", scale=-0.5)):
            operands, cotangents = draw(case)
            attend = functools.partial(
                jax_natten.neighborhood_attention, **shape.window, scale=case.scale, implementation="sm90"
            )
            for asked in (tiles, None):
                jax.block_until_ready(jax.jit(functools.partial(attend, tiles=asked))(**operands))
            jax.block_until_ready(jitted_fused(case, "sm90")(operands, cotangents))  # the backward, too
            print(case.name, flush=True)
        extended = Case(shape, "bfloat16", additional=70, bias=not any(shape.is_causal))
        jax.block_until_ready(jitted_fused(extended, "sm90")(*draw(extended)))
        print(extended.name, flush=True)


def run(cases, implementation: str) -> None:
    for case in cases:
        operands, cotangents = draw(case)
        jax.block_until_ready(jitted_fused(case, implementation)(operands, cotangents))
        more, weights, *_ = expected_unfused(case)
        jax.block_until_ready(jitted_unfused(case, implementation)(more, *weights))
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
