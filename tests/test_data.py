"""Rows from files, folders and generators; the contest files that the evaluation uses."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from conftest import rows, tiny_tokenizer
from topd.errors import TOPDError
from topd.evaluate.answers import reference_text
from topd.inputs.prompt_rows import plain_rows, read_row
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.training.startup import rows_of

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
ROWS = rows(6)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """The same rows in every form."""
    root = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    data = datasets.Dataset.from_list(ROWS)
    (root / "prompts.jsonl").write_text(lines)
    (root / "array.json").write_text(json.dumps(ROWS))
    data.to_parquet(root / "prompts.parquet")
    data.save_to_disk(root / "saved")
    (root / "folder").mkdir()
    (root / "folder" / "train.jsonl").write_text(lines)
    (root / "folder" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return root


def load(path: Path, **options: Any) -> list[dict[str, Any]]:
    return DataSpec(path=str(path), **options).load()


@pytest.mark.parametrize(
    "name", ["prompts.jsonl", "array.json", "prompts.parquet", "saved", "folder"]
)
def test_every_form_gives_the_same_rows_in_order(stored, name):
    assert load(stored / name, chat=False) == ROWS


def test_a_folder_has_splits(stored):
    assert load(stored / "folder", split="test", chat=False) == ROWS[:1]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet", "saved"])
@pytest.mark.parametrize("split", ["test", "train[:2]"])
def test_a_split_of_what_has_none_is_refused_or_obeyed_but_never_ignored(stored, name, split):
    try:
        loaded = load(stored / name, split=split, chat=False)
    except TOPDError as error:
        assert "split" in str(error)
    else:
        assert split == "train[:2]"
        assert loaded == ROWS[:2]


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    for word in ("first", "other"):
        path.write_text(json.dumps({"prompt": word}) + "\n")
        assert load(path, chat=False) == [{"prompt": word}]


def test_with_chat_a_string_becomes_a_user_message_and_messages_stay(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "what"}\n')
    assert load(path)[0]["prompt"] == [{"role": "user", "content": "what"}]
    asked = [{"role": "system", "content": "add"}, {"role": "user", "content": "what"}]
    path.write_text(json.dumps({"prompt": asked}) + "\n")
    assert load(path)[0]["prompt"] == asked


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (4, 4), (100, 6), (None, 6)])
def test_limit_takes_the_first_rows(stored, limit, count):
    assert load(stored / "prompts.jsonl", limit=limit, chat=False) == ROWS[:count]


def test_columns_are_mapped_through_dots_and_the_others_stay(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {"q": "what", "meta": {"steps": {"full": "so"}}, "turns": ["a", "b"], "answer": "3"}
    path.write_text(json.dumps(row) + "\n")
    columns = {"prompt": "q", "solution": "meta.steps.full", "messages": "turns.1"}
    loaded = load(path, columns=columns, chat=False)
    assert loaded == [{**row, "prompt": "what", "solution": "so", "messages": "b"}]


def test_mapped_messages_go_before_a_column_that_is_called_prompt(tmp_path):
    path, asked = tmp_path / "x.jsonl", [{"role": "user", "content": "what"}]
    path.write_text(json.dumps({"prompt": "ID-1", "talk": asked, "text": "what"}) + "\n")
    (row,) = load(path, columns={"messages": "talk"})
    assert row["messages"] == asked
    assert "prompt" not in row
    (row,) = load(path, columns={"messages": "text"})  # a text, as in prompt
    assert row["messages"] == asked
    assert load(path, columns={"prompt": "text", "messages": "talk"})[0]["prompt"] == asked


@pytest.mark.parametrize("place", ["gold", "about.gold"])
def test_a_mapped_answer_that_a_row_of_json_lacks_is_an_empty_one(tmp_path, place):
    """As in a table, whose cell is empty there. A prompt, or what no row has, is refused."""
    file = tmp_path / "some.jsonl"
    file.write_text('{"q": "a"}\n{"q": "b", "gold": "3", "about": {"gold": "3"}}\n{"gold": "4"}')
    columns = {"prompt": "q", "answer": place}
    found = load(file, columns=columns, chat=False, limit=2)
    assert [row["answer"] for row in found] == [None, "3"]
    assert not DataSpec(path=str(file), columns=columns, chat=False).has_messages()
    with pytest.raises(TOPDError, match=r"row 2: no column 'q'\. It has gold"):
        load(file, columns=columns)
    with pytest.raises(TOPDError, match=rf"row 0: no column '{place}'\. It has q"):
        load(file, columns=columns, limit=1)


def test_a_column_may_have_a_dot_in_its_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"meta.q": "what", "meta": {"q": "so"}}\n')
    assert load(path, columns={"prompt": "meta.q"}, chat=False)[0]["prompt"] == "what"


def test_nan_in_a_file_is_a_missing_value(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "what", "answer": NaN, "more": {"solution": NaN, "list": [NaN]}}\n')
    (row,) = load(path, columns={"prompt": "q", "solution": "more.solution"}, chat=False)
    assert (row["answer"], row["solution"]) == (None, None)
    assert str(row["more"]["list"]) == "[nan]"


def test_columns_may_be_exchanged(stored):
    columns = {"prompt": "solution", "solution": "prompt"}
    loaded = load(stored / "prompts.jsonl", columns=columns, chat=False)
    assert loaded[0] == {"prompt": ROWS[0]["solution"], "solution": ROWS[0]["prompt"]}


def test_a_final_assistant_turn_becomes_the_solution(tmp_path):
    path, tokenizer = tmp_path / "x.jsonl", tiny_tokenizer()
    asked, said = {"role": "user", "content": "what is 1 + 2 ?"}, "the answer is 3 ."
    path.write_text(
        json.dumps({"messages": [asked, {"role": "assistant", "content": said}]}) + "\n"
    )
    encoder = PromptEncoder(tokenizer, tokenizer, teacher_prompt="{{ prompt }} {{ solution }}")
    (prompt,) = encoder.encode(load(path), with_response=True)
    assert tokenizer.decode(prompt.student) == "<|user|> what is 1 + 2 ? <|assistant|>"
    assert tokenizer.decode(prompt.response) == f"{said} </s>"
    assert said in tokenizer.decode(prompt.teacher)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["messages", "prompt", "solution"])
def test_messages_that_a_table_made_a_text_of_are_refused(tmp_path, chat, name):
    messages, path = [{"role": "user", "content": "what is 1 + 2 ?"}], tmp_path / "x.csv"
    for text in (str(messages), json.dumps(messages, indent=1), str([{"from": "human"}])):
        row = {"prompt": "what", name: text} if name == "solution" else {name: text}
        pandas.DataFrame([row]).to_csv(path, index=False)
        what = "solution" if name == "solution" else "prompt"
        with pytest.raises(TOPDError, match=f"data row 0: the {what} is a text that looks like"):
            PromptEncoder(tiny_tokenizer(), tiny_tokenizer()).encode(load(path, chat=chat))


@pytest.mark.parametrize("key", ["role", "content", "from", "value"])
def test_an_answer_in_json_is_no_messages(key):
    """As where entities, flights or amounts are asked for."""
    solution = json.dumps([{key: "Paris", "to": "London"}])
    assert read_row(0, {"prompt": "which ?", "solution": solution}).solution == solution
    said = json.dumps([{"content": "what ?", "role": "user"}])
    with pytest.raises(TOPDError, match="looks like messages"):
        read_row(0, {"prompt": "which ?", "solution": said})


def test_a_whole_number_of_a_column_with_a_gap_is_learned_as_it_was(tmp_path):
    rows = {"prompt": ["what is 1 + 2 ?"] * 3, "solution": [3.0, 2.5, None]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    loaded = load(tmp_path / "x.parquet")
    assert [read_row(i, row).solution for i, row in enumerate(loaded)] == ["3", "2.5", None]
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "solution": 3.0}')
    assert read_row(0, load(tmp_path / "x.jsonl")[0]).solution == "3.0"  # as it is written


def test_a_class_label_is_written_by_its_name_and_counts_as_its_number(tmp_path):
    """As in multiple choice: the letter is the answer, and the place of its text."""
    columns = {"prompt": ["what ?"] * 3, "choices": [["3", "4"]] * 3, "answer": [1, 0, -1]}
    kinds = {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["A", "B"])}
    kinds["choices"] = [datasets.Value("string")]
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "x.parquet")
    loaded = load(tmp_path / "x.parquet", columns={"solution": "answer"})
    assert [reference_text(row["answer"]) for row in loaded[:2]] == ["B", "A"]
    assert [read_row(i, row).solution for i, row in enumerate(loaded)] == ["B", "A", None]
    assert str(load(tmp_path / "x.parquet", limit=1)[0]["answer"]) == "B"
    assert str(pickle.loads(pickle.dumps(loaded[0]["answer"]))) == "B"  # to another process
    encoder = PromptEncoder(
        tiny_tokenizer(), tiny_tokenizer(), "{{ answer }} {{ choices[answer] }}", with_rows=True
    )
    found = encoder.encode(data.select([0, 1]))
    assert [tiny_tokenizer().decode(prompt.teacher) for prompt in found] == ["<unk> 4", "<unk> 3"]
    assert [str(prompt.row["answer"]) for prompt in found] == ["B", "A"]
    assert [str(row["answer"]) for row in plain_rows(data.to_iterable_dataset())][:2] == ["B", "A"]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_rows_of_a_data_set_are_those_stored_whatever_its_format(kind, tmp_path):
    """numpy's and torch's make numbers of 32 bits of all."""
    columns = {"prompt": ["what ?"], "solution": [0.123456789012], "answer": ["x"]}
    data = datasets.Dataset.from_dict(columns)
    assert plain_rows(data.with_format(kind)) == [*data]
    two = data.with_format(kind, ["prompt", "solution"])
    assert plain_rows(two) == [*data.remove_columns("answer")]
    data.with_format(kind).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", chat=False) == [*data]


def test_a_transform_of_a_data_set_is_made():
    data = datasets.Dataset.from_dict({"prompt": ["what"]})
    made = data.with_transform(lambda rows: {"prompt": [f"{text} ?" for text in rows["prompt"]]})
    assert plain_rows(made) == [{"prompt": "what ?"}]


@pytest.mark.parametrize(("kind", "pi"), [("float16", 3.14), ("float32", 3.141593)])
def test_short_numbers_are_read_with_the_digits_that_they_were_written_with(tmp_path, kind, pi):
    texts = ["0.1", str(pi), "3", None]
    numbers = {"prompt": ["what ?"] * 4, "solution": [0.1, pi, 3.0, None]}
    frame = pandas.DataFrame(numbers).astype({"solution": kind})
    if kind == "float32":  # pandas writes no others
        frame.to_parquet(tmp_path / "x.parquet")
        stored = load(tmp_path / "x.parquet", chat=False)
        assert [read_row(i, row).solution for i, row in enumerate(stored)] == texts
    frame[7] = frame["solution"]  # names may be numbers
    given = [rows_of(frame), [{"prompt": "what ?", "solution": x} for x in frame["solution"].array]]
    for rows_ in given:
        plain = plain_rows(rows_)
        assert [read_row(i, row).solution for i, row in enumerate(plain)] == texts


def test_numbers_and_labels_inside_of_columns_are_read_as_those_of_columns(tmp_path):
    label, short = datasets.ClassLabel(names=["A", "B"]), datasets.Value("float32")
    kinds = {"prompt": datasets.Value("string"), "m": {"l": label, "x": short}}
    kinds["s"] = datasets.List({"l": label, "x": datasets.LargeList(short)})
    columns = {"prompt": ["what ?"] * 2, "m": [{"l": 1, "x": 0.1}, None]}
    columns["s"] = [[{"l": 0, "x": [0.1, None]}, {"l": -1, "x": None}], None]
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    data.to_parquet(tmp_path / "x.parquet")
    first, second = load(tmp_path / "x.parquet", chat=False, limit=2)
    assert (str(first["m"]["l"]), first["m"]["x"]) == ("B", 0.1)
    assert [str(part["l"]) for part in first["s"]] == ["A", "None"]
    assert [part["x"] for part in first["s"]] == [[0.1, None], None]
    assert second["s"] is None
    mapped = load(tmp_path / "x.parquet", columns={"solution": "s.0.l"}, limit=1)
    assert str(mapped[0]["solution"]) == "A"


@pytest.mark.parametrize("kind", [datasets.Image(), datasets.List(datasets.Image()), "sound"])
def test_pictures_and_sound_are_refused_by_their_kind_and_not_decoded(tmp_path, kind):
    """Their names are any, and what decodes them may not be installed."""
    file = {"bytes": b"no picture", "path": "a"}
    cell = [file] if isinstance(kind, datasets.List) else file
    data = datasets.Dataset.from_dict({"prompt": ["what ?"] * 2, "shown": [None, cell]})
    kind = datasets.Audio() if kind == "sound" else kind
    data.info.features["shown"] = kind
    data.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(TOPDError, match="row 1: has shown, which are not read"):
        load(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet", limit=1)[0]["shown"] is None


# The task generator


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    pytest.importorskip("reasoning_gym", reason="needs topd[tasks]")
    columns = {"prompt": "question", "solution": "metadata.answer_cot"}
    return {"task": "gsm_symbolic", "size": 5, "columns": columns}


def test_a_task_gives_the_same_rows_for_the_same_seed(task):
    first, again = DataSpec(**task, seed=1).load(), DataSpec(**task, seed=1).load()
    assert first == again
    assert first != DataSpec(**task, seed=2).load()
    assert len({row["question"] for row in first}) == 5


def test_a_task_maps_columns_and_makes_messages(task):
    row = DataSpec(**task).load()[0]
    assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    assert row["solution"] == row["metadata"]["answer_cot"] != ""


def test_limit_takes_the_first_rows_of_a_task(task):
    assert DataSpec(**task, limit=2).load() == DataSpec(**task).load()[:2]


# The files of the evaluation

CONTESTS = {
    "gsm8k_train": (7473, "question", {"solution": "answer"}),
    "gsm8k_test": (1319, "question", {"solution": "answer"}),
    "math500": (500, "problem", {"solution": "answer"}),
    "aime24": (30, "problem", {}),
    "aime25": (30, "problem", {}),
    "hmmt25_feb": (30, "problem", {}),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_a_contest_file_loads_with_its_columns_mapped(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    count, question, columns = CONTESTS[name]
    loaded = load(path, columns={"prompt": question, **columns})
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(loaded) == len(written) == count
    for row, line in zip(loaded[:30], written, strict=False):
        assert row["prompt"] == [{"role": "user", "content": line[question]}]
        assert row["answer"] == line["answer"]
        assert all(row[ours] == line[theirs] for ours, theirs in columns.items())


# Values stay as they are written

STORED = """{"prompt": "q", "answer": "2024-02-29", "digits": 123456789012345678901234567890}
{"prompt": "q", "answer": 0.00001000, "list": ["2"]}

