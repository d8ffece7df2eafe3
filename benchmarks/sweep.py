"""The papers' table on this GPU: how much faster than unfused direct kernels are products of tiles, and fused kernels?

    python benchmarks/sweep.py [--ranks 1 2 3] [--dtypes float32 float16] [--directions forward] [--limit 10]

Over 60 problems of each rank (benchmarks/sweep_problems.py), and the groups "unfused" and "small" of tests/problems.py,
in this order of columns:

- unfused naive: `na*d_qk`, softmax (float32 inside, fused by XLA) and `na*d_av`, by direct kernels. This is what
  arXiv 2403.04690 compares with, and what every improvement here is over.
- unfused sm80: the same by products of tiles on tensor cores, which the paper calls GEMM.
- fused naive, fused sm80, and, on Hopper and in float16, fused sm90.

In float32 tensor cores multiply as --precisions says, by default "high", TensorFloat32, as the paper's kernels do when
not told otherwise (NATTEN's `kEnableGemmTF32`); direct kernels are exact. The softmax is XLA's in all unfused columns.

A time is that of one call in a jitted chain of calls, each fed by the one before: the difference between several runs
of the chain in a row and one run, so that what a run costs as such drops out. In the same process each column is
compared with direct float32 kernels on the same fresh random inputs (fused naive; that is compared with unfused naive),
as ||got - expected|| / ||expected||, the worst array; a column over the tolerance of its precision is named at the end,
and the exit status is 1. "of bandwidth" is what unfused attention must move (operands and results of `na*d_qk` and
`na*d_av` once, and the weights through the softmax once each way) over the time of unfused naive, as a fraction of the
device's.

Programs are compiled in threads, some problems at a time, and timed when all threads are at rest. Rows are written as
they come, problems of all ranks and dtypes in turns: what an interrupt or SIGTERM leaves is a table, of fewer problems.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import itertools
import math
import os
import secrets
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import report
import sweep_problems
from report import problems

import jax_natten
from jax_natten.commands import align

GROUPS = ("sweep", "unfused", "small")
DIRECTIONS = ("forward", "forward+backward")
# A chain should last about as long as CHAIN, in seconds, and several runs of it in a row longer by LONGER. How many
# calls that takes is guessed from operations per second.
CHAIN, LONGER, FEWEST_CALLS, MOST_CALLS, MOST_RUNS = 1e-3, 4e-3, 2, 16, 24
GUESSED_RATES = {"naive": 3e12, "cpu": 2e10, "xla": 1e10, "sm80": 3e13, "sm90": 1e14}
# By what products are rounded to, forward and with gradients.
TOLERANCES = {"float32": (2e-5, 1e-4), "tf32": (4e-3, 1e-2), "float16": (4e-3, 1e-2), "bfloat16": (3e-2, 6e-2)}
# Average improvements, in percent, on an A100 (arXiv 2403.04690), by rank, dtype and column.
PAPER = {
    (1, "float32", "unfused sm80"): 895,
    (2, "float32", "unfused sm80"): 272,
    (1, "float16", "unfused sm80"): 496,
    (2, "float16", "unfused sm80"): 113,
    (1, "float16", "fused sm80"): 1607,
    (2, "float16", "fused sm80"): 581,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    problem: problems.Problem
    group: str
    dtype: str
    precision: str  # of float32; "-" for other dtypes
    direction: str

    @property
    def arrays(self) -> list[jax.ShapeDtypeStruct]:
        """query, key, value, and for the backward the cotangent of the output, all of one shape here."""
        p = self.problem
        like = jax.ShapeDtypeStruct((p.batch, *p.grid, p.heads, p.dim), self.dtype)
        return [like] * (3 if self.direction == "forward" else 4)

    @property
    def weights(self) -> int:
        """How many unfused attention has."""
        p = self.problem
        return p.batch * p.positions * p.heads * math.prod(p.kernel_size)

    def attention(self, kind: str, implementation: str):
        options = self.problem.window | {"implementation": implementation}
        if self.precision != "-":
            options["precision"] = self.precision
        if kind == "fused":
            return lambda q, k, v: jax_natten.neighborhood_attention(q, k, v, **options)

        def unfused(q, k, v):
            scores = jax_natten.neighborhood_qk(q, k, **options).astype(jnp.float32)
            weights = jax.nn.softmax(scores * self.problem.dim**-0.5).astype(q.dtype)
            return jax_natten.neighborhood_av(weights, v, **options)

        return unfused

    def tolerance(self, implementation: str) -> float:
        exact = implementation in ("naive", "cpu") or self.precision == "highest"
        rounded = self.dtype if self.dtype != "float32" or exact else "tf32"
        return TOLERANCES[rounded][DIRECTIONS.index(self.direction)]


@dataclasses.dataclass
class Programs:
    """What is compiled of a case."""

    chains: dict[str, tuple]  # by column, with the number of calls
    errors: jax.stages.Compiled | None  # of the columns in the order of ``chains``
    notes: dict[str, str]  # by column, why there is no chain


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--groups", nargs="*", default=[*GROUPS], choices=GROUPS)
    parser.add_argument(
        "--dtypes", nargs="*", default=["float32", "float16"], choices=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--precisions", nargs="*", default=["high"], choices=["high", "highest"], help="of float32")
    parser.add_argument("--directions", nargs="*", default=["forward"], choices=DIRECTIONS)
    parser.add_argument("--baseline", default="naive", help="the implementation that others are compared with")
    parser.add_argument("--implementations", nargs="*", default=["sm80", "sm90"])
    parser.add_argument("--limit", type=int, help="problems per group and rank, spread over all of them")
    parser.add_argument(
        "--work", type=int, default=sweep_problems.WORK, help="pairs times channels of a problem, about"
    )
    parser.add_argument("--calls", type=int, help="in a chain, instead of a guess")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args(argv)
    device = jax.devices()[0]
    implementations = [arguments.baseline, *arguments.implementations]
    if getattr(device, "compute_capability", "9.0") != "9.0":
        implementations = [name for name in implementations if name != "sm90"]
    path = arguments.csv or report.ROOT / "results" / f"{device.device_kind.lower().replace(' ', '_')}_sweep.csv"
    rows = []
    with contextlib.suppress(KeyboardInterrupt), _terminated_as_interrupted():
        for row in measure(arguments, implementations, path):
            rows.append(row)
    summarise(rows, implementations)
    print(f"Wrote {len(rows)} rows to {path}")
    return 1 if any(row["wrong"] for row in rows) or not rows else 0


@contextlib.contextmanager
def _terminated_as_interrupted():
    """SIGTERM, as `timeout` sends it, raises KeyboardInterrupt. Only the main thread may say so."""

    def interrupt(*_):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cases(arguments) -> list[Case]:
    """All cases, those of all ranks, dtypes and groups in turns."""
    lists = []
    for direction, group, rank in itertools.product(arguments.directions, arguments.groups, arguments.ranks):
        if group == "sweep":
            chosen = sweep_problems.sweep(rank, arguments.work)
        else:
            chosen = [sweep_problems.shrunk(p, 5 * arguments.work) for p in sweep_problems.named(group, rank)]
        if arguments.limit is not None:
            chosen = chosen[:: max(1, math.ceil(len(chosen) / arguments.limit))] if arguments.limit else []
        for dtype in arguments.dtypes:
            for precision in arguments.precisions if dtype == "float32" else ["-"]:
                lists.append([Case(problem, group, dtype, precision, direction) for problem in chosen])
    # The n-th of each list stands at the same fraction of it, so that they end together.
    places = [((n + 0.5) / len(each), m, n) for m, each in enumerate(lists) for n in range(len(each))]
    return [lists[m][n] for _, m, n in sorted(places)]


def measure(arguments, implementations: list[str], path: Path) -> Iterator[dict]:
    """Rows, each written to the CSV file before it is yielded."""
    todo = cases(arguments)
    numbers = Numbers(todo)
    columns = [f"{kind} {name}" for kind in ("unfused", "fused") for name in implementations]
    facts = report.machine()
    batch = 2 * arguments.threads
    begin = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file, _pool(arguments.threads) as pool:
        writer = None
        for first in range(0, len(todo), batch):
            some = todo[first : first + batch]
            build = functools.partial(compiled, implementations=implementations, calls=arguments.calls)
            programs = list(pool.map(build, some))
            built = time.perf_counter() - begin
            for case, program in zip(some, programs):
                row = time_case(case, program, numbers.draw(case), columns, arguments.repeats)
                if writer is None:
                    writer = csv.DictWriter(file, [*row, *facts])
                    writer.writeheader()
                writer.writerow({name: report.text(value) for name, value in row.items()} | facts)
                file.flush()
                yield row
            print(f"{first + len(some)} of {len(todo)} cases, {built:.0f} s to compile the last {len(some)}, "
                  f"{time.perf_counter() - begin:.0f} s in all", flush=True)  # fmt: skip


@contextlib.contextmanager
def _pool(threads: int):
    """Threads that an interrupt does not wait for."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Numbers:
    """Standard normal numbers, drawn once for all cases: arrays begin anywhere in them."""

    def __init__(self, cases: list[Case]):
        most = max((math.prod(x.shape) for case in cases for x in case.arrays), default=0)
        rng = np.random.default_rng(secrets.randbits(64))
        self._rng = rng
        self._numbers = {"float32": rng.standard_normal(most + 2**16, np.float32)}

    def draw(self, case: Case) -> list[jax.Array]:
        if case.dtype not in self._numbers:
            self._numbers[case.dtype] = self._numbers["float32"].astype(jnp.dtype(case.dtype))
        numbers = self._numbers[case.dtype]
        arrays = []
        for like in case.arrays:
            size = math.prod(like.shape)
            start = int(self._rng.integers(numbers.size - size + 1))
            arrays.append(jax.device_put(numbers[start : start + size].reshape(like.shape)))
        return arrays


