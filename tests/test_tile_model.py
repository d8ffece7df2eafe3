"""The counts behind the choice of tiles and the simulator agree with a walk over the tiles, and choices fit."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def compile_cpp(binary: pathlib.Path, *sources: str, more_flags: tuple[str, ...] = ()) -> pathlib.Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *more_flags]
    subprocess.run([compiler, *flags, *(str(ROOT / source) for source in sources), "-o", str(binary)], check=True)
    return binary


def test_counts_equal_a_walk_over_the_tiles(tmp_path):
    walker = compile_cpp(tmp_path / "walker", "tests/cpp/test_tile_model.cc", "cuda/common/tile_model.cc")
    result = subprocess.run([walker, "3000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_choices_fit_and_stay_within_their_tables(tmp_path):
    sources = [f"cuda/sm90/{name}.cc" for name in ("choose", "search", "cost", "plan")]
    # Traps need no library of a sanitizer.
    traps = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    binary = tmp_path / "choose"
    sources += [f"cuda/common/tile_{name}.cc" for name in ("model", "search")]
    names = ("forward_rank", "forward_plan", "plan", "small_plan", "small_setup", "limits", "unfused_plan")
    sources += [f"cuda/sm80/{name}.cc" for name in names]
    chooser = compile_cpp(binary, "tests/cpp/test_choose.cc", *sources, more_flags=traps)
    result = subprocess.run([chooser], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
