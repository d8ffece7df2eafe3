"""The problems of benchmarks/sweep.py: products of grids, windows, dilations and head dims, over 60 for each rank.

Batches are such that unfused attention by direct kernels takes between 0.2 and 10 ms on an H100, and every array fits.
"""

from __future__ import annotations

import dataclasses
import math

from report import problems

# Grids, windows, and the largest dilation, by rank. Each grid meets each window without dilation, and with the largest
# power of two that fits along each axis.
SHAPES = {
    1: ([(512,), (2048,), (8192,), (32768,)], [(15,), (63,), (127,), (255,)], 8),
    2: ([(28, 28), (56, 56), (64, 96), (128, 128)], [(3, 3), (7, 7), (13, 13), (25, 25)], 8),
    3: ([(8, 16, 16), (16, 28, 28), (12, 48, 48), (14, 45, 90)], [(3, 3, 3), (3, 7, 7), (5, 7, 7), (7, 7, 7)], 4),
}
DIMS = ((32, 64), (64, 128), (32, 128))  # in turns
CHANNELS = (128, 256, 512)  # of all heads, in turns
WORK = 4 * 10**9  # pairs in windows times channels of a problem, about: so much keeps a GPU busy
MOST_WORK = 8 * 10**9
MOST_ELEMENTS, MOST_WEIGHTS = 2**26, 2**30  # of an array, of unfused attention's weights


def sweep(rank: int, work: int = WORK) -> list[problems.Problem]:
    """Every problem of a rank; ``work``: how large their batches make them, if one batch element is smaller."""
    grids, windows, most = SHAPES[rank]
    found = []
    for grid in grids:
        for window in windows:
            widest = tuple(largest_dilation(x, k, most) for x, k in zip(grid, window))
            for dilation in dict.fromkeys(((1,) * rank, widest)):
                for dim in DIMS[len(found) // 2 % len(DIMS)]:
                    found.append(sized(grid, window, dilation, dim, CHANNELS[len(found) % len(CHANNELS)], work))
    return found


def largest_dilation(length: int, window: int, most: int) -> int:
    dilation = most
    while dilation * window > length:
        dilation //= 2
    return dilation


def sized(grid, window, dilation, dim: int, channels: int, work: int) -> problems.Problem:
    positions, slots = math.prod(grid), math.prod(window)
    heads = max(channels // dim, 1)
    while heads > 1 and positions * slots * heads * dim > MOST_WORK:
        heads //= 2
    batch = 1
    while (
        2 * batch * positions * heads * dim * slots <= work
        and 2 * batch * positions * heads * dim <= MOST_ELEMENTS
        and 2 * batch * positions * heads * slots <= MOST_WEIGHTS
    ):
        batch *= 2
    text = {"": grid, "k": window, "d": dilation, "b": (batch,), "h": (heads,), "D": (dim,)}
    name = " ".join(letter + "x".join(map(str, sizes)) for letter, sizes in text.items())
    return problems.problem(name, batch, heads, heads, dim, grid, window, 1, dilation)


def named(group: str, rank: int) -> list[problems.Problem]:
    """Those of a group of the table of named problems that have a rank."""
    table = {"unfused": problems.UNFUSED, "small": problems.SMALL}[group]
    return [problem for problem in table.values() if problem.rank == rank]


def shrunk(problem: problems.Problem, work: int) -> problems.Problem:
    """The problem with a batch of one if more than ``work`` were to be done."""
    one = problem.positions * math.prod(problem.kernel_size) * problem.heads * problem.dim
    return problem if one * problem.batch <= work else dataclasses.replace(problem, batch=1)
