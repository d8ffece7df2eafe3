"""What the benchmarks share: operands, timing, a check against float64, tables and CSV files."""

from __future__ import annotations

import csv
import datetime
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib
import numpy as np

import jax_natten

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / "tests"))

import problems  # noqa: E402  (the table of problems that tests and benchmarks share)


def neighborhood(problem: problems.Problem) -> jax_natten.Neighborhood:
    return jax_natten.Neighborhood.make(**problem.window, rank=problem.rank)


def draw(problem: problems.Problem, dtype, seed: int) -> list[jax.Array]:
    """query, key, value and the cotangent of the output, standard normal."""
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    return [
        jax.random.normal(key, (problem.batch, *problem.grid, h, problem.dim), dtype) for key, h in zip(keys, heads)
    ]


def ours(problem, implementation: str | tuple[str, ...]) -> Callable:
    return lambda q, k, v: jax_natten.neighborhood_attention(q, k, v, **problem.window, implementation=implementation)


def with_gradients(attention: Callable) -> Callable:
    """``(q, k, v, d_out) -> (out, dq, dk, dv)``."""

    def run(q, k, v, d_out):
        out, pullback = jax.vjp(attention, q, k, v)
        return (out, *pullback(d_out))

    return run


def cost(problem, dtype, *operations: str) -> tuple[int, int]:
    """Useful floating-point operations of the named operations of a problem, and the bytes that they must move."""
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    call = [jax.ShapeDtypeStruct((problem.batch, *problem.grid, h, problem.dim), dtype) for h in heads]
    flops, moved = (
        sum(count(*call, **problem.window, operation=operation) for operation in operations)
        for count in (jax_natten.flops, jax_natten.bytes_accessed)
    )
    return flops, moved


def interleaved(candidates: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate, measured in turns so that a disturbance meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def error(problem, arrays, out, count: int = 64) -> float:
    """Relative error of an output on some random queries, against float64."""
    rng = np.random.default_rng()
    exact, got = [], []
    for _ in range(count):
        batch, head, at = _random_row(problem, rng, problem.heads)
        window = np.ix_(*_keys_of(problem, at))
        kv_head = head // (problem.heads // problem.kv_heads)
        q, k, v = arrays[0][batch, *at, head], *(x[batch, ..., kv_head, :][window] for x in arrays[1:3])
        q, k, v = (np.asarray(x, np.float64).reshape(-1, problem.dim) for x in (q, k, v))
        scores = (k @ q[0]) * problem.dim**-0.5
        weights = np.exp(scores - scores.max())
        exact.append(weights / weights.sum() @ v)
        got.append(np.asarray(out[batch, *at, head], np.float64))
    return float(np.linalg.norm(np.subtract(got, exact)) / np.linalg.norm(exact))


def unfused_error(operation: str, problem, arrays, out, count: int = 32) -> float:
    """The same for "PN" (query, key), "NN" (weights, value) and "IN" (weights, d_out). Neither causal axes nor GQA."""
    rng = np.random.default_rng()
    exact, got = [], []
    for _ in range(count):
        batch, head, at = _random_row(problem, rng, problem.heads)
        rows = arrays[1][batch, ..., head, :]
        if operation == "IN":
            queries = list(itertools.product(*_queries_of(problem, at)))
            slots = [np.ravel_multi_index(_slot(problem, x, at), problem.kernel_size) for x in queries]
            where = tuple(np.transpose(queries))
            weights = arrays[0][batch, ..., head, :][*where, np.asarray(slots)]
            rows = rows[where]
        else:
            weights = arrays[0][batch, *at, head]
            rows = rows[np.ix_(*_keys_of(problem, at))].reshape(-1, problem.dim)
        weights, rows = np.asarray(weights, np.float64), np.asarray(rows, np.float64)
        exact.append(rows @ weights if operation == "PN" else weights @ rows)
        got.append(np.asarray(out[batch, *at, head], np.float64))
    return float(np.linalg.norm(np.subtract(got, exact)) / np.linalg.norm(exact))


def _random_row(problem, rng, heads: int) -> tuple[int, int, list[int]]:
    at = [int(rng.integers(n)) for n in problem.grid]
    return int(rng.integers(problem.batch)), int(rng.integers(heads)), at


def _keys_of(problem, at) -> list[np.ndarray]:
    """Positions along each axis of the keys that the query at ``at`` sees."""
    positions = []
    for x, axis in zip(at, neighborhood(problem).axes(problem.grid)):
        group, index = x % axis.dilation, x // axis.dilation
        begin, end = axis.window_of_query(index, axis.group_length(group))
        positions.append(group + axis.dilation * np.arange(begin, end))
    return positions


def _queries_of(problem, at) -> list[np.ndarray]:
    """Positions along each axis of the queries that see the key at ``at``."""
    positions = []
    for x, axis in zip(at, neighborhood(problem).axes(problem.grid)):
        group, index = x % axis.dilation, x // axis.dilation
        begin, end = axis.queries_of_key(index, axis.group_length(group))
        positions.append(group + axis.dilation * np.arange(begin, end))
    return positions


def _slot(problem, query, key) -> list[int]:
    """Slot along each axis of a key in the window of a query."""
    return [list(keys).index(y) for keys, y in zip(_keys_of(problem, query), key)]


def machine() -> dict[str, str]:
    """What the figures were measured with."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "device": _processor() if on_cpu else device.device_kind,
        **({} if on_cpu else {"driver": _driver()}),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax_natten": jax_natten.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def publish(rows: list[dict], path: Path) -> None:
    """Prints rows as a table and writes them, with the machine, as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([text(row.get(c, "-")) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    facts = machine()
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *facts])
        writer.writeheader()
        writer.writerows([{c: text(row.get(c, "-")) for c in columns} | facts for row in rows])


def text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
