"""``python -m topd``, the same as ``topd``."""

from topd.cli import app

app()
