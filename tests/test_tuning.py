"""Tuned tiles: what is stored, what is found again, and that programs hold it if and only if they are told to.

Without a GPU: times are made up.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from problems import problem

import jax_natten
from jax_natten import __main__ as command_line
from jax_natten import native, tiles, tuned_tiles, tuning
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import fused

pytestmark = pytest.mark.skipif(native.model is None, reason="no library is built to ask for tiles")

GPU = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", core_count=132
)
NAME = "NVIDIA H100 80GB HBM3, compute capability 9.0"
AMPERE = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.0", core_count=108
)
AMPERE_NAME = "NVIDIA A100-SXM4-80GB, compute capability 8.0"
SHAPE = problem("tuned", 2, 4, 2, 64, [40, 36], [7, 9])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, a GPU that is not there, and a library for it; nothing is enabled."""
    monkeypatch.setenv(tuned_tiles.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(tuned_tiles.ENABLED_VARIABLE, raising=False)
    monkeypatch.setattr(tuned_tiles, "_use", tuned_tiles._Use())
    monkeypatch.setattr(tuned_tiles, "local_gpus", lambda: [GPU])
    monkeypatch.setattr(native, "cuda", native.cuda or object())
    return tmp_path / "cache"


@pytest.fixture
def timer(monkeypatch):
    """Made-up seconds: of the n-th candidate, those at its place in ``timer.seconds``, else 1. Keeps the calls."""
    made_up = types.SimpleNamespace(seconds={}, calls=[])

    def measure(problem, candidates, calls, device):
        made_up.calls.append((problem, candidates, calls, device))
        return [made_up.seconds.get(n, 1.0) for n in range(len(candidates))]

    monkeypatch.setattr(tuning, "_measure", measure)
    return made_up


def arrays(batch=(2,), heads=4, kv_heads=2, dtype="bfloat16", shape=SHAPE):
    query, key = (jax.ShapeDtypeStruct((*batch, *shape.grid, h, shape.dim), dtype) for h in (heads, kv_heads))
    return query, key, key


def described(**options):
    query, key, value = arrays(**options)
    return fused.problem("fused_forward", query, key, value, None, None, Neighborhood.make(**SHAPE.window))


def tune(*operands, **options) -> tuning.Tuned:
    return tuning.tune(*(operands or arrays()), **SHAPE.window, **options)


def test_the_fastest_is_stored_and_measured_once(timer, cache):
    timer.seconds = {3: 0.5, 5: 0.7}
    found = tune(count=8)
    assert len(found.measured) == 8 and found.tiles == found.measured[3].tiles
    assert [each.tiles for each in found.measured] == [each.tiles for each in tiles.simulate(described(), count=8)]
    assert found.path.is_relative_to(cache) and json.loads(found.path.read_text())["key"]["gpu"] == NAME
    again = tune(count=8)
    assert (again.tiles, again.measured, again.path) == (found.tiles, (), found.path) and len(timer.calls) == 1
    timer.seconds = {2: 0.5}
    assert tune(count=8, again=True).tiles == found.measured[2].tiles and len(timer.calls) == 2
    assert tune().tiles == found.measured[2].tiles
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


def test_the_choice_of_the_model_stays_where_others_are_no_faster_than_chance(timer):
    timer.seconds = {4: 0.995}
    found = tune()
    assert found.tiles == found.measured[0].tiles == tiles.simulate(described())[0].tiles


def test_batch_axes_count_by_their_product(timer):
    timer.seconds = {1: 0.5}
    found = tune(*arrays(batch=(3, 2)))
    assert tune(*arrays(batch=(6,))).measured == () and tune(*arrays(batch=(6,))).path == found.path
    assert tune(*arrays(batch=(7,))).measured != ()


def test_everything_that_a_choice_depends_on_tells_files_apart(monkeypatch):
    base = described()
    changed = {
        "operation": "fused_backward", "neighborhood": Neighborhood.make((7, 8)), "dtype": jnp.dtype("float16"),
        "heads": 8, "kv_heads": 4, "head_dim": 32, "value_dim": 32, "additional_keys": 1, "has_bias": True, "batch": 3,
        "grid": (40, 37),
    }  # fmt: skip
    assert changed.keys() == {field.name for field in dataclasses.fields(base)}
    paths = {tuned_tiles.path_of(dataclasses.replace(base, **{n: x}), "sm90", NAME) for n, x in changed.items()}
    for name in ("stride", "dilation", "is_causal"):
        window = Neighborhood.make(**SHAPE.window | {name: (1, 2) if name != "is_causal" else (False, True)})
        paths.add(tuned_tiles.path_of(dataclasses.replace(base, neighborhood=window), "sm90", NAME))
    paths |= {tuned_tiles.path_of(base, "sm90", NAME), tuned_tiles.path_of(base, "sm90", NAME.replace("H100", "H200"))}
    paths.add(tuned_tiles.path_of(base, "sm80", NAME))
    monkeypatch.setattr(jax_natten, "__version__", "next")
    paths.add(tuned_tiles.path_of(base, "sm90", NAME))
    assert len(paths) == len(changed) + 7


SM80_TILES = dataclasses.asdict(tiles.Tiles("sm80_tiles", (8, 8), (4, 4), (8, 8)))


def spoiled(content: dict) -> dict[str, bytes]:
    text = json.dumps(content)
    other = content["key"] | {"gpu": "another"}
    odd = content["tiles"] | {"query_tile": [3, 5]}
    return {
        "empty": b"",
        "cut off": text[: len(text) // 2].encode(),
        "no text": b"\xff\xfe\x00\x80",
        "no object": b"[1, 2]",
        "another key": json.dumps(content | {"key": other}).encode(),
        "tiles that do not fit": json.dumps(content | {"tiles": odd}).encode(),
        "tiles of later versions": json.dumps(content | {"tiles": content["tiles"] | {"more": 1}}).encode(),
        "tiles of another implementation": json.dumps(content | {"tiles": SM80_TILES}).encode(),
        "no tiles": json.dumps({"key": content["key"]}).encode(),
    }


def test_a_file_that_cannot_be_used_is_as_good_as_not_there(timer):
    timer.seconds = {3: 0.5}
    found = tune()
    for name, text in spoiled(json.loads(found.path.read_text())).items():
        found.path.write_bytes(text)
        with pytest.warns(UserWarning, match="are ignored"):
            assert tuned_tiles.read(described(), "sm90", NAME) is None, name
        with pytest.warns(UserWarning, match=str(found.path)):
            assert tune().tiles == found.tiles, name
        assert tuned_tiles.read(described(), "sm90", NAME) == found.tiles


def test_a_directory_that_cannot_be_read_holds_nothing(cache):
    cache.mkdir()
    (cache / "tiles").write_text("a file")
    with pytest.warns(UserWarning, match="are ignored"):
        assert tuned_tiles.read(described(), "sm90", NAME) is None


def test_readers_see_whole_files_while_others_write():
    case = described()
    choices = [each.tiles for each in tiles.simulate(case, count=6)]
    path = tuned_tiles.write(case, NAME, choices[0], [])

    def write_and_read(n: int) -> bool:
        tuned_tiles.write(case, NAME, choices[n % len(choices)], [{"padding": "x" * 1000 * n}])
        return tuned_tiles.read(case, "sm90", NAME) in choices

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(200)))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch):
    case = described()
    (best,) = (each.tiles for each in tiles.simulate(case))
    with pytest.raises(TypeError):
        tuned_tiles.write(case, NAME, best, [{"seconds": object()}])
    assert list((tuned_tiles.directory() / "tiles").iterdir()) == []


