"""What the benchmarks compare with is the same attention."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from problems import LARGE, SMALL, problem

SHAPES = [
    problem("line", 2, 2, 2, 8, [30], [7]),
    problem("plane", 1, 2, 2, 8, [6, 9], [3, 4], [1, 2], [2, 1], [True, False]),
    problem("volume", 1, 1, 1, 4, [3, 6, 7], [3, 3, 5], [1, 3, 1]),
]


@pytest.mark.parametrize("way", ["dense_mask", "gather"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: p.name)
def test_alternative_is_the_same_attention(benchmark, shape, way):
    report, stock = benchmark("report"), benchmark("stock")
    arrays = report.draw(shape, jnp.float32, seed=3)
    out = getattr(stock, way)(shape)(*arrays[:3])
    assert report.error(shape, arrays, out) < 1e-6


def test_what_applies_to_a_problem(benchmark):
    stock = benchmark("stock")
    assert set(stock.alternatives(SMALL["nat_56"])) == {"dense mask", "cuDNN mask", "gather"}
    assert set(stock.alternatives(LARGE["flux_s1"])) == {"cuDNN mask"}  # of 10^11 scores
    assert set(stock.alternatives(LARGE["seq32k_w2048_causal"])) == {"cuDNN mask", "cuDNN window"}
    assert set(stock.alternatives(LARGE["dense16k_d128"])) == {"cuDNN"}
