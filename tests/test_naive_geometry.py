"""How the direct CUDA kernels find their queries, keys and pairs: proved on the CPU through the kernels' own header."""

import os
import pathlib
import shutil
import subprocess

import pytest

CPP = pathlib.Path(__file__).parent / "cpp"


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """The compiled tests/cpp/test_naive_geometry.cc."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    binary = tmp_path_factory.mktemp("geometry") / "test_naive_geometry"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(CPP / "test_naive_geometry.cc"), "-o", str(binary)], check=True)
    return binary


def test_walks_meet_exactly_the_neighbors_in_slot_order(walker):
    result = subprocess.run([walker, "200", os.environ["JAX_NATTEN_TEST_SEED"]], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
