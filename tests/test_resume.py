"""A run that was stopped and resumed is the run that was not, bit for bit; damage is named."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from conftest import (
    DEVICE,
    RENAMED,
    USE_CPU,
    gpu_only,
    renamed_model,
    rows,
    tiny_model,
    tiny_tokenizer,
)
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.errors import DISK, StoppedError, TOPDError
from topd.inputs.models.saved import load_saved
from topd.runs import checkpoints

TIMES = ("seconds", "runtime", "per_second")
OPTIONS = {
    "max_steps": 6,  # four updates an epoch: the second one is cut off
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "method": "topd",
    "window_length": 4,
    "candidate_fraction": 0.3,
    "learning_rate": 3e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
}
LORA = {
    "r": 2,
    "lora_dropout": 0.2,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "logging_steps": 4},
    "topd": {"method": "topd", "window_temperature": 1.0},
    "first_fork, bf16": {"method": "first_fork", "bf16": True},
    "lora with dropout": {"disable_dropout": False, "lora": LORA},
    "accumulation": {"gradient_accumulation_steps": 2, "num_generations": 2, "logging_steps": 3},
}


def make(
    folder: Path,
    *,
    student: PreTrainedModel | None = None,
    lora: dict[str, Any] | None = None,
    eval_data: Any = None,
    **changes,
) -> TOPDTrainer:
    return TOPDTrainer(
        tiny_model("llama", seed=0) if student is None else student,
        tiny_model("qwen3", seed=1),
        TOPDConfig(output_dir=str(folder), **{**OPTIONS, **changes}),
        train_dataset=rows(8),
        eval_dataset=eval_data,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**lora) if lora else None,
    )


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every JSONL file of a run folder, without times; the ledger also tells of every start."""
    files = [path for path in folder.glob("*.jsonl") if path.name != "ledger.jsonl"]
    return {path.name: [timeless(line) for line in lines(path)] for path in files}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def timeless(line: str) -> dict[str, Any]:
    record = json.loads(line)
    return {k: v for k, v in record.items() if not any(time in k for time in TIMES)}


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run that was not stopped, and its options."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    make(folder, **VARIANTS[request.param]).train()
    return folder, VARIANTS[request.param]


def resumed(whole: Path, folder: Path, step: int, **options) -> Path:
    """The same run, stopped some time after a checkpoint and resumed from it."""
    shutil.copytree(whole, folder)
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write('{"step": 9')  # it was writing
    shutil.rmtree(folder / "student")
    make(folder, **options).train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return folder


@pytest.mark.parametrize("step", [1, 4, 5, 6])  # inside and at the end of an epoch and the run
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, step):
    folder, options = whole
    again = resumed(folder, tmp_path / "again", step, **options)
    assert records(again) == records(folder)
    before, after = (load_file(f / "student" / "model.safetensors") for f in (folder, again))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for kept in (folder, again):
        assert sorted(p.name for p in kept.glob("checkpoint-*"))[-1] == "checkpoint-6"


