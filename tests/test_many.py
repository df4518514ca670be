"""Many rows: what several processes encode is what one encodes, and their errors are its own."""

from __future__ import annotations

import os

import pytest

from conftest import rows, tiny_tokenizer
from topd.errors import TOPDError
from topd.inputs.prompts import PromptEncoder, many

MESSAGES = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows(16)] * 8


@pytest.fixture
def several(monkeypatch) -> None:
    """Two cores, and few rows that count as many."""
    monkeypatch.setattr(many, "MANY", 100)
    monkeypatch.setattr(many, "CHUNK", 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def encoder() -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer(), tiny_tokenizer(), max_length=40)


def test_several_processes_encode_what_one_encodes(several):
    seen = many.mapped(lambda _: os.getpid(), list(range(120)), "numbers")
    assert os.getpid() not in seen
    together = encoder().encode(MESSAGES)
    assert together == encoder().encode(MESSAGES[:64]) + [
        type(p)(p.index + 64, p.student, p.teacher) for p in encoder().encode(MESSAGES[64:])
    ]


def test_a_fault_in_another_process_names_its_row(several):
    long = {"messages": [{"role": "user", "content": 3}]}
    with pytest.raises(TOPDError, match="data row 128"):
        encoder().encode([*MESSAGES, long])
    with pytest.raises(ZeroDivisionError):
        many.mapped(lambda x: 1 / (x - 110), list(range(120)), "numbers")