def lowered(operands, *, implementation=None, asked=None, mapped=False) -> str:
    def run(q, k, v):
        return jax_natten.na2d(q, k, v, **SHAPE.window, implementation=implementation, tiles=asked)

    function = jax.jit(jax.vmap(run) if mapped else run)
    return function.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def attribute(asked: tiles.Tiles) -> str:
    return f"tiles = dense<{asked.fields()}> : tensor<13xi64>"


def test_programs_hold_tuned_tiles_only_while_that_is_enabled(timer):
    timer.seconds = {3: 0.5}
    found = tune()
    assert "tiles = " not in lowered(arrays())
    tuning.enable()
    assert attribute(found.tiles) in lowered(arrays())
    assert 'implementation = "sm90,sm80,naive"' in lowered(arrays())
    assert attribute(found.tiles) in lowered(arrays(batch=(2, 1)), mapped=True)
    for other in ({"batch": (3,)}, {"dtype": "float16"}, {"kv_heads": 4}):
        assert "tiles = " not in lowered(arrays(**other))
    assert "tiles = " not in lowered(arrays(), implementation="sm80")
    asked = found.measured[5].tiles
    assert attribute(asked) in lowered(arrays(), asked=asked)
    tuning.enable(NAME.replace("H100", "H200"))
    assert "tiles = " not in lowered(arrays())
    tuning.enable(NAME)
    assert attribute(found.tiles) in lowered(arrays())
    tuning.disable()
    assert "tiles = " not in lowered(arrays())


