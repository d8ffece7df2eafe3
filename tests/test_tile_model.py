"""The counts behind the choice of tiles and the simulator agree with a walk over the tiles."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def compile_cpp(binary: pathlib.Path, *sources: str) -> pathlib.Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *(str(ROOT / source) for source in sources), "-o", str(binary)], check=True)
    return binary


def test_counts_equal_a_walk_over_the_tiles(tmp_path):
    walker = compile_cpp(tmp_path / "walker", "tests/cpp/test_tile_model.cc", "cuda/common/tile_model.cc")
    result = subprocess.run([walker, "3000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
