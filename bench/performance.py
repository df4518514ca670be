"""docs/performance.md from the committed results: ``python -m bench.performance``."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import before, decode, gpu, growth, loss, step, transport, windows
from bench.measure import RESULTS, Found, Table, describe

PARTS: dict[str, Callable[[Found], Iterator[Table]]] = {
    "loss": loss.tables,
    "transport": transport.tables,
    "windows": windows.tables,
    "step": step.tables,
    "growth": growth.tables,
    "decode": decode.tables,
    "before": before.tables,
    "gpu": gpu.tables,
}
PAGE = Path("docs/performance.md")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """The head, then every result that is there."""
    parts = [(folder / "performance_head.md").read_text(encoding="utf-8").strip()]
    for name, tables in PARTS.items():
        for path in sorted(folder.glob(f"perf-{name}*.json")):
            found = json.loads(path.read_text())
            parts += [f"## {path.stem.removeprefix('perf-')}", describe(found)]
            parts += map(str, tables(found))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
