"""docs/modes.md tells what the code decides by."""

from pathlib import Path

from dualpath_sgl.start.verdict import table

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"


def test_the_page_has_a_row_for_each_obstacle_of_decode_side_loads_and_no_other():
    section = PAGE.read_text().split("## What `auto` chooses")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    told = [f"| {case} | {why} |" for case, why in table()]
    assert rows[1:-1] == told, "the table should be:\n" + "\n".join(told)