def compiled(case: Case, implementations: list[str], calls: int | None) -> Programs:
    """Compiles the chains of a case and its check. Runs in a thread."""
    programs = Programs({}, None, {})
    attentions = {}
    for kind, name in itertools.product(("unfused", "fused"), implementations):
        column = f"{kind} {name}"
        # Jitted, so that a chain traces it once.
        attention = jax.jit(case.attention(kind, name))
        count = calls or guess_calls(case, name)
        try:
            chain = jax.jit(functools.partial(run_chain, case.direction, attention, count))
            programs.chains[column] = (chain.lower(*case.arrays).compile(), count)
            attentions[column] = attention
        except NotImplementedError:
            pass  # no such kernel
        except jax.errors.JaxRuntimeError as failure:
            programs.notes[column] = _brief(failure)
    # No kernel is compared with itself.
    exactly = dataclasses.replace(case, dtype="float32", precision="highest")
    fused, unfused = (exactly.attention(kind, implementations[0]) for kind in ("fused", "unfused"))
    expected = dict.fromkeys(attentions, fused) | {f"fused {implementations[0]}": unfused}
    pairs = [(attention, expected[column]) for column, attention in attentions.items()]
    check = functools.partial(relative_errors, pairs)
    try:
        programs.errors = jax.jit(check).lower(*case.arrays).compile()
    except jax.errors.JaxRuntimeError as failure:
        programs.notes |= dict.fromkeys(attentions, _brief(failure))
    return programs


