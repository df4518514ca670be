"""Trainers over their lives: stopped and resumed in one process, changed, and used side by side."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import rows, tiny_model, tiny_tokenizer, write_pair
from conftest import torch_on_device as torch
from test_resume import OPTIONS, make, no_file_above, records
from topd import TOPDConfig, TOPDTrainer
from topd.commands.audit import audit_run
from topd.commands.evaluate import as_trained
from topd.commands.train import run_recipe
from topd.errors import COLLAPSED, TERMINATED, StoppedError, TOPDError
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec
from topd.runs.verified import not_of_the_end
from topd.training.warmstart import WarmstartConfig, WarmstartTrainer

PLAIN: dict[str, Any] = {"method": "opd", "max_steps": 6}  # four updates an epoch
SMALL = {"per_device_train_batch_size": 2, "max_completion_length": 8, "method": "opd"}
EVERY: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_data": rows(2)}
EPOCHS = {"eval_strategy": "epoch", "logging_strategy": "epoch", "eval_data": rows(2)}


class At(TrainerCallback):
    """Does something at the beginning of an update, once."""

    def __init__(self, step: int, does: Any) -> None:
        self.step, self.does = step, does

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = -1
            self.does()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    raise KeyboardInterrupt


def figures(folder: Path, name: str) -> dict[int, float]:
    """A figure by update."""
    return {log["step"]: log[name] for log in records(folder)["metrics.jsonl"] if name in log}


def student(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def resumed(whole: Path, folder: Path, step: int, **options) -> TOPDTrainer:
    """What is left of a run that was killed after a checkpoint, resumed from it."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "student")
    trainer = make(folder, **options)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer


# One trainer, trained more than once