def test_a_gradient_holds_them_in_its_forward_alone(timer):
    timer.seconds = {3: 0.5}
    found = tune()
    tuning.enable()

    def loss(q, k, v):
        return jax_natten.na2d(q, k, v, **SHAPE.window).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).trace(*arrays()).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = (line for line in text.splitlines() if "tiles = " in line)
    assert "jax_natten_fused_forward" in line and attribute(found.tiles) in line


def test_a_symbolic_batch_has_no_tuned_tiles():
    tuning.enable()
    (batch,) = jax.export.symbolic_shape("b")
    operands = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays()]
    run = jax.jit(lambda q, k, v: jax_natten.na2d(q, k, v, **SHAPE.window))
    checks = jax_natten.EXPORT_DISABLED_CHECKS
    text = jax.export.export(run, platforms=("cuda",), disabled_checks=checks)(*operands).mlir_module()
    assert "jax_natten_fused_forward" in text and "tiles = " not in text


def test_the_environment_enables_it_too(timer, monkeypatch):
    timer.seconds = {3: 0.5}
    found = tune()
    monkeypatch.setenv(tuned_tiles.ENABLED_VARIABLE, "1")
    assert attribute(found.tiles) in lowered(arrays())
    for value, gpus, expected in (("0", [GPU], None), ("", [GPU], None), ("1", [], None), ("1", [GPU], NAME)):
        monkeypatch.setattr(tuned_tiles, "_use", tuned_tiles._Use())
        monkeypatch.setattr(tuned_tiles, "local_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setenv(tuned_tiles.ENABLED_VARIABLE, value)
        assert tuned_tiles.in_use() == expected
    monkeypatch.setattr(tuned_tiles, "_use", tuned_tiles._Use())
    monkeypatch.setenv(tuned_tiles.ENABLED_VARIABLE, "yes")
    with pytest.raises(ValueError, match="JAX_NATTEN_TUNED_TILES must be 0 or 1; got 'yes'"):
        tuned_tiles.in_use()


def test_where_files_are(monkeypatch, tmp_path):
    assert tuned_tiles.directory() == tmp_path / "cache"
    monkeypatch.delenv(tuned_tiles.DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned_tiles.directory() == tmp_path / "jax_natten"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned_tiles.directory() == Path.home() / ".cache" / "jax_natten"


def test_arguments_are_checked(timer, monkeypatch):
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        tune(count=0)
    with pytest.raises(TypeError, match=r"count must be an integer; got 2\.5"):
        tune(count=2.5)
    with pytest.raises(NotImplementedError, match="'sm90' takes float16 and bfloat16 only"):
        tune(*arrays(dtype="float32"), implementation="sm90")
    with pytest.raises(NotImplementedError, match=r"'sm90' takes .* only; 'sm80' takes .* only"), jax.enable_x64(True):
        tune(*arrays(dtype="float64"))
    for name in ("naive", ["sm90"], "sm100"):
        with pytest.raises(ValueError, match="implementation must be among sm90, sm80; got"):
            tune(implementation=name)
    with pytest.raises(ValueError, match="kernel_size"):
        tuning.tune(*arrays(), kernel_size=(41, 9))
    with pytest.raises(ValueError, match="nothing to compute"):
        tune(*arrays(batch=(0,)))
    for call in (tune, tuning.enable):
        with pytest.raises(ValueError, match="device must be a GPU; got"):
            call(device=jax.devices("cpu")[0])
        with pytest.raises(TypeError, match=r"device must be a jax\.Device, its name or None; got 3"):
            call(device=3)
    monkeypatch.setattr(tuned_tiles, "local_gpus", list)
    for call in (tune, tuning.enable):
        with pytest.raises(RuntimeError, match="jax has none here"):
            call()
    monkeypatch.setattr(tuned_tiles, "local_gpus", lambda: [AMPERE])
    with pytest.raises(RuntimeError, match=r"tiles are those of 'sm90', which cannot run on NVIDIA A100"):
        tune(implementation="sm90")
    turing = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA T4", compute_capability="7.5")
    monkeypatch.setattr(tuned_tiles, "local_gpus", lambda: [turing])
    with pytest.raises(RuntimeError, match=r"tiles are those of 'sm90' and 'sm80', which cannot run on NVIDIA T4"):
        tune()
    assert not timer.calls


def test_the_command_measures_and_then_finds(timer, capsys):
    timer.seconds = {3: 0.5}
    command = ["tune", "2d", "40x36", "-k", "7x9", "--batch", "2", "--heads", "4", "--kv-heads", "2", "--dim", "64"]
    assert command_line.main([*command, "--count", "5"]) == 0
    printed = capsys.readouterr().out
    assert "100.0% faster than the default choice" in printed and "tuning.enable()" in printed
    assert command_line.main(command) == 0
    assert "--again measures anew" in capsys.readouterr().out
    assert tune().measured == () and len(timer.calls) == 1
    assert command_line.main([*command, "--count", "0"]) == 2
    assert "count must be at least 1" in capsys.readouterr().err


# ---- "sm80"


def test_what_a_call_would_run_is_tuned(timer, monkeypatch):
    assert tune().tiles.implementation == "sm90"
    exact = arrays(dtype="float32")
    assert tune(*exact).tiles.implementation == "sm80"
    assert tune(implementation="sm80").tiles.implementation == "sm80"
    monkeypatch.setattr(tuned_tiles, "local_gpus", lambda: [AMPERE])
    assert tune().tiles.implementation == "sm80"


def test_tiles_of_sm80_are_timed_for_lack_of_a_model_in_chains_as_long_as_a_short_one_tells(timer, cache):
    timer.seconds = {0: 2e-4, 4: 1e-4}
    found = tune(implementation="sm80", count=8)
    ranked = [each.tiles for each in tiles.simulate_sm80(described(), count=8)]
    assert [(candidates, calls) for _, candidates, calls, _ in timer.calls] == [
        (ranked[:1], tuning.FEWEST_CALLS),
        (ranked, 20),
    ]
    assert [each.tiles for each in found.measured] == ranked and found.tiles == ranked[4]
    assert all(each.expected is None for each in found.measured)
    key = json.loads(found.path.read_text())["key"]
    assert (key["gpu"], key["implementation"]) == (NAME, "sm80")
    assert tune(implementation="sm80").measured == () and tune(count=2).measured != ()


def test_programs_hold_the_tuned_tiles_of_each_implementation(timer):
    timer.seconds = {3: 0.5}
    hopper, other = (tune(implementation=name).tiles for name in ("sm90", "sm80"))
    tuning.enable()
    text = lowered(arrays())
    assert 'implementation = "sm90,sm80,naive"' in text
    assert f"sm80_tiles = dense<{other.fields()}> : tensor<11xi64>" in text and f" {attribute(hopper)}" in text
    alone = lowered(arrays(), implementation="sm80")
    assert f"sm80_tiles = dense<{other.fields()}>" in alone and " tiles = " not in alone
    asked = tiles.Tiles("sm80_tiles", (8, 8), (4, 4), (8, 8))  # has precedence, and leaves those of sm90 alone
    text = lowered(arrays(), asked=asked)
    assert f"sm80_tiles = dense<{asked.fields()}>" in text and attribute(hopper) in text
    tuning.enable(AMPERE_NAME)
    assert "tiles = " not in lowered(arrays())


def test_the_command_tunes_sm80_too(timer, capsys):
    timer.seconds = {0: 1.0, 3: 0.5}
    command = ["tune", "2d", "40x36", "-k", "7x9", "--batch", "2", "--heads", "4", "--kv-heads", "2", "--dim", "64"]
    assert command_line.main([*command, "--count", "5", "--implementation", "sm80"]) == 0
    printed = capsys.readouterr().out
    assert "100.0% faster than the default choice" in printed and "no model" in printed and "; sm80" in printed
    assert tune(implementation="sm80").measured == ()
    with pytest.raises(SystemExit):
        command_line.main([*command, "--implementation", "naive"])
    assert "invalid choice: 'naive'" in capsys.readouterr().err


@pytest.mark.parametrize("dims", [(24, 24), (24, 40), (40, 24)])
def test_chains_of_calls_run_with_values_of_any_head_dim(dims, monkeypatch):
    """On the CPU, where no implementation obeys tiles."""
    monkeypatch.setattr(tuning, "neighborhood_attention", without_tiles)
    window = Neighborhood.make((3,))
    problem = tuning.Problem("fused_forward", window, jnp.dtype("float16"), 2, 1, *dims, 2, False, 1, (9,))
    candidates = [each.tiles for each in tiles.simulate_sm80(problem, count=2)]
    assert all(0 < each < 60 for each in tuning._measure(problem, candidates, 2, jax.devices("cpu")[0]))


def without_tiles(*operands, implementation, tiles, **more):
    assert implementation == tiles.implementation == "sm80"
    return jax_natten.neighborhood_attention(*operands, **more, implementation="xla")