{"prompt": "q", "answer": 5}
"""


def test_a_long_cell_of_a_table_is_read(tmp_path) -> None:
    (tmp_path / "x.csv").write_text(f"prompt\n{'a ' * 100_000}\n")
    (row,) = DataSpec(path=str(tmp_path / "x.csv"), chat=False).load()
    assert len(row["prompt"]) == 200_000


@pytest.mark.parametrize("name", ["x.jsonl", "X.JSONL", "x.ndjson", "x.jsonl.gz", "x.v2.jsonl"])
def test_json_lines_are_read_as_they_are_written(tmp_path, name):
    content = b"\xef\xbb\xbf" + STORED.replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = DataSpec(path=str(tmp_path / name), chat=False).load()
    assert [str(row["answer"]) for row in found] == ["2024-02-29", "0.00001000", "5"]
    assert found[0]["digits"] == 123456789012345678901234567890
    assert found[1]["answer"] == 1e-5
    assert [set(row) - {"prompt", "answer"} for row in found] == [{"digits"}, {"list"}, set()]
    assert DataSpec(path=str(tmp_path / name), split="train[1:]", limit=1, chat=False).load() == [
        found[1]
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '[{"prompt": "q", "answer": "5"}]'),
        ("x.json", '{"version": 1, "data": [{"prompt": "q", "answer": "5"}]}'),
        ("x.json", '{"prompt": "q", "answer": "5"}\n'),
        ("x.json", '{"prompt": "q", "answer": "5"}\r'),
        ("x.csv", "prompt,answer\nq,5\n"),
        ("x.tsv", "prompt\tanswer\nq\t5\n"),
    ],
)
def test_other_files_of_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    expected = {"prompt": "q", "answer": "5"}
    assert DataSpec(path=str(tmp_path / name), chat=False).load() == [expected]


def test_a_line_ends_where_the_file_ends_it_and_nowhere_else(tmp_path):
    """Lines of JSON in a file of JSON; other ends of lines may be in a text."""
    (tmp_path / "x.json").write_text('{"prompt": "q\u2028\x85r"}\r\n{"prompt": "s"}\n', newline="")
    found = DataSpec(path=str(tmp_path / "x.json"), chat=False).load()
    assert [row["prompt"] for row in found] == ["q\u2028\x85r", "s"]


@pytest.mark.parametrize("text", ['{"prompt": "q"}\n[1]\n', '{"prompt": "q"}\n{"a": '])
def test_a_line_that_is_no_row_is_named(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(TOPDError, match=r"x\.jsonl: cannot be read.*line 2 is not a row of JSON"):
        DataSpec(path=str(tmp_path / "x.jsonl")).load()


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "x.txt").write_text("What is 2 + 3?")
    with pytest.raises(TOPDError, match=r"x\.txt: cannot be read.*its name ends otherwise"):
        DataSpec(path=str(tmp_path / "x.txt")).load()


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("data.py", "", "RuntimeError: Dataset scripts are no longer supported"),
        ("dataset_dict.json", "[]", "not as save_to_disk writes it"),
        ("dataset_dict.json", '{"splits": null}', "not as save_to_disk writes it"),
        ("state.json", "{}", "not as save_to_disk writes it"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_words(tmp_path, name, content, fault):
    folder = tmp_path / "data"
    folder.mkdir()
    for file, text in {"dataset_info.json": "{}", name: content}.items():
        (folder / file).write_text(text)
    with pytest.raises(TOPDError, match=rf"data: cannot be read.*{fault}"):
        load(folder)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.parquet", "saved"])
def test_a_configuration_of_what_has_none_is_refused(stored, name):
    with pytest.raises(TOPDError, match="no configurations, so name 'main' has no effect"):
        load(stored / name, name="main")
    with pytest.raises(ValueError, match="name has no effect with testbed"):
        DataSpec(path="testbed://logic", name="main")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "q", "solution": "2024-02-29"}\n{"prompt": "r", "solution": 1.50}'),
        ("a.json", '{"version": 1, "data": [{"prompt": "q", "solution": 0.00001}]}'),
        ("a.csv", "prompt,solution\nNull,007\nq,NA\nr,true\n"),
        ("a.tsv", "prompt\tsolution\nq\t1.50\nr\t2\n"),
    ],
)
def test_a_folder_is_read_as_its_files_are(tmp_path, name, text):
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_text(text)
    found, alone = load(file.parent), load(file)
    assert found == alone
    assert [str(row["solution"]) for row in found] == [str(row["solution"]) for row in alone]


def test_names_that_are_patterns_are_read_as_names_or_refused(tmp_path):
    """datasets would read of [1] what is in 1."""
    for name in ("1", "[1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"prompt": f"in {name}"}))
        datasets.Dataset.from_list([{"prompt": name}]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(TOPDError, match=r"takes for a pattern of names\. Rename that folder"):
        load(tmp_path / "[1]")
    assert load(tmp_path / "[1]" / "train.jsonl", chat=False) == [{"prompt": "in [1]"}]
    assert load(tmp_path / "[1].parquet", chat=False) == [{"prompt": "[1]"}]


@pytest.mark.parametrize("text", ["prompt;solution\nq;1\n", "sep=;\nq;1\n", "prompt\tx\nq\t1\n"])
def test_a_table_with_other_marks_between_its_columns_is_refused_as_one(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(TOPDError, match=r"separated by '(;|\\t)'\. Save it with commas"):
        load(tmp_path / "x.csv")


def test_packed_files_of_a_folder_whose_types_would_be_guessed_are_refused(tmp_path):
    (tmp_path / "train.csv.bz2").write_bytes(bz2.compress(b"prompt,solution\nwhat,007\n"))
    with pytest.raises(TOPDError, match=r"train\.csv\.bz2 is packed\. Unpack it, or pack it with"):
        load(tmp_path)


def test_what_datasets_has_in_its_cache_changes_no_reading(tmp_path):
    """A folder that it had read was left to it, with the types that it guesses."""
    (tmp_path / "a.csv").write_text("prompt,solution\nq,007\n")
    assert datasets.load_dataset(str(tmp_path), split="train")[0]["solution"] == 7
    assert load(tmp_path)[0]["solution"] == "007"


@pytest.mark.parametrize(("name", "text"), [("b.jsonl", ""), ("b.jsonl", "\n"), ("a.jsonl", "")])
def test_of_several_files_one_may_have_no_rows(tmp_path, name, text):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "r"}\n')
    (tmp_path / name).write_text(text)
    rest = ["r"] if name == "a.jsonl" else ["q", "r"]
    assert [row["prompt"] for row in load(tmp_path, chat=False)] == rest
    for file in tmp_path.iterdir():
        file.write_text("")
    with pytest.raises(TOPDError, match=r"has no rows"):
        load(tmp_path)


def test_the_files_of_a_folder_are_read_in_order_and_by_split(tmp_path, caplog, monkeypatch):
    for name in ("train-0", "train-1", "test"):
        row = {"prompt": name, **({"solution": "3"} if name == "test" else {})}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "notes.csv").write_text("prompt\nmine\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    asked = {"train": 2, "test": 1, "train[1:]": 1, "test+train": 3, "all": 3}
    found = {split: load(tmp_path, split=split, chat=False) for split in asked}
    assert {split: len(rows) for split, rows in found.items()} == asked
    assert [row["prompt"] for row in found["test+train"]] == ["test", "train-0", "train-1"]
    assert "not read: notes.csv. Of" in caplog.text
    with pytest.raises(TOPDError, match=r"Unknown split \"dev\"\. Should be one of"):
        load(tmp_path, split="dev")
    (tmp_path / "train-1.jsonl").write_text("{")
    with pytest.raises(TOPDError, match=r"train-1\.jsonl: line 1 is not a row"):
        load(tmp_path)


def test_a_folder_whose_card_says_how_is_read_so(tmp_path):
    card = "---\nconfigs:\n- config_name: main\n  data_files: a.csv\n  sep: ';'\n---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.csv").write_text("prompt;solution\nwhat, you;x\n")
    (row,) = load(tmp_path, name="main", chat=False)
    assert row == {"prompt": "what, you", "solution": "x"}


@pytest.mark.parametrize("solution", [["3", "4"], b"3"])
def test_a_solution_that_is_no_text_is_not_called_a_prompt(solution):
    with pytest.raises(TOPDError, match=r"row 0: the solution is a text.*solution: NAME\.0"):
        read_row(0, {"prompt": "1 + 2 =", "solution": solution})
