"""The run folder: what is written, what is refused, and fingerprints that notice changes."""

from __future__ import annotations

import copy
import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from conftest import tiny_model
from topd.errors import TOPDError
from topd.inputs.models.fingerprints import model_fingerprint, trained_digest
from topd.runs import folder as ledger
from topd.runs.files import numbered_lines, read_lines, trim
from topd.runs.folder import (
    RunFolder,
    check_run_folder,
    files_in,
    guidance_record,
    manifest,
    rollout_record,
)
from topd.runs.records import FORMAT, Fork
from topd.types import Branch, Guidance, Prompt, Rollout, SoftTarget

ROLLOUT = Rollout(Prompt(3, (1, 2), (1,)), (7, 8), (-0.5, -1.25), finished=True)


def little() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)).double()


# Reading lines


def test_a_file_of_lines_is_read_up_to_where_it_was_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert list(numbered_lines(path)) == []  # missing
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xc3\xa9"}\n{"a": 3')
    assert list(numbered_lines(path)) == [(1, {"a": 1}), (3, {"a": "é"})]
    assert list(read_lines(path)) == [{"a": 1}, {"a": "é"}]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')  # whole, but for its end
    assert list(read_lines(path)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"broken", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must be a JSON object"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, says):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(TOPDError, match=rf"lines\.jsonl, line 2: {says}"):
        list(read_lines(path))


@pytest.mark.parametrize("half", [b'{"a"', bytes(99), bytes(9) + b'": 1}\n', b"[]\n"])
def test_a_damaged_last_line_is_cut_and_one_before_the_last_is_named(tmp_path, half):
    path, whole = tmp_path / "lines.jsonl", b'{"a": 1}\n{"a": 2}\n'
    path.write_bytes(whole + half)
    assert trim(path, lambda record: record["a"] < 3) == 2
    assert path.read_bytes() == whole
    damaged = whole + half.rstrip(b"\n") + b"\n" + whole
    path.write_bytes(damaged)
    with pytest.raises(TOPDError, match=r"lines\.jsonl, line 3: not a record .*not the last"):
        trim(path, lambda record: record["a"] < 3)
    assert path.read_bytes() == damaged
    assert trim(path, lambda record: record["a"] < 2) == 1  # what follows is cut anyway


def test_a_line_may_be_of_any_kind_where_that_is_asked_for(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{}\n[1]\n"a"\n')
    assert list(read_lines(tmp_path / "lines.jsonl", object)) == [{}, [1], "a"]


# Writing


def test_a_file_is_written_whole_and_replaced_whole(tmp_path):
    book = RunFolder(tmp_path / "deep" / "run")
    for record in ({"seed": 1, "note": "long " * 100}, {"seed": 2}):
        book.write("config.json", record)
        assert json.loads((book.folder / "config.json").read_text()) == record
    assert [file.name for file in book.folder.iterdir()] == ["config.json"]


def test_a_run_says_its_format_first_and_other_files_do_not(tmp_path):
    book = RunFolder(tmp_path)
    for name in ("run.json", "config.json"):
        book.write(name, {"seed": 1})
    assert list(json.loads((tmp_path / "run.json").read_text())) == ["format", "seed"]
    assert json.loads((tmp_path / "run.json").read_text())["format"] == FORMAT
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["seed"]


def test_a_file_is_readable_and_what_json_does_not_know_is_text(tmp_path):
    RunFolder(tmp_path).write("config.json", {"seed": 1, "path": Path("a")})
    assert (tmp_path / "config.json").read_text() == '{\n  "seed": 1,\n  "path": "a"\n}\n'


def test_a_record_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    book = RunFolder(tmp_path)
    book.write("config.json", {"seed": 1})

    def full(path: Path, text: str, *args: object, **kwargs: object) -> int:
        with open(path, "w") as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        book.write("config.json", {"seed": 2})
    with open(tmp_path / "config.json") as file:
        assert json.load(file) == {"seed": 1}


def test_records_are_lines_and_are_added_at_the_end(tmp_path):
    book = RunFolder(tmp_path)
    book.append("metrics.jsonl", [{"loss": 1.5}, {"text": "two\nlines"}])
    book.append("metrics.jsonl", iter([{"loss": 0.5}]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": 1.5},
        {"text": "two\nlines"},
        {"loss": 0.5},
    ]


def test_a_rank_that_does_not_write_touches_nothing(tmp_path):
    book = RunFolder(tmp_path / "run", active=False)
    book.write("config.json", {})
    book.append("metrics.jsonl", [{}])
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_a_folder_is_refused_unless_it_goes_on(tmp_path):
    RunFolder(tmp_path).append("metrics.jsonl", [{"loss": 1.0}])
    said = f"output_dir: {tmp_path} already holds a run. Choose another folder, or resume from a "
    for refused in (RunFolder, check_run_folder):
        with pytest.raises(TOPDError) as caught:
            refused(tmp_path)
        assert str(caught.value) == f"{said}checkpoint with resume_from_checkpoint."
    RunFolder(tmp_path, resume=True).append("metrics.jsonl", [{"loss": 0.5}])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_broke_off_before_its_first_log_is_a_run_too(tmp_path):
    """Its rollouts would be mixed with those of the next run."""
    RunFolder(tmp_path).append("rollouts.jsonl", [rollout_record(0, 0, ROLLOUT, (), "so")])
    with pytest.raises(TOPDError, match="already holds a run"):
        RunFolder(tmp_path)


def test_a_file_that_a_run_would_write_into_is_refused(tmp_path):
    (tmp_path / "tokens.jsonl").write_text("{}\n")
    with pytest.raises(TOPDError, match="already holds a run"):
        RunFolder(tmp_path)


def test_a_warm_start_that_broke_off_while_answering_may_go_on(tmp_path):
    RunFolder(tmp_path).append("answers.jsonl", [{}])
    check_run_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TOPDError, match=r"^output_dir: .* \(.+\)\. Choose another folder\.$"):
            check_run_folder(folder)
    said = r"cannot be written \(Not a directory\)\. Choose"
    with pytest.raises(TOPDError, match=said):  # the system's words, without number and path
        check_run_folder(tmp_path / "file" / "run")
    with pytest.raises(TOPDError, match=r"\(.*null (byte|character).*\)\. Choose"):
        check_run_folder(tmp_path / "a\0b")


def test_the_check_leaves_nothing(tmp_path):
    check_run_folder(tmp_path / "some" / "run")
    assert list(tmp_path.iterdir()) == []


# Records


@pytest.mark.parametrize("fault", [FileNotFoundError, FileExistsError])
def test_the_check_outlives_another_rank_that_takes_the_folder_away(tmp_path, monkeypatch, fault):
    """Path.mkdir raises either where a folder goes while it looks at it."""
    faults, mkdir = [fault("gone")], Path.mkdir

    def taken_away(path: Path, *args: object, **kwargs: object) -> None:
        if faults:
            raise faults.pop()
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", taken_away)
    check_run_folder(tmp_path / "run")
    assert not faults


def test_the_manifest_says_what_a_run_was_made_of():
    models = {"student": little(), "teacher": tiny_model()}
    record = manifest(models=models, data="abc", seed=5, device=torch.device("cpu"))
    assert record["versions"]["torch"] == version("torch")
    assert set(record["versions"]) >= {"python", "topd", "transformers", "peft", "POT"}
    assert (record["seed"], record["data"]) == (5, "abc")
    assert record["machine"] == {
        "platform": platform.platform(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    assert record["models"]["student"] == model_fingerprint(models["student"])
    assert record["models"]["teacher"]["class"] == "Qwen3ForCausalLM"
    assert record["models"]["student"]["values"] == 3 * 5 + 5 + 5 + 5 + 5 * 2
    assert json.loads(json.dumps(record)) == record


def test_a_package_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr(ledger, "PACKAGES", ("torch", "no-such-package"))
    found = manifest(models={}, data="", seed=0, device=torch.device("cpu"))["versions"]
    assert found == {
        "python": platform.python_version(),
        "torch": version("torch"),
        "no-such-package": "not installed",
    }


def test_a_rollout_is_recorded_with_its_ids():
    assert json.loads(json.dumps(rollout_record(4, 1, ROLLOUT, (-0.5, -0.25), "so"))) == {
        "step": 4,
        "rollout": 1,
        "prompt": 3,
        "prompt_ids": [1, 2],
        "teacher_prompt_ids": list(ROLLOUT.prompt.teacher),
        "response_ids": [7, 8],
        "logprobs": [-0.5, -1.25],
        "teacher_logprobs": [-0.5, -0.25],
        "finished": True,
        "text": "so",
    }


def test_guidance_is_recorded_without_its_weights_of_one():
    fork = Fork(
        **{"position": 1, "token_loss": 2.5, "distance": 0.75, "real": True, "converged": True},
        **{"teacher_tokens": (9, 8), "student_length": 1, "plan": ((0, 0, 0.5), (0, 1, 0.5))},
    )
    guidance = Guidance(
        (1.0, 0.25),
        (SoftTarget(1, (9,), (1.0,)),),
        capped=(0,),
        branches=(Branch(1, (9, 8), "forward_kl", go_on=2),),
        advantages=(0.0, -0.5),
    )
    record = guidance_record(4, 1, ROLLOUT, (fork,), guidance)
    assert record["targets"][0]["tokens"] is guidance.targets[0].tokens  # not copied by numbers
    assert json.loads(json.dumps(record)) == {
        "step": 4,
        "rollout": 1,
        "prompt": 3,
        "weights": {"1": 0.25},
        "targets": [{"position": 1, "tokens": [9], "probabilities": [1.0]}],
        "capped": [0],
        "branches": [{"start": 1, "tokens": [9, 8], "loss": "forward_kl", "go_on": 2}],
        "advantages": [0.0, -0.5],
        "forks": [
            {
                "position": 1,
                "token_loss": 2.5,
                "distance": 0.75,
                "real": True,
                "teacher_tokens": [9, 8],
                "student_length": 1,
                "plan": [[0, 0, 0.5], [0, 1, 0.5]],
                "converged": True,
            }
        ],
    }


# Fingerprints


def test_a_fingerprint_names_where_a_model_is_from_or_else_its_class():
    found = model_fingerprint(little())
    assert (found["name"], found["class"]) == ("Sequential", "Sequential")
    model = tiny_model()
    assert model_fingerprint(model)["name"] == "Qwen3ForCausalLM"
    model.config._name_or_path = "models/a"
    assert model_fingerprint(model)["name"] == "models/a"


def test_a_model_with_an_adapter_has_the_fingerprint_of_the_one_below_it():
    model = tiny_model()
    model.config._name_or_path = "models/a"
    whole = model_fingerprint(model)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    assert model_fingerprint(get_peft_model(model, adapter)) == whole


def test_a_model_whose_weights_are_made_of_several_tensors_has_a_fingerprint():
    """As torchao's have, which ended a run after its models were loaded."""

    def found(*parts: float) -> str:
        model = nn.Linear(2, 2, bias=False)
        model.weight = nn.Parameter(TwoTensor(*(torch.full((2, 2), part) for part in parts)))
        return model_fingerprint(model)["sha256"]

    assert found(1.0, 2.0) == found(1.0, 2.0)
    assert len({found(1.0, 2.0), found(3.0, 2.0), found(1.0, 3.0), found(2.0, 1.0)}) == 4


def test_a_copy_has_the_same_fingerprint():
    assert model_fingerprint(copy.deepcopy(little())) == model_fingerprint(little())


def test_changing_any_one_weight_by_the_smallest_step_changes_the_fingerprint():
    model = little()
    whole = model_fingerprint(model)["sha256"]
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for i, value in enumerate(flat.tolist()):
            flat[i] = torch.nextafter(flat[i], torch.tensor(torch.inf, dtype=flat.dtype))
            assert model_fingerprint(model)["sha256"] != whole
            flat[i] = value
    assert model_fingerprint(model)["sha256"] == whole


def test_name_shape_and_type_of_a_parameter_count():
    prints = {
        model_fingerprint(model)["sha256"]
        for model in (
            nn.ParameterDict({"a": torch.zeros(2, 3)}),
            nn.ParameterDict({"b": torch.zeros(2, 3)}),
            nn.ParameterDict({"a": torch.zeros(3, 2)}),
            nn.ParameterDict({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}),
        )
    }
    assert len(prints) == 4


def test_one_step_of_training_changes_the_fingerprint():
    model = tiny_model()
    before = model_fingerprint(model)
    model(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    after = model_fingerprint(model)
    assert before["sha256"] != after["sha256"]
    assert before["values"] == after["values"]


def test_a_digest_of_the_student_notices_a_step_of_any_trained_parameter_and_no_other():
    """64 spaced values of each: all of the small ones, and some of the large."""
    model = little()
    large = nn.Parameter(torch.zeros(64 * 7))
    model.register_parameter("large", large)
    model[1].requires_grad_(False)
    whole = trained_digest(model)
    model[1].weight.data += 1
    large.data[1] = 1  # stands between two that are looked at
    assert trained_digest(model) == whole
    for parameter in (*model[0].parameters(), *model[2].parameters()):
        for flat in (parameter.data.view(-1)[i : i + 1] for i in range(parameter.numel())):
            flat += 1
            assert trained_digest(model) != whole
            flat -= 1
    large.data[7] = 1
    assert trained_digest(model) != whole


def test_files_of_a_folder_are_named_from_the_run_folder_in_order_without_cards(tmp_path):
    for name in ("student/b.safetensors", "student/in/a.json", "student/README.md", "other/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert files_in(tmp_path, "student", "adapter") == [
        "student/b.safetensors",
        "student/in/a.json",
    ]


@pytest.mark.parametrize("name", ["gate.json", "responses.jsonl", "responses.begun.jsonl"])
def test_no_run_begins_where_an_evaluation_is(tmp_path, name):
    (tmp_path / name).touch()
    for resume in (True, False):
        with pytest.raises(TOPDError, match="holds an evaluation or a gate, whole or stopped"):
            check_run_folder(tmp_path, resume=resume, begun=["base_problems.begun.jsonl"])


def test_an_evaluation_that_was_stopped_continues_with_files_of_its_own(tmp_path):
    RunFolder(tmp_path).append("responses.begun.jsonl", [{}])
    RunFolder(tmp_path, begun=["responses.begun.jsonl"]).append("responses.begun.jsonl", [{}])
    assert len((tmp_path / "responses.begun.jsonl").read_text().splitlines()) == 2
