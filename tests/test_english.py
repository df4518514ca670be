"""The worst phrases that readers stumbled over do not come back: docs, messages and help."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STIFF = re.compile(
    r"\bis no (mapping|number|URL|folder|file|entry|list|name)\b|\bbegins? anew\b|\banew\b|"
    r"\bof (now|then)\b|[Ss]ee to its rights|\bgoes on\b|\bgo on (from|with)\b|beside other work|"
    r"belongs? into|that there is not\b|one seed decides|edited by hand but|"
    r"beyond the interval|in OPD's time|whole or not"
)


def texts() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "src", "docs", "recipes", "README.md", "CONTRIBUTING.md"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    kinds = {".py", ".md", ".js", ".j2", ".yaml"}
    return [f for f in listed if Path(f).suffix in kinds and f != "docs/log.md"]


@pytest.mark.skipif(not texts(), reason="not a git checkout: the files are not known")
def test_plain_english() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in texts()
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        if STIFF.search(line)
    ]
    assert not found, "\n".join(found)
