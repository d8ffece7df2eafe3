#!/usr/bin/env python3
"""Runs nvcc and fails if ptxas had to serialise wgmma products or to spill registers.

    check_ptxas.py nvcc -Xptxas=-v ...      as a compiler launcher of CMake
    check_ptxas.py --log FILE..             on what nvcc has said before

Needs the standard library only.
"""

from __future__ import annotations

import re
import subprocess
import sys

# Remarks of ptxas with which a kernel is correct, but a fraction as fast: products of wgmma that wait for each other.
SERIALISED = ("C7510", "C7512", "C7513", "C7514", "C7520")

# Bytes of spill stores that are accepted, by a pattern of the mangled name of the kernel, and why.
# The first pattern that fits counts. ELb1E: extended by additional keys and a bias; where these spill is not known.
ALLOWED_SPILLS = {
    r"wide_forward.*Li256ELi3ELb1E": (76, "window bounds of three axes, and the extension"),
    r"wide_forward.*Li256ELi3ELb0E": (64, "window bounds of three axes, outside the loop over key tiles"),
    r"wide_forward.*ELb1E": (56, "the extension"),
    r"backward_key.*Li128E": (184, "producers, which have 24 registers"),
    r"backward_key.*ELb1ELb1E": (20, "producers, and the extension"),
    r"backward_key.*ELb1EEE": (64, "producers, and the extension"),
    r"backward_key": (20, "producers, which have 40 registers"),
    r"backward_query.*Li128E": (80, "producers, which have 24 registers"),
    r"backward_query.*Li(32|64)E.*ELb1ELb[01]E": (48, "producers, which have 24 registers"),
    r"middle_forward.*Li64ELi1ELi3E": (24, "window bounds of three axes"),
    r"warp_forward.*Li64ELi104E": (56, "the longest list, bounds of windows"),
    r"warp_forward.*Li32ELi104E": (32, "the longest list, bounds of windows"),
    r"warp_forward": (12, "bounds of windows of three axes, and the extension"),
    r"fused_backward_kernel.*HalfNumbers.*Li64E.*PassE1": (4, "two sums of 64 channels in 168 registers"),
    r"fused_backward_kernel.*HalfNumbers.*Li128E.*PassE0": (48, "sums of 32 rows, and the bias"),
    r"fused_backward_kernel.*SplitTf32.*Li256E.*PassE0": (216, "sums of 256 channels, and operands in two parts"),
    r"fused_backward_kernel.*SplitTf32.*Li256E.*PassE1": (180, "sums of 256 channels, and operands in two parts"),
    r"small_forward_kernel.*Li32ELi112E": (8, "the longest list"),
    r"fused_forward_kernel.*SplitTf32.*Li256E": (92, "sums of 256 channels, and operands in two parts"),
}


def check(text: str) -> tuple[list[str], list[str]]:
    """What is wrong in an nvcc log, and what is accepted because ALLOWED_SPILLS says so."""
    wrong, accepted = [], []
    kernel = "?"
    for line in text.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'", line)
        if entry:
            kernel = entry[1]
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if any(remark in line for remark in SERIALISED):
            wrong.append(line.strip())
        elif spill and (int(spill[1]) or int(spill[2])):
            most, why = next((a for pattern, a in ALLOWED_SPILLS.items() if re.search(pattern, kernel)), (0, ""))
            said = f"{kernel}: {spill[0]}"
            if int(spill[1]) <= most:
                accepted.append(f"{said} (allowed: {most} bytes, {why})")
            else:
                wrong.append(f"{said}, allowed: {most} bytes")
    return wrong, accepted


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--log"]:
        status = 0
        text = ""
        for path in arguments[1:]:
            with open(path) as log:
                text += log.read()
    else:
        run = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        status, text = run.returncode, run.stdout
        # The listing of registers is of interest only where something is wrong.
        quiet = re.compile(r"^ptxas info|^ +\d+ bytes stack frame|^\s*$")
        sys.stdout.write("".join(line for line in text.splitlines(keepends=True) if status or not quiet.search(line)))
    wrong, accepted = check(text)
    for line in accepted:
        print(f"check_ptxas: {line}")
    for line in wrong:
        print(f"check_ptxas: error: {line}", file=sys.stderr)
    return status or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
