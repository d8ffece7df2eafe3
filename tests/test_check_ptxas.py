"""The build fails on what makes a tensor-core kernel slow: serialised products and spilled registers."""

import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "cuda" / "check_ptxas.py"
ENTRY = "ptxas info    : Compiling entry function '{}' for 'sm_90a'"
SPILL = "    0 bytes stack frame, {} bytes spill stores, {} bytes spill loads"
WIDE = "_ZN10jax_natten4sm9012wide_forwardI13__nv_bfloat16Li{}ELi{}ELb0EEEvNS0_10WideParamsE"


def run(*lines, status=0):
    """What the script does when a compiler says this."""
    compiler = f"import sys; print({chr(10).join(lines)!r}, file=sys.stderr); sys.exit({status})"
    return subprocess.run([sys.executable, SCRIPT, sys.executable, "-c", compiler], capture_output=True, text=True)


def test_a_clean_kernel_passes_in_silence():
    result = run(ENTRY.format(WIDE.format(128, 2)), SPILL.format(0, 0), "ptxas info    : Used 168 registers")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_serialised_products_fail():
    for remark in ("C7510", "C7512", "C7513", "C7514", "C7520"):
        result = run(ENTRY.format("k"), f"ptxas info    : ({remark}) Potential Performance Loss: wgmma.mma_async ...")
        assert result.returncode == 1 and remark in result.stderr


def test_spills_fail_unless_they_are_listed():
    result = run(ENTRY.format(WIDE.format(128, 3)), SPILL.format(8, 8))
    assert result.returncode == 1 and "8 bytes spill stores" in result.stderr
    listed = run(ENTRY.format(WIDE.format(256, 3)), SPILL.format(60, 96))
    assert listed.returncode == 0 and "allowed" in listed.stdout
    assert run(ENTRY.format(WIDE.format(256, 3)), SPILL.format(100, 96)).returncode == 1


def test_a_failing_compiler_fails_and_its_words_are_passed_on():
    result = run("error: no such thing", status=2)
    assert result.returncode == 2 and "no such thing" in result.stdout


def test_logs_can_be_read_afterwards(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join([ENTRY.format("k"), SPILL.format(4, 4)]))
    result = subprocess.run([sys.executable, SCRIPT, "--log", log], capture_output=True, text=True)
    assert result.returncode == 1 and "4 bytes spill stores" in result.stderr
