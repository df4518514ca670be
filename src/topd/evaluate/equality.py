"""The child process in which answers meet math-verify. Run by file; imports nothing of topd.

Reads a JSON line ``[reference, claim]``, writes ``true`` or ``false``. Model text can make
an algebra system run for hours or fill the memory, and signals do not reach other threads or long
integer operations: so it runs where it can be killed.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress

SECONDS = 3  # for each parse and each comparison; the parent's patience is longer
MEMORY = 4 << 30  # bytes of address space


def limit_memory() -> None:
    """Make too large numbers a MemoryError. Not on macOS, which may refuse such a limit."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def serve() -> None:
    """Answer until the input ends."""
    from math_verify import parse, verify

    limit_memory()
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not be a reply
    halves = [parse(text, parsing_timeout=None) for text in (r"\boxed{\frac{1}{2}}", "0.5")]
    verify(*halves, timeout_seconds=None)  # what is loaded at first use is not in any limit
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, claim = (parse(text, parsing_timeout=SECONDS) for text in json.loads(line))
        same = verify(gold, claim, timeout_seconds=SECONDS)
        print(json.dumps(bool(same)), file=replies, flush=True)


if __name__ == "__main__":
    serve()
