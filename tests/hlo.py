"""Reads the text of a compiled XLA program: who depends on whom, and how many bytes the collectives move."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<shape>[\d,]*)\]")
_BITS = re.compile(r"\d+")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: ``name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Size of the result."""
        total = 0
        for match in _ARRAY.finditer(self.shape):
            bits = 8 if match["dtype"] == "pred" else int(_BITS.search(match["dtype"])[0])
            total += math.prod(map(int, filter(None, match["shape"].split(",")))) * bits // 8
        return total


class Program:
    """The instructions of the entry computation by name, and those of all computations."""

    def __init__(self, text: str):
        self.every: list[Instruction] = []
        self.entry: dict[str, Instruction] = {}
        computation, self._opcodes = "", {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                computation = "ENTRY" if line.startswith("ENTRY") else found["name"]
            elif found := _INSTRUCTION.match(line):
                operands, _, attributes = found["rest"].partition(")")
                names = tuple(re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", operands)))
                instruction = Instruction(found["name"], found["shape"], found["opcode"], names, attributes)
                self.every.append(instruction)
                self._opcodes.setdefault(computation, set()).add(instruction.opcode)
                if computation == "ENTRY":
                    self.entry[instruction.name] = instruction

    def calls(self, target: str) -> list[Instruction]:
        """Custom calls of this target. All of them must be in the entry computation."""
        found = [i for i in self.every if i.opcode == "custom-call" and f'"{target}"' in i.attributes]
        assert all(i.name in self.entry for i in found), f"{target} is called outside of the entry computation"
        return found

    def ancestors(self, instruction: Instruction) -> set[str]:
        """Names of the instructions of the entry computation that must run before this one."""
        seen: set[str] = set()
        waiting = list(instruction.operands)
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += self.entry[name].operands
        return seen

    def waits_for(self, instruction: Instruction, opcode: str) -> bool:
        """Whether an instruction needs the result of any with this opcode, also of one inside a called computation."""
        for name in self.ancestors(instruction):
            called = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", self.entry[name].attributes)
            opcodes = {self.entry[name].opcode}.union(*(self._opcodes[c] for c in called))
            if any(found.startswith(opcode) for found in opcodes):
                return True
        return False

    def received_bytes(self) -> int:
        """Bytes that a device receives by collective-permutes: of the devices the one that receives most."""
        received: dict[int, int] = {}
        for instruction in self.every:
            if instruction.opcode == "collective-permute":
                pairs = _PAIRS.search(instruction.attributes)[1]
                for target in re.findall(r"\{\d+,(\d+)\}", pairs):
                    received[int(target)] = received.get(int(target), 0) + instruction.bytes
        return max(received.values(), default=0)


def halo_bytes(shard, grid, window, channels: int, itemsize: int) -> int:
    """The theoretical halo: bytes of the keys and values that the queries of a shard see beyond it.

    Straight from the definition of the windows: of every shard the box of positions that its queries see, less its own;
    of all shards the largest.

    Args:
      shard: positions of a shard per axis.
      grid: the whole grid.
      window: a Neighborhood.
      channels: of keys and values together, all heads.
      itemsize: bytes per channel.
    """
    boxes = []
    for length, axis in zip(shard, window.axes(grid)):
        seen = axis.mask()
        lengths = []
        for begin in range(0, axis.length, length):
            (keys,) = np.nonzero(seen[begin : begin + length].any(0))
            lengths.append(max(keys[-1] + 1, begin + length) - min(keys[0], begin))
        boxes.append(max(lengths))
    return (math.prod(map(int, boxes)) - math.prod(shard)) * channels * itemsize
