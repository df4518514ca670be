"""The chain of hashes: whatever is done to it afterwards is found, and named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topd.errors import TOPDError
from topd.runs.files import digest
from topd.runs.folder import RunFolder
from topd.runs.ledger import HEAD, LEDGER, Ledger, check_chain, ended, entry_hash, surviving


def chain_of(folder, *contents: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The entries and the head of a chain with these contents, one call each."""
    chain = Ledger(folder)
    for content in contents:
        chain.add([content])
    return entries(folder), json.loads((folder / HEAD).read_text())


def entries(folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return chain_of(tmp_path_factory.mktemp("run"), *({"record": str(n)} for n in range(5)))


def test_an_entry_is_hashed_with_the_hash_before_it(five):
    found, head = five
    assert [entry["n"] for entry in found] == [0, 1, 2, 3, 4]
    assert found[0]["previous"] == "0" * 64
    assert [entry["previous"] for entry in found[1:]] == [entry["hash"] for entry in found[:-1]]
    assert head == {"entries": 5, "hash": found[-1]["hash"]}
    written = f'{{"n":1,"previous":"{found[0]["hash"]}","record":"1"}}'
    assert found[1]["hash"] == digest(written.encode())


def test_nothing_is_wrong_with_a_chain_as_it_was_written(five):
    assert list(check_chain(*five)) == []


@given(data=st.data())
def test_any_change_to_any_entry_is_found_with_its_number(five, data):
    found, head = [dict(entry) for entry in five[0]], five[1]
    n = data.draw(st.integers(0, 4))
    key = data.draw(st.sampled_from(["record", "previous", "hash"]))
    found[n][key] = data.draw(st.text().filter(lambda text: text != found[n][key]))
    faults = list(check_chain(found, head))
    assert any(f"entry {n} was changed" in fault for fault in faults)


@given(data=st.data())
def test_a_changed_entry_with_its_hash_made_anew_is_found_behind_it(five, data):
    found, head = [dict(entry) for entry in five[0]], five[1]
    n = data.draw(st.integers(0, 4))
    found[n]["record"] = "forged"
    found[n]["hash"] = entry_hash(found[n])
    faults = list(check_chain(found, head))
    place = (
        f"entry {n + 1} does not follow" if n < 4 else f"{HEAD}: its hash is not that of entry 4"
    )
    assert len(faults) == 1
    assert place in faults[0]


@pytest.mark.parametrize(
    ("kept", "fault"),
    [
        ([1, 2, 3, 4], "entry 0 is missing"),
        ([0, 1, 3, 4], "entry 2 is missing"),
        ([0, 4], "entries 1 to 3 are missing"),
        ([0, 1, 2, 3], "its end is missing, entry 4 is gone"),
        ([], "its end is missing, entries 0 to 4 are gone"),
        ([0, 2, 1, 3, 4], "entry 1 comes after entry 2"),
        ([0, 1, 1, 2, 3, 4], "entry 1 comes after entry 1"),
    ],
)
def test_missing_moved_and_repeated_entries_are_named(five, kept, fault):
    found, head = five
    assert any(fault in said for said in check_chain([found[n] for n in kept], head))


def test_a_chain_that_is_written_anew_is_not_that_of_the_head(five, tmp_path):
    forged, _ = chain_of(tmp_path, *({"record": str(n % 4)} for n in range(5)))
    assert list(check_chain(forged, five[1])) == [
        f"{HEAD}: its hash is not that of entry 4: the chain was rewritten"
    ]


def test_a_head_that_counts_more_than_there_is_is_told_from_a_cut_end(five):
    found, head = five
    assert list(check_chain(found, {**head, "entries": 6})) == [
        f"{HEAD}: counts 6 entries, the chain has 5"
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_chain_goes_on_where_it_ended(tmp_path, count):
    Ledger(tmp_path).add({"record": str(n)} for n in range(count))
    assert list(check_chain(*chain_of(tmp_path, {"record": "next"}))) == []
    assert [entry["n"] for entry in entries(tmp_path)] == list(range(count + 1))


# as SIGKILL leaves a line, and as file systems do after a power cut
HALVES = [b'{"n": 2, "rec', bytes(99), bytes(9) + b'", "hash": "0"}\n', b'{"n": 2}\n', b"\xff\n"]


@pytest.mark.parametrize("half", HALVES)
def test_a_chain_goes_on_where_it_ended_and_drops_a_half_written_entry(tmp_path, half):
    chain_of(tmp_path, {"record": "a"}, {"record": "b"})
    with open(tmp_path / LEDGER, "ab") as file:
        file.write(half)
    assert list(check_chain(*chain_of(tmp_path, {"record": "c"}))) == []
    assert [entry["record"] for entry in entries(tmp_path)] == ["a", "b", "c"]


def test_a_chain_with_more_than_one_damaged_entry_at_its_end_is_refused_with_its_line(tmp_path):
    chain_of(tmp_path, {"record": "a"})
    content = (tmp_path / LEDGER).read_bytes() + b'{"n": 1}\n{"n": 2, "rec'
    (tmp_path / LEDGER).write_bytes(content)
    with pytest.raises(TOPDError, match=r"ledger\.jsonl, line 2: is not an entry.*Bring"):
        Ledger(tmp_path)
    assert (tmp_path / LEDGER).read_bytes() == content


def test_a_run_has_ended_only_if_it_did_not_begin_again_since():
    begin, end = {"event": "begin"}, {"event": "end", "step": 3}
    assert ended([begin, {"file": "run.json"}, end]) == end
    assert ended([begin, end, begin, {"event": "update"}]) is None
    assert ended([begin, end, begin, {**end, "step": 5}]) == {**end, "step": 5}
    assert ended([]) is None


def test_updates_that_were_made_again_and_files_written_again_count_once():
    def record(file: str, step: int, name: str) -> dict[str, Any]:
        return {"file": file, "step": step, "record": name}

    found = surviving(
        [
            {"event": "begin", "step": 0, "records": {"rollouts.jsonl": 0, "metrics.jsonl": 0}},
            {"file": "run.json", "record": "old"},
            record("rollouts.jsonl", 0, "a"),
            record("metrics.jsonl", 1, "b"),
            record("rollouts.jsonl", 1, "gone"),
            record("metrics.jsonl", 1, "gone"),  # the summary, of a run that seemed to end here
            {"event": "begin", "step": 1, "records": {"metrics.jsonl": 1, "rollouts.jsonl": 1}},
            {"file": "run.json", "record": "new"},
            record("rollouts.jsonl", 1, "c"),
        ]
    )
    assert [entry["record"] for entry in found] == ["new", "a", "c", "b"]


def test_a_run_that_begins_again_notes_at_which_update_and_on_top_of_how_many_records(tmp_path):
    first = RunFolder(tmp_path, chained=True)
    first.begin(0)
    first.append("rollouts.jsonl", [{"step": 0}, {"step": 0}, {"step": 1}])
    RunFolder(tmp_path, chained=True, resume=True).begin(2)
    begun = [entry for entry in entries(tmp_path) if entry.get("event") == "begin"]
    assert [entry["step"] for entry in begun] == [0, 2]
    assert [entry["records"] for entry in begun] == [
        {"metrics.jsonl": 0, "rollouts.jsonl": 0, "guidance.jsonl": 0},
        {"metrics.jsonl": 0, "rollouts.jsonl": 3, "guidance.jsonl": 0},
    ]


def test_what_a_ledger_writes_is_in_its_chain(tmp_path):
    ledger = RunFolder(tmp_path, chained=True)
    ledger.begin(0)
    ledger.write("run.json", {"seed": 1})
    ledger.append("rollouts.jsonl", [{"step": 0, "rollout": 1, "prompt": 7, "text": "so"}])
    ledger.append("tokens.jsonl", [{"id": 1}])
    written = entries(tmp_path)
    assert [entry.get("file", entry.get("event")) for entry in written] == [
        "begin",
        "run.json",
        "rollouts.jsonl",
    ]
    line = (tmp_path / "rollouts.jsonl").read_text().removesuffix("\n")
    assert written[2]["record"] == digest(line.encode())
    assert (written[2]["step"], written[2]["rollout"], written[2]["prompt"]) == (0, 1, 7)
    assert written[1]["record"] == digest((tmp_path / "run.json").read_bytes())


def test_only_a_chained_ledger_keeps_a_chain(tmp_path):
    RunFolder(tmp_path).append("rollouts.jsonl", [{"step": 0}])
    assert not (tmp_path / LEDGER).exists()