def _brief(failure: Exception) -> str:
    return str(failure).split(":")[0].lower()


def guess_calls(case: Case, implementation: str) -> int:
    operations = 4 * case.weights * case.problem.dim * (1 if case.direction == "forward" else 4)
    return min(max(round(CHAIN * GUESSED_RATES.get(implementation, 1e10) / operations), FEWEST_CALLS), MOST_CALLS)


def run_chain(direction: str, attention, calls: int, query, key, value, d_out=None):
    """Calls in a row. Takes and returns arrays."""
    step, query = (gpu.forward_chain if direction == "forward" else training_chain)(attention)(query, key, value, d_out)
    for _ in range(calls):
        query = step(query)
    return query


def training_chain(attention):
    """Forward and backward; each reads all that the one before computed, though the query stays as it is."""
    both = report.with_gradients(attention)
    return lambda q, k, v, d_out: ((lambda query: gpu.feed(query, *both(query, k, v, d_out))), q)


def relative_errors(pairs: list, *arrays) -> jax.Array:
    """For each function and what is to be expected of it, in float32: the worst relative error of its results."""

    def results(attention, arrays):
        return report.with_gradients(attention)(*arrays) if len(arrays) == 4 else [attention(*arrays)]

    def error(got, expected):
        return jnp.linalg.norm((got.astype(jnp.float32) - expected).ravel()) / jnp.linalg.norm(expected.ravel())

    exact_arrays = [x.astype(jnp.float32) for x in arrays]
    expected = {exact: results(exact, exact_arrays) for exact in {exact for _, exact in pairs}}
    errors = [list(map(error, results(attention, arrays), expected[exact])) for attention, exact in pairs]
    return jnp.stack([jnp.max(jnp.stack(each)) for each in errors])


def time_case(case: Case, programs: Programs, arrays, columns: list[str], repeats: int) -> dict:
    """The row of a case."""
    cells: dict[str, object] = dict(programs.notes)
    errors = {}
    runs = {}
    try:
        if programs.errors is not None:
            errors = dict(zip(programs.chains, np.asarray(programs.errors(*arrays), np.float64).tolist()))
    except jax.errors.JaxRuntimeError as failure:
        cells |= dict.fromkeys(programs.chains, _brief(failure))
    for column in errors:
        chain, calls = programs.chains[column]
        try:
            runs[column] = Runs(chain, arrays, calls)
        except jax.errors.JaxRuntimeError as failure:
            cells[column] = _brief(failure)
    candidates = {
        (column, many): functools.partial(run, 1 + many * run.more)
        for column, run in runs.items()
        for many in (False, True)
    }
    seconds = report.interleaved(candidates, repeats)
    for column, run in runs.items():
        time_of_call = (seconds[column, True] - seconds[column, False]) / (run.more * run.calls)
        cells[column] = time_of_call if time_of_call > 0 else "too short"
    return _row(case, cells, errors, columns)


