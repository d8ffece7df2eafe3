"""What the CUDA and other lowerings hold, inspected on a machine without their devices."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, fused, fused_with_gradients, operand_shapes
from problems import problem

import jax_natten
from jax_natten import Tiles, dispatch, native
from jax_natten.primitives import workspace

SHAPE = problem("lowering", 2, 4, 2, 5, [6, 7], [3, 4], [1, 2], [2, 1], [True, False])
CASE = Case(SHAPE, "bfloat16", value_dim=3, additional=2, scale=0.25)
TARGETS = ("jax_natten_fused_forward", "jax_natten_fused_backward", "jax_natten_pn", "jax_natten_nn", "jax_natten_in")

PLATFORMS = ("cuda", "cpu")
KERNELS = {"cuda": "sm80,naive", "cpu": "cpu"}


@pytest.fixture(autouse=True)
def both_extensions(monkeypatch):
    """Lowering only writes the calls down: where an extension was not built, pretend that it was."""
    for platform in PLATFORMS:
        monkeypatch.setattr(native, platform, getattr(native, platform) or object())


def _structs(case):
    operands = {n: jax.ShapeDtypeStruct(s, case.dtype) for n, s in operand_shapes(case).items()}
    rows = operands["query"].shape[:-1]
    value_dim = operands["value"].shape[-1]
    return operands, (
        jax.ShapeDtypeStruct((*rows, value_dim), case.dtype),
        jax.ShapeDtypeStruct(rows, case.accumulation),
    )


def lowered(function, *arguments, platforms):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def calls(text: str) -> dict[str, str]:
    """Our custom calls of a module: target and the line of text."""
    lines = [line for line in text.splitlines() if "stablehlo.custom_call @jax_natten_" in line]
    found = {re.search(r"@(jax_natten_\w+)", line).group(1): line for line in lines}
    assert len(found) == len(lines), "a target is called twice"
    return found


def _unfused(operands, cotangent):
    def attention(x):
        window = SHAPE.window
        scores = jax_natten.na2d_qk(x["query"], x["key"], **window, additional_keys=x["additional_keys"])
        return jax_natten.na2d_av(scores, x["value"], **window, additional_values=x["additional_values"])

    out, pullback = jax.vjp(attention, operands)
    return out, pullback(cotangent)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_fused_attention_lowers_to_its_two_calls(platform):
    found = calls(lowered(fused_with_gradients(CASE, None), *_structs(CASE), platforms=(platform,)))
    assert found.keys() == {"jax_natten_fused_forward", "jax_natten_fused_backward"}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("gradient", [jax.grad, jax.value_and_grad])
def test_a_gradient_lowers_to_one_forward_and_one_backward_call(gradient, platform):
    operands, _ = _structs(CASE)

    def loss(x):
        return sum((r.astype(jnp.float32) ** 2).sum() for r in fused(CASE, None)(x))

    found = calls(lowered(gradient(loss), operands, platforms=(platform,)))
    assert found.keys() == {"jax_natten_fused_forward", "jax_natten_fused_backward"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_forward_mode_runs_the_forward_kernel_and_pure_jax(platform):
    operands, _ = _structs(CASE)
    text = lowered(lambda x: jax.jvp(fused(CASE, None), (x,), (x,)), operands, platforms=(platform,))
    assert calls(text).keys() == {"jax_natten_fused_forward"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_unfused_attention_lowers_to_its_three_operations(platform):
    operands, (d_out, _) = _structs(CASE)
    text = lowered(_unfused, operands, d_out, platforms=(platform,))
    for target in ("jax_natten_pn", "jax_natten_nn", "jax_natten_in"):
        # One forward; gradients: d_attn by PN, dQ by NN, dK and dV by IN.
        assert text.count(f"@{target}(") == 2, target


@pytest.mark.parametrize("platform", PLATFORMS)
def test_calls_hold_the_attributes_of_the_wire_format(platform):
    found = calls(lowered(fused_with_gradients(CASE, None), *_structs(CASE), platforms=(platform,)))
    for line in found.values():
        attributes = re.search(r"mhlo.backend_config = \{(.*?)\}", line).group(1)
        assert dict(re.findall(r"(\w+) = (.*?)(?:, (?=\w+ =)|$)", attributes)) == {
            "kernel_size": "dense<[3, 4]> : tensor<2xi64>",
            "stride": "dense<[1, 2]> : tensor<2xi64>",
            "dilation": "dense<[2, 1]> : tensor<2xi64>",
            "is_causal": "dense<[1, 0]> : tensor<2xi64>",
            "scale": "2.500000e-01 : f64",
            "precision": '"highest"',
            "implementation": f'"{KERNELS[platform]}"',
        }


@pytest.mark.parametrize("platform", PLATFORMS)
def test_calls_hold_every_buffer_row_major(platform):
    found = calls(lowered(fused_with_gradients(CASE, None), *_structs(CASE), platforms=(platform,)))
    operands, cotangents = _structs(CASE)
    bias = jax.ShapeDtypeStruct((1, 0, 5, 7), jnp.float32)
    out, lse = cotangents
    inputs = [*operands.values(), bias]
    size = workspace.fused_backward(operands["query"], operands["value"], operands["additional_keys"], bias)
    expected = {
        "jax_natten_fused_forward": (inputs, [out, lse]),
        "jax_natten_fused_backward": (
            [*inputs, out, lse, out, lse],
            [*inputs, jax.ShapeDtypeStruct((size,), jnp.float32)],
        ),
    }
    for target, (arguments, results) in expected.items():
        line = found[target]
        signature = line[line.rindex(" : (") :]
        types = [_mlir_type(s) for s in (*arguments, *results)]
        assert re.findall(r"tensor<[^>]*>", signature) == types, target
        layouts = re.search(r"operand_layouts = \[(.*?)\], ", line + ", ").group(1)
        assert re.findall(r"dense<(.*?)> : tensor<\d+xindex>", layouts) == [_row_major(s.ndim) for s in arguments]
        layouts = re.search(r"result_layouts = \[(.*?)\]\}", line).group(1)
        assert re.findall(r"dense<(.*?)> : tensor<\d+xindex>", layouts) == [_row_major(s.ndim) for s in results]


def _mlir_type(struct) -> str:
    names = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
    return f"tensor<{'x'.join(map(str, (*struct.shape, names[np.dtype(struct.dtype).name])))}>"


def _row_major(ndim: int) -> str:
    return "0" if ndim == 1 else str(list(reversed(range(ndim))))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_bias_is_an_operand_with_heads_and_in_the_accumulation_type(platform):
    case = Case(problem("biased", 2, 4, 2, 5, [9], [4]), "float16", bias=True)
    line = calls(lowered(fused(case, None), _structs(case)[0], platforms=(platform,)))["jax_natten_fused_forward"]
    assert "tensor<1x4x7xf32>" in line


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_get_pure_jax(platform):
    operands, cotangents = _structs(CASE)
    text = lowered(fused_with_gradients(CASE, None), operands, cotangents, platforms=(platform,))
    assert "jax_natten_" not in text
    assert "jax_natten_" not in lowered(_unfused, operands, cotangents[0], platforms=(platform,))


def test_naming_xla_gives_pure_jax_everywhere():
    operands, _ = _structs(CASE)
    for platform in ("cpu", "cuda", "tpu"):
        assert "@jax_natten_" not in lowered(fused(CASE, "xla"), operands, platforms=(platform,))


def test_one_function_for_several_platforms_holds_the_calls_of_each():
    text = lowered(fused(CASE, None), _structs(CASE)[0], platforms=("cpu", "cuda", "tpu"))
    assert text.count("@jax_natten_fused_forward(") == 2  # and pure JAX for the TPU
    assert 'implementation = "sm80,naive"' in text and 'implementation = "cpu"' in text


def test_named_kernels_are_passed_on_in_order_of_preference():
    with_fallback = lowered(fused(CASE, ("sm90", "cpu", "xla")), _structs(CASE)[0], platforms=("cpu",))
    assert 'implementation = "cpu"' in with_fallback


HOPPER = Case(problem("hopper", 2, 4, 2, 64, [40, 36], [7, 9]), "bfloat16")
TILES = Tiles("wide", (16, 8), (8, 8), (16, 8))
SM80_TILES = Tiles("sm80_tiles", (16, 8), (8, 4), (8, 8), rows=128)

needs_library = pytest.mark.skipif(native.model is None, reason="no library is built to ask for the limits of sm90")


def attention(implementation, tiles=None, case=HOPPER):
    def run(x):
        return jax_natten.na2d(**x, **case.problem.window, implementation=implementation, tiles=tiles)

    return run


@needs_library
def test_hopper_kernels_are_called_where_they_are_named():
    line = calls(lowered(attention("sm90"), _structs(HOPPER)[0], platforms=("cuda",)))["jax_natten_fused_forward"]
    assert 'implementation = "sm90"' in line and "tiles" not in line
    text = lowered(attention(("sm90", "naive")), _structs(HOPPER)[0], platforms=("cuda",))
    assert 'implementation = "sm90,naive"' in text  # on a GPU that is no Hopper the next one takes over


@needs_library
def test_none_takes_hopper_kernels_first():
    text = lowered(attention(None), _structs(HOPPER)[0], platforms=("cuda",))
    assert 'implementation = "sm90,sm80,naive"' in text


@needs_library
def test_the_backward_of_a_hopper_forward_is_its_own_where_it_takes_the_case():
    for case in (HOPPER, dataclasses.replace(HOPPER, bias=True), dataclasses.replace(HOPPER, additional=3)):
        structs = _structs(case)
        found = calls(lowered(fused_with_gradients(case, ("sm90", "naive")), *structs, platforms=("cuda",)))
        for target in ("jax_natten_fused_forward", "jax_natten_fused_backward"):
            assert 'implementation = "sm90,naive"' in found[target]
    shape = problem("large bias table", 1, 1, 1, 32, [1200, 1200], [1100, 1100])
    case = dataclasses.replace(HOPPER, problem=shape, bias=True)
    structs = _structs(case)
    found = calls(lowered(fused_with_gradients(case, ("sm90", "naive")), *structs, platforms=("cuda",)))
    assert 'implementation = "sm90,naive"' in found["jax_natten_fused_forward"]
    assert 'implementation = "naive"' in found["jax_natten_fused_backward"]
    with pytest.raises(NotImplementedError, match="'sm90' takes bias tables of up to"):
        lowered(fused_with_gradients(case, "sm90"), *structs, platforms=("cuda",))


@needs_library
def test_a_case_beyond_the_hopper_kernels_goes_to_the_next_name():
    case = dataclasses.replace(HOPPER, dtype="float32")
    with pytest.raises(NotImplementedError, match="'sm90' takes float16 and bfloat16 only"):
        lowered(fused(case, "sm90"), _structs(case)[0], platforms=("cuda",))
    text = lowered(fused(case, ("sm90", "naive")), _structs(case)[0], platforms=("cuda",))
    assert 'implementation = "naive"' in text
    with pytest.raises(NotImplementedError, match="'sm90' runs on platform 'cuda' only"):
        lowered(fused(HOPPER, "sm90"), _structs(HOPPER)[0], platforms=("cpu",))


@needs_library
def test_tiles_travel_with_the_forward_alone():
    numbers = "dense<[0, 1, 16, 8, 1, 8, 8, 1, 16, 8, 1, 2, 2]> : tensor<13xi64>"
    run = attention(("sm90", "naive"), TILES)
    text = lowered(run, _structs(HOPPER)[0], platforms=("cuda",))
    assert f"tiles = {numbers}" in text
    gradient = jax.grad(lambda x: run(x).astype(jnp.float32).sum())
    found = calls(lowered(gradient, _structs(HOPPER)[0], platforms=("cuda",)))
    assert "tiles" in found["jax_natten_fused_forward"] and "tiles" not in found["jax_natten_fused_backward"]
    mapped = jax.vmap(run)
    stacked = {n: jax.ShapeDtypeStruct((3, *s.shape), s.dtype) for n, s in _structs(HOPPER)[0].items()}
    assert f"tiles = {numbers}" in lowered(mapped, stacked, platforms=("cuda",))
    assert "tiles" not in lowered(attention(("sm90", "cpu"), TILES), _structs(HOPPER)[0], platforms=("cpu",))


@needs_library
def test_each_implementation_is_told_its_own_tiles():
    structs = _structs(HOPPER)[0]
    for implementation in (None, "sm80", ("sm80", "naive")):
        text = lowered(attention(implementation, SM80_TILES), structs, platforms=("cuda",))
        numbers = "dense<[0, 128, 1, 16, 8, 1, 8, 4, 1, 8, 8]> : tensor<11xi64>"
        assert f"sm80_tiles = {numbers}" in text and " tiles = " not in text
    assert "sm80_tiles" not in lowered(attention(None, TILES), structs, platforms=("cuda",))
    exact = dataclasses.replace(HOPPER, dtype="float32")  # sm90 takes none such
    asked = Tiles("sm80_tiles", (8, 8), (4, 4), (8, 4))
    text = lowered(attention(None, asked, exact), _structs(exact)[0], platforms=("cuda",))
    assert 'implementation = "sm80,naive"' in text and "sm80_tiles = " in text


@needs_library
@pytest.mark.parametrize("shape", ["b, 40, 36", "b, x, y"])
def test_tensor_core_kernels_take_a_symbolic_batch_and_grid(shape):
    sizes = jax.export.symbolic_shape(shape, constraints=("x >= 7", "y >= 9") if "x" in shape else ())
    operands = {n: jax.ShapeDtypeStruct((*sizes, *s.shape[3:]), s.dtype) for n, s in _structs(HOPPER)[0].items()}
    small = Tiles("sm80_small", (8, 8), (4, 4))
    for name, asked in (("sm90", None), ("sm90", TILES), ("sm80", None), ("sm80", SM80_TILES), ("sm80", small)):
        if asked is small and "x" not in shape:
            continue  # its lists are too short for windows of 7 x 9, which is known if the grid is
        function = jax.jit(attention((name, "naive"), asked))
        checks = jax_natten.EXPORT_DISABLED_CHECKS
        text = jax.export.export(function, platforms=("cuda",), disabled_checks=checks)(operands).mlir_module()
        assert f'implementation = "{name},naive"' in text and ("tiles = " in text) == (asked is not None)


@needs_library
def test_tiles_that_cannot_be_honoured_are_errors_at_trace_time():
    operands = _structs(HOPPER)[0]
    with pytest.raises(ValueError, match="do not fit this case: query tiles must have two parts"):
        jax.eval_shape(attention("sm90", Tiles("wide", (16, 8), (16, 8), (16, 8))), operands)
    with pytest.raises(ValueError, match="do not fit this case: tiles must have 2 entries"):
        jax.eval_shape(attention("sm90", Tiles("wide", (128,), (64,), (128,))), operands)
    with pytest.raises(TypeError, match="tiles must be None or"):
        jax.eval_shape(attention("sm90", (16, 8)), operands)
    for implementation in ("naive", ("cpu", "xla")):
        with pytest.raises(NotImplementedError, match="tiles of structure wide are for implementation 'sm90'"):
            jax.eval_shape(attention(implementation, TILES), operands)
    with pytest.raises(ValueError, match="do not fit this case: query tiles must have a part for each warp"):
        jax.eval_shape(attention(None, Tiles("sm80_tiles", (16, 8), (16, 8), (8, 8))), operands)
    with pytest.raises(NotImplementedError, match="tiles of structure sm80_tiles are for implementation 'sm80'"):
        jax.eval_shape(attention(("sm90", "naive"), SM80_TILES), operands)


def test_second_derivatives_need_no_unknown_call():
    operands, _ = _structs(CASE)

    def loss(x):
        return fused(CASE, None)(x)[0].astype(jnp.float32).sum()

    def product(x):
        return jax.jvp(jax.grad(loss), (x,), (x,))[1]

    text = lowered(product, operands, platforms=("cpu",))
    assert set(re.findall(r"@(jax_natten_\w+)\(", text)) <= set(TARGETS)


def test_without_the_extension_cuda_gets_pure_jax_and_a_warning(monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    dispatch._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="without its CUDA kernels"):
        text = lowered(fused(CASE, None), _structs(CASE)[0], platforms=("cuda",))
    assert "@jax_natten_" not in text
    with pytest.raises(NotImplementedError, match="_cuda, which was not built"):
        lowered(fused(CASE, "naive"), _structs(CASE)[0], platforms=("cuda",))
