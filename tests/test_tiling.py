"""The tile geometry of the Hopper kernels, proved on the CPU through the header that the kernels use."""

import pathlib
import shutil
import subprocess

import pytest

CPP = pathlib.Path(__file__).parent / "cpp"


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """The compiled tests/cpp/test_tiling.cc."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    binary = tmp_path_factory.mktemp("tiling") / "test_tiling"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(CPP / "test_tiling.cc"), "-o", str(binary)], check=True)
    return binary


def test_tiles_compute_each_neighbor_pair_exactly_once(walker):
    result = subprocess.run([walker, "1000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