class Runs:
    """A compiled chain, run several times in a row without waiting in between.

    Results are dropped before the next run, which so finds its buffers where they were: XLA runs programs as CUDA
    graphs, and would have to update them.
    """

    def __init__(self, chain, arrays, calls: int):
        self._chain, self._arrays, self.calls = chain, arrays, calls
        (seconds,) = report.interleaved({"": functools.partial(self, 1)}, 1).values()
        self.more = min(max(round(LONGER / seconds), 1), MOST_RUNS)  # runs of the longer measurement

    def __call__(self, runs: int) -> None:
        result = None
        for _ in range(runs):
            del result
            result = self._chain(*self._arrays)
        jax.block_until_ready(result)


def _row(case: Case, cells: dict, errors: dict, columns: list[str]) -> dict:
    p = case.problem
    row = {"problem": p.name, "group": case.group, "rank": p.rank, "direction": case.direction}
    row |= {"dtype": case.dtype, "precision": case.precision, "batch": p.batch, "heads": p.heads, "dim": p.dim}
    row |= {"grid": _by(p.grid), "kernel_size": _by(p.kernel_size), "dilation": _by(p.dilation)}
    times = {column: cells.get(column, "-") for column in columns}
    row |= {f"{column} ms": 1e3 * t if isinstance(t, float) else t for column, t in times.items()}
    naive = times[columns[0]]
    timed = isinstance(naive, float)
    for column in columns[1:]:
        row[f"{column} speed-up"] = naive / times[column] if timed and isinstance(times[column], float) else "-"
    moved = report.cost(p, jnp.dtype(case.dtype), "qk", "av")[1] + 2 * case.weights * jnp.dtype(case.dtype).itemsize
    flow = moved / naive if timed and case.direction == "forward" else math.nan
    bandwidth, _ = gpu.PEAKS.get(jax.devices()[0].device_kind, (math.nan, {}))
    row |= {f"{columns[0]} GB/s": flow / 1e9, "of bandwidth": flow / bandwidth}
    row |= {f"{column} error": errors.get(column, "-") for column in columns}
    # Not "error > tolerance", which a NaN is not either.
    wrong = [c for c, error in errors.items() if not error <= case.tolerance(c.split()[1])]
    return row | {"wrong": "; ".join(wrong)}


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def summarise(rows: list[dict], implementations: list[str]) -> None:
    """Prints a line for each direction, group, rank, dtype and column."""
    columns = [f"{kind} {name}" for kind in ("unfused", "fused") for name in implementations]
    keys = ("direction", "group", "rank", "dtype", "precision")
    lines = [
        [*keys, "column", "problems", "average %", "paper %", "geometric mean %", "least %", "wins", "of bandwidth"]
    ]
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        some = [row for row in rows if tuple(row[k] for k in keys) == key]
        flows = [row["of bandwidth"] for row in some if not math.isnan(row["of bandwidth"])]
        flow = f"{statistics.mean(flows):.1%}, at most {max(flows):.1%}" if flows else "-"
        timed = sum(isinstance(row[f"{columns[0]} ms"], float) for row in some)
        lines.append([*key, columns[0], f"{timed} of {len(some)}", *"-----", flow])
        for column in columns[1:]:
            ratios = [row[f"{column} speed-up"] for row in some if isinstance(row[f"{column} speed-up"], float)]
            if ratios:
                paper = PAPER.get((key[2], key[3], column), "-") if key[0] == "forward" else "-"
                improvements = statistics.mean(ratios), statistics.geometric_mean(ratios), min(ratios)
                average, mean, least = (f"{100 * (ratio - 1):.0f}" for ratio in improvements)
                wins = sum(ratio > 1 for ratio in ratios)
                lines.append([*key, column, len(ratios), average, paper, mean, least, wins, ""])
    print("; ".join(f"{name} {value}" for name, value in report.machine().items()))
    print("Improvement over unfused naive: time of that over time of the column, minus one.")
    print("\n".join(align([[str(cell) for cell in line] for line in lines])))
    for row in rows:
        if row["wrong"]:
            print(f"WRONG: {row['problem']}, {row['dtype']}, {row['direction']}: {row['wrong']}")


if __name__ == "__main__":
    raise SystemExit(main())
