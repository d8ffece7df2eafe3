"""The CUDA kernels on the CPU, built by g++ with the stand-ins of tests/emulator and compared with the definition."""

import subprocess

from emulator_build import BUILD, make


def run(name, *arguments):
    """Builds and runs a test of tests/emulator."""
    make(name)
    result = subprocess.run([BUILD / name, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_the_emulator_finds_faults():
    run("test_emulator")


def test_sm90_backward_kernels_compute_the_gradients():
    run("test_sm90_backward", "20")


def test_sm90_forward_kernels_compute_the_definition():
    run("test_sm90_forward", "30")


def test_sm80_fused_kernels_compute_the_definition():
    run("test_sm80_fused", "20")


def test_sm80_backward_for_small_windows_computes_the_gradients():
    run("test_sm80_fused", "small", "40")


def test_sm80_unfused_kernels_compute_the_definition():
    run("test_sm80_unfused", "40")
