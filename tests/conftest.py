"""Settings that must precede the import of JAX, the seed of all random inputs, the visible skip of ``gpu`` tests."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_X64", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Fresh random inputs in every run; the environment hands the same seed to every xdist worker.
os.environ.setdefault("JAX_NATTEN_TEST_SEED", str(secrets.randbelow(2**31)))

import pytest

try:
    import hypothesis
except ModuleNotFoundError:
    pass  # `make gpu-test` runs tests/gpu where nothing can be installed; they do without it
else:
    hypothesis.settings.register_profile(
        "suite",
        deadline=None,
        max_examples=int(os.environ.get("JAX_NATTEN_TEST_EXAMPLES", "25")),
        print_blob=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("suite")


def pytest_report_header(config):
    return f"JAX_NATTEN_TEST_SEED={os.environ['JAX_NATTEN_TEST_SEED']} (set it to repeat a run)"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks as its own script does, and forgets it afterwards."""
    import jax

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    names = {path.stem for path in folder.glob("*.py")}
    monkeypatch.syspath_prepend(str(folder))
    with jax.enable_x64(False):
        yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def _missing_for_gpu() -> str | None:
    import jax

    from jax_natten import native

    if native.cuda is None:
        return "the CUDA extension is not built"
    if hasattr(native.cuda, "is_emulated"):
        return None
    if not any(device.platform == "gpu" for device in jax.devices()):
        return "no CUDA device"
    return None


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _missing_for_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
