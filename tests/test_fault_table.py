"""No row of the table of faults is without a test: one that is would be missing from what is printed."""

import re
from pathlib import Path

from fault_table import ROWS

TESTS = Path(__file__).parent


def test_every_row_has_a_test():
    marked = {
        row
        for path in TESTS.rglob("test_*.py")
        for row in re.findall(r'mark\.fault\("(G\d+)"\)', path.read_text())
    }
    assert marked == set(ROWS)