@pytest.mark.parametrize("step", [1, 3])  # 3: the last update of an epoch
@pytest.mark.parametrize("options", [{}, EPOCHS])
def test_a_trainer_that_a_signal_stopped_resumes_in_the_same_process(tmp_path, step, options):
    """It ended again after one update, for the signal of before."""
    make(tmp_path / "whole", **PLAIN, **options).train()
    trainer = make(tmp_path / "run", **PLAIN, **options)
    trainer.add_callback(At(step, terminate))
    with pytest.raises(StoppedError, match="SIGTERM") as found, trainer.watch.until_terminated():
        trainer.train()
    assert found.value.exit_code == TERMINATED
    assert trainer.state.global_step == step + 1
    with trainer.watch.until_terminated():
        trainer.train(resume_from_checkpoint=True)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_trainer_that_was_interrupted_in_an_update_resumes_in_the_same_process(tmp_path):
    class Within(At):
        on_substep_end = At.on_step_begin

        def on_step_begin(self, *_, **__):
            """Not here."""

    options = {**PLAIN, "gradient_accumulation_steps": 2}
    make(tmp_path / "whole", **options).train()
    trainer = make(tmp_path / "run", **options)
    trainer.add_callback(Within(2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_signal_in_the_last_update_does_not_stop_a_later_training(tmp_path):
    trainer = make(tmp_path, **{**PLAIN, "max_steps": 1, "save_strategy": "no"})
    trainer.watch.on_save = lambda *_, **__: None  # as if it had come a moment later
    trainer.add_callback(At(0, terminate))
    with trainer.watch.until_terminated():
        trainer.train()
    assert trainer.watch.reason is trainer.watch.agreed is None


def test_a_trainer_that_collapsed_resumes_in_the_same_process(tmp_path):
    own = {"learning_rate": 0.3, "stop_patience": 3, "max_logprob_gap": 1e9, "warmup_steps": 6}
    trainer = make(tmp_path, **{**PLAIN, **own, "max_steps": 60})
    with pytest.raises(StoppedError, match="collapsed") as found:
        trainer.train()
    assert found.value.exit_code == COLLAPSED
    trainer.args.stop_patience, trainer.args.max_steps = None, 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_dir", "elsewhere"), ("per_device_train_batch_size", 4), ("bf16", True), ("seed", 7)],
)
@pytest.mark.parametrize("warmstart", [False, True])
def test_what_a_trainer_has_read_is_not_changed_afterwards(
    tmp_path, monkeypatch, name, value, warmstart
):
    """run.json had the new value of what was trained with the old one."""
    monkeypatch.chdir(tmp_path)
    kinds: Any = (WarmstartTrainer, WarmstartConfig) if warmstart else (TOPDTrainer, TOPDConfig)
    options = {**OPTIONS, **PLAIN, "method": "opd"}
    for idle in ("window_length", "candidate_fraction") if warmstart else ():
        options.pop(idle)
    trainer = kinds[0](
        tiny_model("llama"), tiny_model(seed=1), kinds[1](str(tmp_path / "run"), **options),
        rows(4), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    setattr(trainer.args, name, value)
    with pytest.raises(TOPDError, match=rf"^{name}: was .*{value}.* Make a new trainer"):
        trainer.train()
    assert not list((tmp_path / "run").glob("*"))


def test_what_is_read_while_it_trains_may_be_changed(tmp_path):
    trainer = make(tmp_path, **PLAIN)
    trainer.args.max_steps, trainer.args.learning_rate = 2, 0.0
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert json.loads((tmp_path / "run.json").read_text())["config"]["learning_rate"] == 0.0


def given(folder: Path, args: TOPDConfig | None = None) -> TOPDTrainer:
    """With an optimiser and a schedule of its own."""
    model = tiny_model("llama", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {key: value for key, value in {**OPTIONS, **PLAIN}.items() if key != "learning_rate"}
    return TOPDTrainer(
        model, tiny_model("qwen3", seed=1), args or TOPDConfig(output_dir=str(folder), **options),
        train_dataset=rows(8), processing_class=tiny_tokenizer(),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )  # fmt: skip


def test_the_settings_of_a_trainer_with_an_optimiser_of_its_own_serve_again(tmp_path):
    """They name its class, which transformers does not know."""
    args = given(tmp_path).args
    again = given(tmp_path, args)
    assert [again.args.optim, again.args.lr_scheduler_type] == ["SGD", "ConstantLR"]


def test_a_run_of_an_older_version_resumes_with_the_optimiser_that_was_given(tmp_path):
    """Its run.json has the optimiser of the settings."""
    given(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    trainer = given(tmp_path / "again")

    def write(name: str, part: str, **values: str) -> None:
        path = tmp_path / "again" / name
        stored = json.loads(path.read_text())
        stored[part] |= values
        path.write_text(json.dumps(stored))

    write("run.json", "config", optim="adamw_torch_fused", lr_scheduler_type="linear")
    with pytest.raises(TOPDError, match="optim was 'adamw_torch_fused' and is 'SGD'"):
        trainer.train(resume_from_checkpoint=True)
    write("manifest.json", "versions", topd="0.1.0")
    trainer.train(resume_from_checkpoint=True)
    assert records(tmp_path / "again") == records(tmp_path / "whole")


def test_where_to_resume_from_is_said_to_train(tmp_path):
    """In the configuration it had no effect, and the folder was called one that holds a run."""
    make(tmp_path, **{**PLAIN, "max_steps": 2}).train()
    trainer = make(tmp_path, **{**PLAIN, "max_steps": 3}, resume_from_checkpoint="last")
    with pytest.raises(TOPDError, match=r"resume_from_checkpoint: .*Call train\("):
        trainer.train()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert trainer.state.global_step == 3


def test_that_a_resumed_run_has_nothing_left_to_learn_is_said(tmp_path, caplog):
    make(tmp_path, **{**PLAIN, "max_steps": 3}).train()
    assert "nothing more is learned" not in caplog.text
    make(tmp_path, **{**PLAIN, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert "3 updates are done, and the run is to have 2, so nothing more" in caplog.text


# What a run has been given, and what comes after it


def test_other_data_given_to_a_trainer_between_two_trainings_are_seen(tmp_path):
    """What it had at first was held against the run, not what it was about to use."""
    trainer = make(tmp_path, **{**PLAIN, **EVERY, "max_steps": 1})
    trainer.train()
    trainer.args.max_steps, every = 2, trainer.train_dataset
    trainer.eval_dataset = trainer.encoder.encode(rows(3))
    trainer.train_dataset = every[:4]
    with pytest.raises(TOPDError, match="begun with other data"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train_dataset = every
    trainer.train(resume_from_checkpoint=True)
    assert list(changed(tmp_path)) == ["config.max_steps", "eval_data"]


def changed(folder: Path) -> dict[str, Any]:
    """By the latest resume."""
    return json.loads((folder / "run.json").read_text())["resumed"][-1]["changed"]


def test_another_evaluation_from_a_resume_on_is_recorded(tmp_path):
    """Its figures were of other problems, and nothing said so."""
    more = {"eval_data": {"sums": rows(2), "more": rows(3)}}
    make(tmp_path, **{**PLAIN, **EVERY, "max_steps": 1}).train()
    make(tmp_path, **{**PLAIN, **EVERY, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert list(changed(tmp_path)) == ["config.max_steps"]
    make(tmp_path, **{**PLAIN, **EVERY, **more}).train(resume_from_checkpoint=True)
    before, now = changed(tmp_path)["eval_data"]
    assert before.keys() == {""}
    assert now == {"sums": before[""], "more": now["more"]}
    manifest = tmp_path / "manifest.json"
    stored = json.loads(manifest.read_text())
    assert stored.pop("eval_data") == before
    manifest.write_text(json.dumps(stored))  # as by an older version
    make(tmp_path, **{**PLAIN, "max_steps": 7}).train(resume_from_checkpoint=True)
    assert "eval_data" not in changed(tmp_path)


def test_the_best_is_not_chosen_by_two_evaluations(tmp_path):
    best = {**PLAIN, **EVERY, "load_best_model_at_end": True}
    make(
        tmp_path,
        **best,
    ).train()
    with pytest.raises(TOPDError, match=r"eval_dataset .*another than before, and load_best_mod"):
        make(tmp_path, **{**best, "max_steps": 7, "eval_data": rows(3)}).train(True)
    make(tmp_path, **{**best, "max_steps": 7}).train(True)


def test_an_evaluation_before_the_first_update_is_not_asked_for_after_it(tmp_path):
    """It was not made, unsaid."""
    make(tmp_path, **{**PLAIN, "max_steps": 1}).train()
    late = {**PLAIN, "eval_on_start": True, "eval_data": rows(2)}
    with pytest.raises(TOPDError, match=r"^eval_on_start: has no effect on a run that is resumed"):
        make(tmp_path, **late).train(resume_from_checkpoint=True)


def test_what_is_evaluated_after_a_run_is_not_recorded_in_it(tmp_path):
    """Its folder may be another's by then: two entries of the ledger had one number."""
    first = make(tmp_path, **{**PLAIN, **EVERY, "max_steps": 1})
    first.train()
    make(tmp_path, **{**PLAIN, **EVERY, "max_steps": 2}).train(resume_from_checkpoint=True)
    found = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    assert first.evaluate(rows(3))["eval_loss"] > 0
    assert found == {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    assert not audit_run(tmp_path, updates=0).faults


class Fails(TrainerCallback):
    """Raises at the end of a training."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def on_train_end(self, *_: Any, **__: Any) -> None:
        raise self.fault


@pytest.mark.parametrize("fault", [TOPDError("gone."), ConnectionError("gone.")])
def test_a_fault_after_the_last_update_loses_none_though_no_checkpoint_is_wanted(tmp_path, fault):
    options = {**PLAIN, "max_steps": 2, "save_strategy": "no"}
    make(tmp_path / "whole", **options).train()
    trainer = make(tmp_path / "run", **options)
    trainer.add_callback(Fails(fault))
    with pytest.raises(type(fault), match=r"gone\.") as found:
        trainer.train()
    said = " ".join([str(found.value), *getattr(found.value, "__notes__", ())])
    assert said.count("checkpoint-2 is saved: 2 of 2 updates. Resume with") == 1
    make(tmp_path / "run", **options).train(resume_from_checkpoint=True)
    pair = (student(tmp_path / name / "student") for name in ("run", "whole"))
    torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_a_training_that_fails_as_it_begins_is_not_saved_as_the_one_before(tmp_path, monkeypatch):
    """Its student was, as that of the last update, whose records had been cut away."""
    trainer = make(tmp_path, **{**PLAIN, "max_steps": 2})
    trainer.train()
    monkeypatch.setattr(trainer, "_load_from_checkpoint", Fails(OSError("gone.")).on_train_end)
    with pytest.raises(OSError, match="gone"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize("more", [{"save_strategy": "best"}, {"save_total_limit": 1}])
def test_the_best_student_is_not_saved_as_that_of_the_last_update(tmp_path, monkeypatch, more):
    """A run resumed from there, with more updates, began with the weights of an earlier one."""
    best = {**PLAIN, **EVERY, "max_steps": 3, "load_best_model_at_end": True, **more}
    trainer = make(tmp_path, **best)
    trainer.add_callback(Fails(OSError("gone.")))
    monkeypatch.setattr(trainer, "evaluation_loop", worse(trainer))
    with pytest.raises(OSError, match="gone"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def worse(trainer: TOPDTrainer) -> Any:
    """Evaluations whose figures rise."""
    loop = trainer.evaluation_loop

    def evaluated(*args: Any, **options: Any) -> Any:
        found = loop(*args, **options)
        found.metrics["eval_loss"] = 10.0 + trainer.state.global_step
        return found

    return evaluated


# Trainers side by side


def test_a_student_that_became_a_teacher_is_named(tmp_path):
    """That of another trainer, which froze it: a traceback of autograd's."""
    model = tiny_model("llama")
    first = make(tmp_path / "first", student=model, **PLAIN)
    options = {"args": TOPDConfig(str(tmp_path / "second"), **{**OPTIONS, **PLAIN})}
    data = {"train_dataset": rows(4), "processing_class": tiny_tokenizer()}
    TOPDTrainer(tiny_model("llama", seed=2), model, **options, **data)
    with pytest.raises(TOPDError, match=r"student: all its weights are frozen.*deepcopy"):
        first.train()
    model.requires_grad_(True)
    TOPDTrainer(tiny_model("llama", seed=2), copy.deepcopy(model), **options, **data)
    first.train()


@pytest.mark.parametrize("own", [{"command": "probe"}, {"compare": {"arms": {}}}])
def test_no_training_takes_the_folder_of_another_command(tmp_path, own):
    """Its run.json was overwritten, and a comparison could not be continued."""
    run, recipe = tmp_path / "run", write_pair(tmp_path, method="opd", max_steps=1)
    run.mkdir()
    (run / "run.json").write_text(json.dumps(own))
    with pytest.raises(TOPDError, match=r"output_dir: .* holds another command's run"):
        make(run, **PLAIN).train()
    with pytest.raises(TOPDError, match=r"output_dir: .* holds another command's run"):
        run_recipe(recipe, [f"--output_dir={run}"], quiet=True)
    assert json.loads((run / "run.json").read_text()) == own


# What is logged, evaluated and saved


def judged(trainer: TOPDTrainer, losses: list[float]) -> TOPDTrainer:
    """Its evaluations find these, update by update."""

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        found = {"eval_loss": losses[trainer.state.global_step - 1]}
        trainer.log(found)
        trainer.control.should_evaluate = False  # as Trainer's
        return found

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    return trainer


def test_the_best_is_one_that_was_saved(tmp_path):
    """The best evaluation of all was of a student that is not saved: the last one was kept."""
    options = {"save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.02}
    trainer = make(tmp_path, **{**PLAIN, **EVERY, **options})
    judged(trainer, [9, 5, 1, 6, 7, 8]).train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    found = student(tmp_path / "student")
    torch.testing.assert_close(found, student(tmp_path / "checkpoint-2"), rtol=0, atol=0)
    last = student(tmp_path / "checkpoint-6")
    assert any(not torch.equal(last[name], found[name]) for name in found)
    card = (tmp_path / "student" / "README.md").read_text()
    assert (
        "| updates | 6; the student is that of 2, the best of those evaluated and saved |" in card
    )


@pytest.mark.parametrize("steps", [4, 6])  # 6: ends within an epoch
def test_the_best_may_be_the_last_of_an_epoch(tmp_path, steps):
    """Its checkpoint waits for the epoch's log: it was taken for one that is not saved."""
    options = {**PLAIN, **EVERY, "eval_steps": 2, "save_steps": 2, "logging_strategy": "epoch"}
    trainer = make(tmp_path, **{**options, "max_steps": steps, "load_best_model_at_end": True})
    judged(trainer, [9, 8, 9, 7, 9, 6]).train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{steps}")


def test_a_run_that_saves_the_best_alone_ends_at_a_signal_too(tmp_path):
    """It went on to its end where no student was the best any more."""
    own = {"save_strategy": "best", "metric_for_best_model": "loss"}
    trainer = judged(make(tmp_path, **{**PLAIN, **EVERY, **own}), [1, 2, 3, 4, 5, 6])
    trainer.add_callback(At(2, terminate))
    said = r"checkpoint-3 is saved: 3 of 6"
    with pytest.raises(StoppedError, match=said), trainer.watch.until_terminated():
        trainer.train()
    assert trainer.state.best_global_step == 1
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-3"]


def test_the_evaluation_at_the_start_is_that_of_the_run(tmp_path):
    """A resumed run had made another, of the student that it resumed with."""
    options = {**PLAIN, **EVERY, "eval_steps": 2, "eval_on_start": True}
    make(tmp_path / "whole", **options).train()
    resumed(tmp_path / "whole", tmp_path / "again", 2, **options)
    assert records(tmp_path / "again") == records(tmp_path / "whole")
    assert figures(tmp_path / "whole", "eval_loss").keys() == {0, 2, 4, 6}


@pytest.mark.parametrize(("kept", "steps"), [(EPOCHS, [4, 6]), ({"logging_strategy": "epoch"}, [])])
def test_what_an_epoch_ends_with_is_in_its_last_checkpoint(tmp_path, kept, steps):
    """A run that resumed from it began with the next epoch, without its log and evaluation."""
    options = {**PLAIN, **kept, "save_steps": 2}  # 6: ends within an epoch
    make(tmp_path / "whole", **options).train()
    assert list(figures(tmp_path / "whole", "loss")) == [4, 6]
    assert list(figures(tmp_path / "whole", "eval_loss")) == steps
    for step in (2, 4, 6):
        resumed(tmp_path / "whole", tmp_path / f"again-{step}", step, **options)
        assert records(tmp_path / f"again-{step}") == records(tmp_path / "whole")


def test_how_often_is_logged_evaluated_and_saved_may_change_at_a_resume(tmp_path):
    """run.json said so, and the run went on as before."""
    often = {"logging_steps": 2, "eval_steps": 2, "save_steps": 2}
    make(tmp_path / "run", **{**PLAIN, **EVERY, **often}).train()
    rarely = {"logging_steps": 1, "eval_steps": 3, "save_steps": 0.5}
    run, options = tmp_path / "again", {**PLAIN, **EVERY, **rarely, "max_steps": 10}
    resumed(tmp_path / "run", run, 4, **options)
    assert list(figures(run, "loss")) == [2, 4, 5, 6, 7, 8, 9, 10]
    assert list(figures(run, "eval_loss"))[:4] == [2, 4, 6, 9]
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (2, 4, 5, 10)}


# A student that is not that of the run's latest updates


def test_a_student_from_before_a_resume_is_told_from_that_of_the_end(tmp_path, capsys, monkeypatch):
    """It was evaluated, and trained further, as that of the whole run."""
    run = tmp_path / "run"
    make(run, **{**PLAIN, "max_steps": 2}).train()
    spec, model = EvaluationSpec(path="unread.jsonl"), ModelSpec(path=str(run / "student"))
    assert as_trained(spec, [model])[1] == []
    trainer = make(run, **PLAIN)
    trainer.add_callback(At(4, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    said = f"warning: {run} has not ended: its student/ is that of 2 updates, before it was resumed"
    assert as_trained(spec, [model, model])[1] == [said]
    recipe = write_pair(tmp_path, **{**SMALL, "max_steps": 1})
    words = [f"--student={run / 'student'}", f"--output_dir={tmp_path / 'next'}"]
    run_recipe(recipe, words, quiet=True)
    assert said in capsys.readouterr().out.replace("\n", " ")
    with monkeypatch.context() as patch:
        patch.setattr("topd.training.recorded.check_saved", lambda *_: interrupt())
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "new", **{**PLAIN, "max_steps": 1}).train()
    model = ModelSpec(path=str(tmp_path / "new" / "student"))
    assert as_trained(spec, [model])[1][0].endswith("has not ended: its student/ may be damaged")
    make(run, **PLAIN).train(resume_from_checkpoint=True)
    assert not_of_the_end(run / "student") == []


# What is said where there is no checkpoint


def test_a_full_disk_before_the_first_checkpoint_means_to_start_over(tmp_path):
    trainer = make(tmp_path, **{**PLAIN, "save_strategy": "no"})
    said = r"There is no checkpoint\. Free some space.*start over, in Python in another folder"
    with no_file_above(3000), pytest.raises(StoppedError, match=said):
        trainer.train()
    with pytest.raises(TOPDError, match=r"holds no checkpoint.*choose another output_dir"):
        make(tmp_path, **PLAIN).train(resume_from_checkpoint=True)
