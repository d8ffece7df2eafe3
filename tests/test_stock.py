"""What the benchmarks compare with is the same attention."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from problems import LARGE, SMALL, problem

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

SHAPES = [
    problem("line", 2, 2, 2, 8, [30], [7]),
    problem("plane", 1, 2, 2, 8, [6, 9], [3, 4], [1, 2], [2, 1], [True, False]),
    problem("volume", 1, 1, 1, 4, [3, 6, 7], [3, 3, 5], [1, 3, 1]),
]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import report
    import stock

    yield report, stock
    for name in {"report", "stock"} - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("way", ["dense_mask", "gather"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: p.name)
def test_alternative_is_the_same_attention(benchmarks, shape, way):
    report, stock = benchmarks
    arrays = report.draw(shape, jnp.float32, seed=3)
    out = getattr(stock, way)(shape)(*arrays[:3])
    assert report.error(shape, arrays, out) < 1e-6


def test_what_applies_to_a_problem(benchmarks):
    _, stock = benchmarks
    assert set(stock.alternatives(SMALL["nat_56"])) == {"dense mask", "cuDNN mask", "gather"}
    assert set(stock.alternatives(LARGE["flux_s1"])) == {"cuDNN mask"}  # of 10^11 scores
    assert set(stock.alternatives(LARGE["seq32k_w2048_causal"])) == {"cuDNN mask", "cuDNN window"}
    assert set(stock.alternatives(LARGE["dense16k_d128"])) == {"cuDNN"}
