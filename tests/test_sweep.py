"""benchmarks/sweep.py: it runs, on the CPU in small, it finds wrong results, and it sweeps over what it promises."""

from __future__ import annotations

import csv
import math

import pytest

SMALL = {"--limit": "1", "--work": "1", "--calls": "1", "--repeats": "1", "--threads": "2"}
MINI = ["--baseline", "cpu", "--implementations", "sm80", *(text for option in SMALL.items() for text in option)]


def test_every_cell_of_the_table(benchmark, tmp_path, capsys):
    path = tmp_path / "results" / "sweep.csv"
    options = ["--ranks", "1", "--groups", "sweep", "--directions", "forward", "forward+backward", "--csv", str(path)]
    assert benchmark("sweep").main([*MINI, *options]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["dtype"], row["direction"], row["wrong"]) for row in rows] == [
        (dtype, direction, "") for direction in ("forward", "forward+backward") for dtype in ("float32", "float16")
    ]
    for row in rows:
        for column in ("unfused cpu", "fused cpu"):
            assert 0 < float(row[f"{column} error"]) < 1e-2
            # On a busy machine one chain may take longer than two.
            assert row[f"{column} ms"] == "too short" or float(row[f"{column} ms"]) > 0
        assert row["fused sm80 ms"] == "-"  # not on this platform
    printed = capsys.readouterr().out
    assert "average %" in printed and f"Wrote 4 rows to {path}" in printed


def test_a_column_out_of_tolerance_fails_the_run(benchmark, tmp_path, capsys):
    sweep = benchmark("sweep")
    sweep.TOLERANCES["float16"] = (1e-9, 1e-9)
    options = ["--ranks", "2", "--groups", "unfused", "--dtypes", "float16", "--csv", str(tmp_path / "sweep.csv")]
    assert sweep.main([*MINI, *options]) == 1
    assert "WRONG: plane_k7, float16, forward: unfused cpu; fused cpu" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_there_are_enough_problems_and_they_fit(benchmark, rank):
    module = benchmark("sweep_problems")
    found = module.sweep(rank)
    assert len({problem.name for problem in found}) == len(found) >= 60
    for problem in found:
        elements = problem.batch * problem.positions * problem.heads * problem.dim
        weights = problem.batch * problem.positions * problem.heads * math.prod(problem.kernel_size)
        assert elements <= 2**27 and weights <= module.MOST_WEIGHTS
        assert 1e8 < weights * problem.dim <= module.MOST_WORK
        assert all(k * d <= x for k, d, x in zip(problem.kernel_size, problem.dilation, problem.grid))
    assert {problem.dim for problem in found} == {32, 64, 128}
