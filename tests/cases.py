"""The cases of the fused and unfused suites: every hard problem with every combination of causal axes.

Everything else that a call may be given (dtype, bias, additional keys, value channels, scale) is spread over them, by a
hash of the problem's name, so that each is met with many windows; ``test_fused.py`` asserts that none is left out.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from checks import DTYPES, Case
from problems import EDGE, HARD, HARD_SMALL, Problem

SCALES = (None, None, 0.3, -0.5, 0.0)


def with_features(problem: Problem) -> Case:
    rng = np.random.default_rng(zlib.crc32(problem.name.encode()))
    dim = problem.dim
    return Case(
        problem,
        dtype=DTYPES[rng.integers(4)],
        value_dim=(None, None, 1, dim + 3, max(1, dim // 2))[rng.integers(5)],
        additional=(0, 0, 1, 5, 17)[rng.integers(5)],
        bias=not any(problem.is_causal) and bool(rng.integers(3)),
        scale=SCALES[rng.integers(len(SCALES))],
    )


def every_causal(table: dict[str, Problem]) -> list[Case]:
    return [with_features(causal) for problem in table.values() for causal in problem.every_causal()]


HARD_CASES = every_causal(HARD_SMALL)
EDGE_CASES = every_causal(EDGE)

# The problems at their published size, for devices that are fast enough.
FULL_SIZE_CASES = every_causal(HARD)


def with_dtypes(case: Case) -> list[Case]:
    return [dataclasses.replace(case, dtype=dtype) for dtype in DTYPES]
