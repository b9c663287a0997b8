"""Units of several tensors, spread over processes: the numbers of one process, by one reduction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("spread.py")


@pytest.mark.slow
@pytest.mark.pitfall(11, 12)
def test_a_set_over_a_mesh(tmp_path: Path) -> None:
    """Sharded by rows, by columns, and only in part; float32, with radial parts up to 1000 times the tangential one."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, capture_output=True, cwd=SCRIPT.parents[2])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 9
    for found in ranks[0]:
        assert found["norm"] == pytest.approx(1, rel=2.5e-7), found["case"]
        assert found["rotation"] == pytest.approx(1, rel=1e-6), found["case"]
        assert found["rows"] == pytest.approx([1] * 7, rel=2.5e-7), found["case"]
        # Rows that are sharded as rows are projected without asking anybody.
        assert found["reductions"] == [1, 1, int(found["case"][0] == "columns")], found["case"]
        assert found["after"][0] == pytest.approx([3] * 7, rel=1e-6), found["case"]
        assert found["others"] == pytest.approx(found["expected"], rel=2e-6), found["case"]
