"""docs/math.md: every formula names tests, and every test that is named exists."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
TEXT = (FOLDER.parents[1] / "docs/math.md").read_text(encoding="utf-8")


def existing():
    return {
        f"{path.name}::{node.name}"
        for path in FOLDER.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_named_test_exists():
    named = set(re.findall(r"`(test_\w+\.py::\w+)`", TEXT))
    assert len(named) > 20
    assert not named - existing()


def test_every_block_of_formulas_is_followed_by_its_tests():
    blocks = TEXT.split("```text\n")[1:]
    assert len(blocks) > 10
    for block in blocks:
        formulas, rest = block.split("```", 1)
        following = rest.split("## ")[0]
        assert re.search(r"^Test: `test_\w+\.py::\w+`", following, re.MULTILINE), formulas


def test_formulas_are_numbered_in_order():
    blocks = "".join(block.split("```")[0] for block in TEXT.split("```text\n")[1:])
    numbers = [int(n) for n in re.findall(r" {2,}\((\d+)\)$", blocks, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
