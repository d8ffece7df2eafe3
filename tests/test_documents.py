"""docs/transformations.md: every cell links to a test that exists, or says why there is none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "transformations.md"
TEXT = PAGE.read_text()
LINKS = dict(re.findall(r"^\[([\w-]+)\]: (.+)$", TEXT, re.MULTILINE))
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| transformation")
]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_link_leads_to_a_test():
    for label, target in LINKS.items():
        path, name = re.fullmatch(r'(\S+) "(test_\w+)"', target).groups()
        assert name in functions_of((PAGE.parent / path).resolve()), label


def test_every_cell_has_a_link_or_a_reason():
    used = set()
    for _, *cells in ROWS:
        assert len(cells) in (4, 5)  # the last function has no implementations
        for cell in cells:
            label = re.fullmatch(r"\[[^]]+\]\[([\w-]+)\]", cell)
            if label:
                used.add(label[1])
            else:
                assert re.fullmatch(r"[a-zA-Z :]{5,}", cell), cell
    assert used == set(LINKS)


def test_every_implementation_has_a_table_of_the_same_rows():
    tables = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:4]
    assert [table.split("\n")[0] for table in tables] == ['"cpu"', '"xla"', '"naive"']
    first, *others = (
        [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] for table in tables
    )
    assert len(first) > 20 and others == [first, first]