@pytest.mark.parametrize("kind", RENAMED)
def test_weights_of_other_names_on_disk_are_all_loaded(tmp_path, kind):
    """At a resume and of the best model; transformers' Trainer leaves them as they were."""
    trainer = make(tmp_path / "whole", student=renamed_model(kind), max_steps=3)
    trainer.train()
    again = resumed(
        tmp_path / "whole", tmp_path / "again", 1, student=renamed_model(kind), max_steps=3
    )
    students = (load_file(f / "student" / "model.safetensors") for f in (tmp_path / "whole", again))
    torch.testing.assert_close(*students, rtol=0, atol=0)
    trainer.state.best_model_checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    trainer._load_best_model()
    best = type(trainer.model).from_pretrained(tmp_path / "whole" / "checkpoint-1").to(DEVICE)
    torch.testing.assert_close(trainer.model.state_dict(), best.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", RENAMED)
def test_weights_of_several_dtypes_are_loaded_as_they_are(tmp_path, kind):
    """None is rounded to the dtype of the first, whatever their names on disk are."""
    saved, loaded = (renamed_model(kind, seed=seed).bfloat16() for seed in range(2))
    for model in (saved, loaded):
        model.get_decoder().layers.float()
    with torch.no_grad():
        for parameter in saved.get_decoder().layers.parameters():
            parameter.mul_(1 + 1e-5)
    saved.save_pretrained(tmp_path)
    load_saved(loaded, tmp_path)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def counting() -> PreTrainedModel:
    """A model whose own code changes a buffer in training."""
    model = tiny_model("llama", seed=0)
    model.model.norm.register_buffer("seen", torch.zeros(1))

    def count(norm: torch.nn.Module, *_: object) -> None:
        norm.seen.add_(norm.training)

    model.model.norm.register_forward_hook(count)
    return model


def test_buffers_that_training_changes_are_loaded_or_missed(tmp_path):
    """A checkpoint of an adapter has none: the run would silently be another."""
    for name, lora in (("all", None), ("adapter", LORA)):
        make(tmp_path / name, student=counting(), lora=lora, max_steps=3).train()
        options = {"lora": lora, "max_steps": 3}
        if lora:
            with pytest.raises(TOPDError, match=r"checkpoint-1 is whole, but .* do not load it"):
                resumed(tmp_path / name, tmp_path / "a", 1, student=counting(), **options)
            continue
        again = resumed(tmp_path / name, tmp_path / "b", 1, student=counting(), **options)
        both = (load_file(f / "student" / "model.safetensors") for f in (tmp_path / name, again))
        torch.testing.assert_close(*both, rtol=0, atol=0)


def test_a_checkpoint_that_does_not_load_as_it_was_saved_is_refused(run, monkeypatch):
    monkeypatch.setattr("topd.training.startup.loaded.load_saved", lambda model, folder: None)
    with pytest.raises(TOPDError, match=r"checkpoint-2 is whole, but .* do not load it"):
        resume(run)


@gpu_only
@pytest.mark.parametrize("method", ["opd", "topd", "first_fork"])
def test_full_determinism_runs_and_resumes_to_the_bit(tmp_path, method):
    """transformers' setting, under which torch raises where a kernel is not deterministic."""
    options = {"full_determinism": True, "bf16": True, "method": method, "max_steps": 3}
    before = torch.are_deterministic_algorithms_enabled()
    try:
        make(tmp_path / "whole", **options).train()
        again = resumed(tmp_path / "whole", tmp_path / "again", 1, **options)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
    assert records(again) == records(tmp_path / "whole")
    weights = (load_file(f / "student" / "model.safetensors") for f in (tmp_path / "whole", again))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two updates with a checkpoint each."""
    make(tmp_path / "run", method="opd", max_steps=2).train()
    return tmp_path / "run"


def resume(run: Path, given: str | bool = True, **changes) -> TOPDTrainer:
    trainer = make(run, **{"method": "opd", "max_steps": 2, **changes})
    trainer.train(resume_from_checkpoint=given)
    return trainer


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("model.safetensors", flip, "model.safetensors was changed"),
        ("optimizer.pt", cut, "optimizer.pt has [0-9]+ bytes of"),
        ("seal.json", Path.unlink, "has no seal.json"),
        ("seal.json", cut, "seal.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(run, name, damage, said):
    damage(run / "checkpoint-2" / name)
    with pytest.raises(TOPDError, match=f"checkpoint-2: {said}.*checkpoint-1") as error:
        resume(run)
    assert error.value.exit_code == 2
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(TOPDError, match="no whole one before"):
        resume(run)


def test_going_on_from_the_one_before_drops_the_damaged_one(run):
    flip(run / "checkpoint-2" / "model.safetensors")
    resume(run, str(run / "checkpoint-1"))
    checkpoints.check(run / "checkpoint-2")


def test_weights_that_are_no_safetensors_are_refused(run):
    place = run / "checkpoint-2"
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    seal = json.loads((place / "seal.json").read_text())
    seal["files"]["pytorch_model.bin"] = seal["files"].pop("model.safetensors")
    (place / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(TOPDError, match="no weights as safetensors"):
        resume(run)


def test_no_pickled_arguments_are_left(run):
    assert not list(run.rglob("training_args.bin"))


def test_the_command_that_resumes_can_be_pasted():
    said = checkpoints.how_to_resume(Path("runs/My Drive"))
    assert "--output_dir 'runs/My Drive' --resume_from_checkpoint last (in" in said


def test_only_the_optimiser_makes_a_checkpoint_resumable(tmp_path):
    make(tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(TOPDError, match=r"no optimizer.pt.*save_only_model"):
        resume(tmp_path)


def test_records_that_are_missing_are_named(run):
    cut(run / "guidance.jsonl")
    with pytest.raises(TOPDError, match=r"guidance.jsonl: has [0-9]+ bytes, but had"):
        resume(run)


def test_a_run_goes_on_only_with_its_data_and_models(run):
    trainer = make(run, method="opd", max_steps=2)
    trainer.train_dataset = trainer.train_dataset[:4]
    with pytest.raises(TOPDError, match="begun with other data"):
        trainer.train(resume_from_checkpoint=True)
    trainer = make(run, method="opd", max_steps=2)
    trainer.teacher_model = tiny_model("qwen3", seed=2)
    with pytest.raises(TOPDError, match="begun with other models"):
        trainer.train(resume_from_checkpoint=True)
    trainer = make(run, method="opd", max_steps=2)
    config = trainer.teacher_model.config
    config._name_or_path, config.num_hidden_layers = "moved/elsewhere", 0  # as if it were served
    with pytest.raises(TOPDError, match=r"a teacher at a server called .*, not moved/elsewhere"):
        trainer.train(resume_from_checkpoint=True)
    trainer = make(run, method="opd", max_steps=2)
    trainer.model.config._name_or_path = "moved/too"
    trainer.teacher_model.config._name_or_path = "moved/elsewhere"
    trainer.train(resume_from_checkpoint=True)


def test_a_run_goes_on_only_with_the_adapter_of_its_teacher(tmp_path):
    """Its fingerprint was of the model below: another adapter was another teacher, unsaid."""

    def trainer(seed: int, **options: Any) -> TOPDTrainer:
        made, below = make(tmp_path, method="opd", **options), tiny_model(seed=1)
        torch.manual_seed(seed)
        config = LoraConfig(**{**LORA, "init_lora_weights": False})
        made.teacher_model = get_peft_model(below, config).requires_grad_(False)
        return made

    trainer(1, max_steps=1).train()
    with pytest.raises(TOPDError, match="begun with other models"):
        trainer(2, max_steps=2).train(resume_from_checkpoint=True)
    trainer(1, max_steps=2).train(resume_from_checkpoint=True)


def test_files_that_are_not_the_runs_own_are_left_alone(run):
    """Whatever their names end in, and if an older version's seal names them."""
    path = run / "checkpoint-2" / "seal.json"
    seal = json.loads(path.read_text())
    assert seal["records"].keys() == records(run).keys()
    (run / "mine.jsonl").write_text("mine\n")
    seal["records"]["mine.jsonl"] = 999
    path.write_text(json.dumps(seal))
    resume(run, max_steps=3)
    assert (run / "mine.jsonl").read_text() == "mine\n"
    assert "mine.jsonl" not in json.loads((run / "checkpoint-3" / "seal.json").read_text())


@pytest.mark.parametrize("own", [None, {"some": "thing"}, {"recipe": {}, "config": {}}])
def test_only_a_runs_own_files_are_removed_before_it_begins_again(tmp_path, own):
    names = ["metrics.jsonl", "tokens.jsonl", "ledger.jsonl", "train.jsonl", "answers.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    if own is not None:
        (tmp_path / "run.json").write_text(json.dumps(own))
    checkpoints.begin_anew(tmp_path)
    left = names[3:] if own and "recipe" in own else names
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == sorted(left)


def test_a_template_that_writes_the_date_is_named_and_a_fixed_date_resumes(tmp_path):
    """As those of Llama 3.1 do; here the day is a word of the tiny vocabulary."""
    clock = "{{% if not date_string %}}{{% set date_string = strftime_now('{day}') %}}{{% endif %}}"

    def dated(day: int, **changes: Any) -> TOPDTrainer:
        tokenizer = tiny_tokenizer()
        shown = "{{ date_string }} "
        tokenizer.chat_template = clock.format(day=day) + shown + tokenizer.chat_template
        options = {"method": "opd", "max_steps": 2, "save_steps": 1, **changes}
        data = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(8)]
        args = TOPDConfig(output_dir=str(tmp_path), **{**OPTIONS, **options})
        return TOPDTrainer(
            tiny_model(seed=0), tiny_model(seed=1), args, data, processing_class=tokenizer
        )

    dated(3).train()
    with pytest.raises(TOPDError, match=r"today's date.*strftime_now.*date_string.*chat_template"):
        dated(4, max_steps=3).train(resume_from_checkpoint=True)
    fixed = {"date_string": "3"}
    dated(4, max_steps=3, chat_template_kwargs=fixed).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
def test_a_run_whose_beginnings_are_lost_is_not_resumed(run, name):
    (run / name).write_text("{")
    with pytest.raises(TOPDError, match=f"{name}: not valid JSON"):
        resume(run)
    (run / name).unlink()
    with pytest.raises(TOPDError, match=f"{name} is missing"):
        resume(run)


def test_what_was_changed_at_a_resume_is_recorded(run):
    resume(run, max_steps=3)
    resume(run, max_steps=3)
    found = json.loads((run / "run.json").read_text())["resumed"]
    assert found[0] == {"step": 2, "changed": {"config.max_steps": [2, 3]}}
    assert found[1] == {"step": 3, "changed": {}}


def test_a_folder_with_checkpoints_is_not_begun_anew_by_accident(run):
    """As where a cell of a notebook is run again; also if its records are gone."""
    for _ in range(2):
        with pytest.raises(TOPDError, match=r"^output_dir: .* already holds a run\. Choose"):
            make(run).train()
        for path in run.glob("*.jsonl"):
            path.unlink()


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(TOPDError, match="holds no checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(TOPDError, match=r"no checkpoint .*elsewhere.*It holds: none"):
        make(tmp_path).train(resume_from_checkpoint="elsewhere")


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    trainer = TOPDTrainer(
        tiny_model("llama", seed=0),
        tiny_model("qwen3", seed=1),
        TOPDConfig(
            output_dir=str(tmp_path),
            **{**OPTIONS, "max_steps": 4, "learning_rate": 1.0},  # it gets worse at once
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            max_logprob_gap=100.0,
        ),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == sorted({best.name, "checkpoint-4"}) or len(kept) == 2
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_a_run_that_was_moved_ends_with_its_best(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options = {**best, "eval_data": rows(2), "learning_rate": 1.0, "max_logprob_gap": 1e3}
    make(tmp_path / "run", max_steps=3, **options).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = make(tmp_path / "moved", max_steps=3, **options)
    trainer.train(resume_from_checkpoint=True)
    step = trainer.state.best_global_step
    assert step < 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{step}")
    files = (tmp_path / "moved" / f for f in (f"checkpoint-{step}", "student"))
    torch.testing.assert_close(
        *(load_file(file / "model.safetensors") for file in files), rtol=0, atol=0
    )


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system takes no more than so many bytes in a file: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FOLLOWING = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "threshold": 1e3},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_data": rows(2),
}


def test_a_schedule_that_follows_evaluations_is_resumed(tmp_path):
    whole = make(tmp_path / "run", max_steps=4, save_steps=2, **FOLLOWING)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = make(tmp_path / "run", max_steps=4, **FOLLOWING)
    again.train(resume_from_checkpoint=True)
    rates, resumed = (
        [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
        for trainer in (whole, again)
    )
    assert resumed == rates
    assert rates[0] > 2 * rates[-1]


def after_two(folder: Path, **options) -> Path:
    """A run that was stopped after two of four updates."""
    make(folder, **{"max_steps": 4, "save_steps": 2, **options}).train()
    shutil.rmtree(folder / "checkpoint-4")
    return folder


def test_a_learning_rate_changed_at_a_resume_is_that_of_its_first_update(tmp_path):
    """What a run that met NaN is told to do had no effect: rates came from the checkpoint."""
    folder = after_two(tmp_path / "run", warmup_steps=0, adam_beta2=0.9)
    options = {"learning_rate": 1e-5, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_epsilon": 1e-3}
    trainer = make(folder, max_steps=4, warmup_steps=0, **options)
    trainer.train(resume_from_checkpoint=True)
    rates = {
        log["step"]: log["learning_rate"] for log in trainer.state.log_history if "loss" in log
    }
    assert rates == pytest.approx({1: 3e-3, 2: 3e-3 * 3 / 4, 3: 1e-5 * 2 / 4, 4: 1e-5 / 4})
    decayed, other = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    assert (decayed["betas"], decayed["eps"]) == ((0.8, 0.999), 1e-3)


def test_a_schedule_changed_at_a_resume_is_that_of_its_first_update(tmp_path):
    folder = after_two(tmp_path / "run", warmup_steps=0)
    trainer = make(folder, max_steps=8, warmup_steps=0)
    trainer.train(resume_from_checkpoint=True)
    rates = {
        log["step"]: log["learning_rate"] for log in trainer.state.log_history if "loss" in log
    }
    assert rates[3] == pytest.approx(3e-3 * 6 / 8)


def test_a_schedule_of_ones_own_follows_the_optimiser_of_now(tmp_path):
    """That of torch which multiplies its latest rate, and has no function of the update."""

    def with_rate(rate: float) -> TOPDTrainer:
        student = tiny_model("llama")
        optimizer = torch.optim.SGD(student.parameters(), rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        options = {**OPTIONS, "max_steps": 4, "save_steps": 2, "output_dir": str(tmp_path / "run")}
        options["learning_rate"] = rate
        return TOPDTrainer(
            student, tiny_model(seed=1), TOPDConfig(**options), rows(8),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, schedule),
        )  # fmt: skip

    with_rate(1e-3).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    trainer = with_rate(1e-4)
    trainer.train(resume_from_checkpoint=True)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-5, 1.25e-5])


@pytest.mark.parametrize(
    ("schedule", "scales"),
    [
        (lambda o: SequentialLR(o, [LinearLR(o, 0.5, 1.0, 2), ExponentialLR(o, 0.5)], [2]), True),
        (lambda o: ChainedScheduler([LinearLR(o, 0.5, 1.0, 2), ExponentialLR(o, 0.5)]), True),
        (lambda o: OneCycleLR(o, 1e-2, total_steps=10), False),  # of betas too; rates of its own
    ],
)
def test_a_schedule_made_of_others_or_of_betas_is_resumed_exactly(tmp_path, schedule, scales):
    def train(*, rate: float = 1e-3, resume: bool) -> dict[int, float]:
        student = tiny_model("llama")
        optimizer = torch.optim.AdamW(student.parameters(), rate)
        made = schedule(optimizer)
        initial = optimizer.param_groups[0]["initial_lr"]
        own = {"max_steps": 4, "save_steps": 2, "learning_rate": initial}
        trainer = TOPDTrainer(
            student, tiny_model(seed=1), TOPDConfig(str(tmp_path), **{**OPTIONS, **own}), rows(8),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, made),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        logs = trainer.state.log_history
        return {log["step"]: log["learning_rate"] for log in logs if "loss" in log}

    rates = train(resume=False)
    student = load_file(tmp_path / "student" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert train(resume=True) == rates
    again = load_file(tmp_path / "student" / "model.safetensors")
    torch.testing.assert_close(again, student, rtol=0, atol=0)
    shutil.rmtree(tmp_path / "checkpoint-4")
    lower, part = train(rate=1e-4, resume=True), 10 if scales else 1
    assert [lower[3], lower[4]] == pytest.approx([rates[3] / part, rates[4] / part])


def test_the_best_adapter_is_loaded_whatever_its_name(tmp_path):
    """Trainer looks for that of the name ``default`` alone, and only warns."""
    student = get_peft_model(tiny_model("llama", seed=0), LoraConfig(**LORA), adapter_name="mine")
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(
        tmp_path, student=student, max_steps=3, eval_data=rows(2), learning_rate=1.0,
        max_logprob_gap=1e3, **options,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = (f / "mine" / "adapter_model.safetensors" for f in (best, tmp_path / "adapter"))
    torch.testing.assert_close(*(load_file(file) for file in saved), rtol=0, atol=0)


@pytest.mark.parametrize("trained", ["both", "second"])
def test_two_adapters_at_once_resume(tmp_path, trained):
    """Trainer makes the first of them the only one: a whole checkpoint could not be resumed."""

    def student() -> PeftModel:
        torch.manual_seed(7)
        model = get_peft_model(tiny_model("llama", seed=0), LoraConfig(**LORA))
        model.add_adapter("more", LoraConfig(**{**LORA, "init_lora_weights": False}))
        model.base_model.set_adapter(["default", "more"])
        for name, weight in model.named_parameters():
            if trained == "second" and ".default" in name:
                weight.requires_grad_(False)
        return model

    options = {"method": "opd", "max_steps": 2}
    make(tmp_path / "whole", student=student(), **options).train()
    again = resumed(tmp_path / "whole", tmp_path / "again", 1, student=student(), **options)
    pair = (load_file(f / "student/model.safetensors") for f in (tmp_path / "whole", again))
    torch.testing.assert_close(*pair, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {"optim": "sgd"}, r"optim was 'adamw_torch\w*' and is 'sgd'.* as it was"),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, {"optim": "sgd"}, "optim_args was"),
        (FOLLOWING, {**FOLLOWING, "learning_rate": 1e-5}, "learning_rate was 0.003 and is 1e-05"),
        (FOLLOWING, {}, "lr_scheduler_type was 'reduce_lr_on_plateau' and is 'linear'"),
        ({}, {"lora": LORA}, "no adapter 'default', and the student has one"),
        ({"lora": LORA}, {}, "has an adapter, and the student has none"),
        ({"lora": LORA}, {"lora": {**LORA, "r": 4}}, "an adapter of r 2, .* has 4. Give the same"),
        (  # as many weights, of the same shapes
            {"lora": {**LORA, "target_modules": ["q_proj"]}},
            {"lora": {**LORA, "target_modules": ["o_proj"]}},
            r"target_modules \['q_proj'\], .*'o_proj'",
        ),
        ({"lora": LORA}, {"lora": {**LORA, "lora_alpha": 3}}, "lora_alpha 8, .* has 3"),
    ],
)
def test_another_optimiser_or_adapter_than_the_checkpoints_is_refused(tmp_path, before, now, said):
    """It ended in a traceback, or trained an adapter of which nothing had been loaded."""
    folder = after_two(tmp_path / "run", **before)
    kept = records(folder)
    with pytest.raises(TOPDError, match=f"resume_from_checkpoint: .*{said}"):
        make(folder, max_steps=4, **now).train(resume_from_checkpoint=True)
    assert records(folder) == kept


def test_an_adapter_resumes_under_another_dropout(tmp_path):
    folder = after_two(tmp_path / "run", lora=LORA)
    trainer = make(folder, max_steps=4, lora={**LORA, "lora_dropout": 0.1})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("written", ["model.safetensors", "optimizer.pt"])  # by Rust, by C++
def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_one(run, tmp_path, written):
    size = (run / "checkpoint-1" / written).stat().st_size
    with no_file_above(size - 1000), pytest.raises(StoppedError) as found:
        resume(run, str(run / "checkpoint-1"))
    said = r"checkpoint-2 could not be .*checkpoint-1 is whole.*Free.*continue with"
    assert re.search(said, str(found.value))
    assert found.value.exit_code == DISK
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (run / checkpoints.PARTIAL).exists()
    resume(run, "last")
    whole = tmp_path / "whole"
    make(whole, method="opd", max_steps=2).train()
    assert records(run) == records(whole)


@pytest.mark.parametrize("lora", [False, True])
def test_a_disk_that_is_full_for_the_tokenizer_alone_loses_nothing(tmp_path, monkeypatch, lora):
    """The library tokenizers says so by a bare Exception; a checkpoint and the end of a run."""
    real = PreTrainedTokenizerFast.save_pretrained

    def full(*args: Any, **kwargs: Any) -> Any:
        with no_file_above(100):
            return real(*args, **kwargs)

    options: dict[str, Any] = {"lora": LORA} if lora else {}
    trainer = make(tmp_path, method="opd", max_steps=2, save_steps=2, **options)
    apart = make(tmp_path / "end", method="opd", max_steps=2, save_strategy="no", **options)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(StoppedError, match=r"checkpoint-2 could not be.*File too large") as found:
        trainer.train()
    assert found.value.exit_code == DISK
    with pytest.raises(StoppedError, match=r"File too large.*Free some space") as found:
        apart.train()
    assert found.value.exit_code == DISK
    assert len((tmp_path / "end" / "metrics.jsonl").read_text().splitlines()) >= 2
    with pytest.raises(TOPDError, match=r"cannot be saved.*Free some space"):
        make(tmp_path / "late", method="opd", **options)


@pytest.mark.parametrize("size", [2000, 12_000])  # run.json, rollouts.jsonl
def test_records_that_the_disk_does_not_take_stop_the_run(tmp_path, size):
    trainer = make(tmp_path, save_strategy="no")
    with no_file_above(size), pytest.raises(StoppedError, match=r"Free some space.*over") as found:
        trainer.train()
    assert found.value.exit_code == DISK


def test_other_faults_of_the_system_are_raised_as_they_are(tmp_path):
    class Offline(TrainerCallback):
        def on_log(self, *_, **__):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no tracker")

    trainer = make(tmp_path)
    trainer.add_callback(Offline())
    with pytest.raises(ConnectionRefusedError):
        trainer.train()


def test_an_adapter_begins_with_weights_of_the_seed_whatever_was_drawn_before(tmp_path):
    def first(state: int, **changes) -> torch.Tensor:
        models = tiny_model("llama", seed=0), tiny_model("qwen3", seed=1)
        torch.manual_seed(state)
        args = TOPDConfig(output_dir=str(tmp_path), **{**OPTIONS, **changes})
        trainer = TOPDTrainer(
            *models,
            args,
            train_dataset=rows(2),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(**LORA),
        )
        return next(p for n, p in trainer.model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(2))
    assert not torch.equal(first(1), first(1, seed=3))
