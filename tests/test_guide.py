"""What docs/guide.md tells readers to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"


def test_the_kernels_work_as_the_guide_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
        if "from rep_fast.ops import" in block
    )
    exec(compile(example, str(GUIDE), "exec"), {})
    assert "torch.Size([8, 10])" in capsys.readouterr().out
