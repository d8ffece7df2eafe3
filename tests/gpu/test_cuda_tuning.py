"""Tuning on a GPU: real times, tiles that travel through the disk, and the result that they compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problem

import jax_natten
from jax_natten import Neighborhood, native, tiles, tuned_tiles, tuning
from jax_natten import __main__ as command_line
from jax_natten.primitives import fused

EMULATED = hasattr(native.cuda, "is_emulated")
SHAPE = problem("tuned", 2, 4, 2, 32, [9, 12], [3, 5]) if EMULATED else problem("tuned", 2, 4, 2, 64, [56, 60], [7, 9])

pytestmark = pytest.mark.gpu


def runs(name: str) -> bool:
    capabilities = (getattr(device, "compute_capability", "") for device in jax.devices())
    return EMULATED or any(tiles.runs_on(name, capability) for capability in capabilities)


every_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=pytest.mark.skipif(not runs(name), reason=f"no GPU that {name} runs on"))
        for name in tiles.ATTRIBUTES
    ],
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned_tiles.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned_tiles, "_use", tuned_tiles._Use())
    if EMULATED:  # there the device is a CPU
        monkeypatch.setattr(tuned_tiles, "local_gpus", jax.local_devices)
        monkeypatch.setattr(tuned_tiles, "gpu_name", lambda device: "emulated, compute capability 9.0")
        monkeypatch.setattr(tuning, "MOST_CALLS", 2)
        monkeypatch.setattr(tuning, "ROUNDS", 1)


@every_implementation
def test_tuned_tiles_are_used_and_change_nothing_but_rounding(implementation):
    heads = (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)
    arrays = [
        jax.random.normal(jax.random.key(n), (SHAPE.batch, *SHAPE.grid, h, SHAPE.dim), jnp.bfloat16)
        for n, h in enumerate(heads)
    ]

    def attention():  # a new function, which JAX has not compiled yet
        return jax.jit(lambda *x: jax_natten.na2d(*x, **SHAPE.window, implementation=implementation))

    case = fused.problem("fused_forward", *arrays, None, None, Neighborhood.make(**SHAPE.window))
    before = attention()(*arrays)
    found = tuning.tune(*arrays, **SHAPE.window, implementation=implementation, count=3)
    assert found.tiles.implementation == implementation
    assert len(found.measured) == 3 and all(0 < each.seconds < 60 for each in found.measured)
    # Tiles that differ from the model's choice, whatever was fastest.
    others = [each.tiles for each in found.measured if each.tiles != found.measured[0].tiles]
    for asked in (found.tiles, others[-1]):
        tuned_tiles.write(case, tuned_tiles.gpu_name(jax.devices()[0]), asked, [])
        tuning.enable()
        run = attention()
        assert f"{tiles.ATTRIBUTES[implementation]} = dense<{asked.fields()}>" in run.lower(*arrays).as_text()
        after = run(*arrays)
        np.testing.assert_allclose(np.asarray(after, np.float32), np.asarray(before, np.float32), rtol=0.02, atol=0.02)
        tuning.disable()


@every_implementation
def test_additional_keys_and_bias_are_measured_with(implementation):
    shapes = [(SHAPE.batch, *SHAPE.grid, h, SHAPE.dim) for h in (SHAPE.heads, SHAPE.kv_heads)]
    query, key = (jax.ShapeDtypeStruct(shape, jnp.float16) for shape in shapes)
    more = jax.ShapeDtypeStruct((SHAPE.batch, 3, SHAPE.kv_heads, SHAPE.dim), jnp.float16)
    bias = jax.ShapeDtypeStruct((SHAPE.heads, *(2 * k - 1 for k in SHAPE.kernel_size)), jnp.float32)
    options = {"additional_keys": more, "additional_values": more, "rpb": bias}
    options["implementation"] = implementation
    found = tuning.tune(query, key, key, **SHAPE.window, **options, count=2)
    assert len(found.measured) == 2 and tuning.tune(query, key, key, **SHAPE.window, **options).measured == ()


@pytest.mark.parametrize("value_dim", [20, 32])
def test_float32_and_values_of_another_head_dim_are_measured_for_sm80(value_dim):
    query, key, value = (
        jax.ShapeDtypeStruct((1, 30, heads, dim), jnp.float32) for heads, dim in ((2, 24), (1, 24), (1, value_dim))
    )
    found = tuning.tune(query, key, value, kernel_size=9, count=2)
    assert [each.tiles.structure for each in found.measured] == ["sm80_tiles", "sm80_tiles"]


@every_implementation
def test_the_command_prints_what_it_measured(capsys, implementation):
    command = (
        f"tune 2d {SHAPE.grid[0]}x{SHAPE.grid[1]} -k 3x5 --heads 2 --dim 32 --count 2 --implementation {implementation}"
    )
    assert command_line.main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "the model expects" in printed and "best" in printed and f"; {implementation}\n" in printed
