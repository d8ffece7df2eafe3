"""The installed package: what importing does, what the native libraries link and export, ``info``, and versions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_natten
from jax_natten import dispatch, native

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout


def library(name):
    module = getattr(native, name)
    if module is None:
        pytest.skip(f"jax_natten._{name} was not built")
    return module.__file__


def tool(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_cpu_library_is_built():
    assert native.cpu is not None


def test_every_target_has_a_handler():
    for module in filter(None, (native.cpu, native.cuda)):
        assert set(module.handlers()) == set(native.TARGETS)


def test_import_touches_no_device_and_no_layer_framework(tmp_path):
    code = (
        "import sys, jax_natten\n"
        "from jax._src import xla_bridge\n"
        "print(list(xla_bridge._backends), [name for name in ('flax', 'haiku') if name in sys.modules])"
    )
    assert run("-c", code, cwd=tmp_path, CUDA_VISIBLE_DEVICES="") == "[] []\n"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_links_only_the_c_and_cpp_runtimes(name):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", library(name)))
    allowed = r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|librt|libdl|ld-linux-.*)\.so\.\d+"
    assert needed
    assert [n for n in needed if not re.fullmatch(allowed, n)] == []


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_exports_its_entry_point_only(name):
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--defined-only", library(name)).splitlines()]
    assert symbols == [f"PyInit__{name}"]


def test_info_names_versions_libraries_and_implementations(tmp_path):
    text = run("-P", "-m", "jax_natten", "info", cwd=tmp_path, JAX_PLATFORMS="cpu")
    for word in (
        jax_natten.__version__,
        jax.__version__,
        "CPU library",
        "CUDA library",
        "bfloat16",
        "float64",
        "jax.jvp",
    ):
        assert word in text
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    assert ["cpu", "float32", "cpu, xla", "cpu, xla", "cpu, xla"] in rows
    assert ["tpu", "bfloat16", "xla", "xla", "xla"] in rows
    assert "cpu:0" in text


def test_command_line_without_a_command_says_what_there_is(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run("-m", "jax_natten", cwd=tmp_path)
    assert error.value.returncode == 2
    assert "info" in error.value.stderr


def test_versions_agree():
    assert importlib.metadata.version("jax_natten") == jax_natten.__version__
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest is not None and latest[1] == jax_natten.__version__


def test_readme_names_every_implementation():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in dispatch.IMPLEMENTATIONS if f'"{name}"' not in readme] == []
