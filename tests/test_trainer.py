"""The trainer: its loss and gradient against dense formulas, its run folder against itself."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import pytest
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TrainerCallback,
)

from conftest import DEVICE, EOS, USE_CPU, VOCAB, Gradients, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer, transport
from topd.config import CHECKPOINTING
from topd.errors import TOPDError
from topd.inputs.models.fingerprints import fingerprint, model_fingerprint
from topd.inputs.models.heads import head_of
from topd.losses import token_divergence, trajectory_loss
from topd.training.experience import Observer
from topd.training.experience.evidence import Experience
from topd.training.learning import Totals, collate, learning_terms
from topd.training.sampler import GroupSampler
from topd.training.trainer import _what_is_there_kept
from topd.types import Rollout

K = 4
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 12,
    "seed": 46,  # rollouts of many lengths
    "method": "topd",
    "window_length": K,
    "candidate_fraction": 0.3,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def student(**changes) -> PreTrainedModel:
    """Some of its rollouts end soon, some never."""
    return tiny_model("llama", seed=0, **changes)


def teacher() -> PreTrainedModel:
    return tiny_model("qwen3", seed=1)


def make(
    folder: Path,
    *models: PreTrainedModel,
    data: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    **options,
) -> TOPDTrainer:
    """A trainer of a tiny pair that writes into ``folder``."""
    return TOPDTrainer(
        *(models or (student(), teacher())),
        TOPDConfig(output_dir=str(folder), **{**SMALL, **options}),
        train_dataset=data or rows(),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def double(folder: Path, **options) -> TOPDTrainer:
    """The same in float64, where only a wrong formula shows."""
    return make(folder, student().double(), teacher().double(), **options)


class Run(NamedTuple):
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    logs: list[dict[str, float]]
    rollouts: list[dict[str, Any]]
    guidance: list[dict[str, Any]]


def run(folder: Path, *models: PreTrainedModel, **options) -> Run:
    """Train, and return what came of it. Times are left out of the logs."""
    gradients = Gradients()
    trainer = make(folder, *models, callbacks=[gradients], **options)
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if "second" not in k and "runtime" not in k}
        for log in lines(folder, "metrics")
    ]
    weights = dict(trainer.model.state_dict())
    return Run(gradients.kept, weights, logs, lines(folder, "rollouts"), lines(folder, "guidance"))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def updates(logs: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [log for log in logs if "loss" in log]


def by_hand(trainer: TOPDTrainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of the first update, through the trainer's own methods."""
    size = trainer.args.per_device_train_batch_size
    prompts = trainer.train_dataset
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    batches, _ = trainer.get_batch_samples(iter(parts), len(parts), trainer.args.device)
    loss = sum(trainer.compute_loss(trainer.model, batch) for batch in batches)
    return loss.detach(), gradient(trainer.model, loss)


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def observed(trainer: TOPDTrainer) -> Experience:
    """The experience of the first update."""
    return trainer.observer.observe(trainer.train_dataset, step=0)


def totals(experience: Experience) -> Totals:
    return Totals(
        sum(len(rollout.response) for rollout in experience.rollouts),
        sum(len(guidance.targets) for guidance in experience.guidance),
    )


def dense(trainer: TOPDTrainer, rollout: Rollout, *, reader: str = "student") -> Tensor:
    """All log-probs [T V] of a model at a rollout's tokens, from the model's own logits."""
    model = trainer.model if reader == "student" else trainer.teacher_model
    prompt = getattr(rollout.prompt, reader)
    ids = torch.tensor([[*prompt, *rollout.response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return (logits / trainer.args.temperature).log_softmax(-1)


def dense_divergence(trainer: TOPDTrainer, rollout: Rollout) -> Tensor:
    theirs = dense(trainer, rollout, reader="teacher").detach()
    return token_divergence(dense(trainer, rollout), theirs)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


# Without guidance


@pytest.mark.parametrize(
    "switched_off",
    [{"trajectory_weight": 0.0}, {"ot_threshold": 1e9}, {"candidate_threshold": 1e9}],
    ids=lambda options: next(iter(options)),
)
def test_topd_without_guidance_is_opd_bit_for_bit(tmp_path, switched_off):
    opd = run(tmp_path / "opd", method="opd", max_steps=3)
    topd = run(tmp_path / "topd", method="topd", max_steps=3, **switched_off)
    assert [log["loss"] for log in updates(opd.logs)] == [log["loss"] for log in updates(topd.logs)]
    assert len(opd.gradients) == 3
    torch.testing.assert_close(topd.gradients, opd.gradients, rtol=0, atol=0)
    torch.testing.assert_close(topd.weights, opd.weights, rtol=0, atol=0)


def test_updates_between_those_that_look_ahead_are_opd(tmp_path):
    """Update 0 looks ahead, 1 and 2 do not: their records have no fork, and no fork's cost."""
    options = {"max_steps": 4, "look_ahead_every": 3, "method": "topd"}
    trainer = make(tmp_path / "topd", **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["topd/candidates"] > 0 for log in logs] == [True, False, False, True]
    assert [log["topd/teacher_tokens"] > 0 for log in logs] == [True, False, False, True]
    early = make(tmp_path / "early", **options | {"look_ahead_every": 1, "look_ahead_until": 2})
    early.train()
    logs = [log for log in early.state.log_history if "loss" in log]
    assert [log["topd/candidates"] > 0 for log in logs] == [True, True, False, False]
    other = make(tmp_path / "kl_top", **options | {"method": "kl_top", "max_steps": 2})
    other.train()
    lines = (tmp_path / "kl_top" / "guidance.jsonl").read_text().splitlines()
    weights = [json.loads(line)["weights"] for line in lines]
    assert not any(all(w == 1 for w in row) for row in weights if row)  # never plain OPD


def test_what_was_there_is_no_work_for_the_garbage_collector(tmp_path, monkeypatch):
    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.frozen = gc.get_freeze_count()

    monkeypatch.setattr("topd.training.trainer._what_is_there_kept", _what_is_there_kept)
    counted = Count()
    trainer = make(tmp_path)
    trainer.add_callback(counted)
    gc.unfreeze()  # what conftest.py has frozen
    try:
        trainer.train()
        assert counted.frozen > 100_000
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_guidance_changes_the_update(tmp_path):
    opd = run(tmp_path / "opd", method="opd")
    topd = run(tmp_path / "topd", method="topd")
    assert opd.rollouts == topd.rollouts
    assert all((topd.gradients[0][n] - g).abs().max() > 1e-3 for n, g in opd.gradients[0].items())


# One denominator


@pytest.mark.parametrize("method", ["opd", "topd", "downweight"])
def test_any_split_into_micro_batches_gives_the_same_update(tmp_path, method):
    def split(size: int) -> Run:
        return run(
            tmp_path / str(size),
            student().double(),
            teacher().double(),
            method=method,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )

    whole = split(8)
    lengths = {len(rollout["response_ids"]) for rollout in whole.rollouts}
    assert len(lengths) >= 4
    for size in (4, 2, 1):
        part = split(size)
        for ours, theirs in zip(part.rollouts, whole.rollouts, strict=True):
            scored = [record.pop("teacher_logprobs") for record in (dict(ours), dict(theirs))]
            assert scored[0] == pytest.approx(scored[1], abs=1e-9)
            assert {**ours, "teacher_logprobs": 0} == {**theirs, "teacher_logprobs": 0}
        assert [g["forks"] != [] for g in part.guidance] == [method != "opd"] * 8
        assert part.logs[0]["loss"] == pytest.approx(whole.logs[0]["loss"], rel=1e-6)
        torch.testing.assert_close(part.gradients, whole.gradients, rtol=1e-6, atol=1e-7)


def test_the_order_of_the_rollouts_in_an_update_does_not_matter(tmp_path):
    trainer = double(tmp_path)
    experience = observed(trainer)

    def learned(order: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = collate(experience, order, totals(experience), trainer.args.device)
        loss = trainer.compute_loss(trainer.model, batch)
        return loss.detach(), gradient(trainer.model, loss)

    torch.testing.assert_close(learned([5, 2, 7, 0, 6, 1, 3, 4]), learned(range(8)))


def test_a_longer_mate_in_the_batch_changes_no_token(tmp_path):
    trainer = double(
        tmp_path, data=[{"prompt": "so " * (i % 3) + r["prompt"]} for i, r in enumerate(rows())]
    )
    experience = observed(trainer)

    def terms(order: Sequence[int]) -> tuple[Tensor, ...]:
        batch = collate(experience, order, totals(experience), trainer.args.device)
        head = head_of(trainer.teacher_model)
        return learning_terms(trainer.model, batch, head, trainer.args).tokens

    short = min(range(8), key=lambda i: len(experience.rollouts[i].response))
    count = len(experience.rollouts[short].response)
    mates = [i for i in range(8) if i != short]
    alone, together = terms([short]), terms([short, *mates])
    for one, all_ in zip(alone[:3], together[:3], strict=True):
        torch.testing.assert_close(all_[:count], one, rtol=1e-9, atol=1e-9)


# The loss, densely


@pytest.mark.parametrize(
    ("solver", "epsilon", "reduction", "temperature"),
    [
        ("exact", 0.05, "mean", 1.0),
        ("exact", 0.05, "sum", 0.8),
        ("sinkhorn", 0.2, "mean", 0.8),
        ("sinkhorn", 0.2, "sum", 1.0),
    ],
)
def test_loss_and_gradient_with_guidance_equal_the_dense_formula(
    tmp_path, solver, epsilon, reduction, temperature
):
    trainer = double(
        tmp_path,
        solver=solver,
        epsilon=epsilon,
        trajectory_weight=0.7,
        trajectory_reduction=reduction,
        temperature=temperature,
        chunk_tokens=7,
    )
    experience = observed(trainer)
    divergence, logprobs, targets, mask = [], [], [], []
    embed = trainer.teacher_model.get_input_embeddings()
    for rollout, forks in zip(experience.rollouts, experience.forks, strict=True):
        divergence.append(dense_divergence(trainer, rollout))
        own = dense(trainer, rollout)
        for fork in forks:
            if not fork.real:
                continue
            window = torch.tensor([rollout.response[fork.position : fork.position + K]])
            theirs = torch.tensor([fork.teacher_tokens])[:, : fork.student_length]
            cost = transport.ground_cost(embed(window), embed(theirs))
            plan = transport.solve(cost, method=solver, epsilon=epsilon).plan
            soft = transport.soft_targets(plan, theirs, VOCAB)[0]
            pad = (0, 0, 0, K - window.shape[1])
            logprobs.append(nn.functional.pad(own[fork.position : fork.position + K], pad))
            targets.append(nn.functional.pad(soft, pad))
            mask.append(torch.arange(K) < window.shape[1])
    guided, tokens = torch.stack(mask), torch.cat(divergence)
    assert not guided.all()  # a window is cut short
    trajectory = trajectory_loss(torch.stack(logprobs), torch.stack(targets), guided)
    scale = 1 if reduction == "mean" else guided.sum() / len(tokens)
    expected = tokens.mean() + 0.7 * scale * trajectory
    loss, gradients = by_hand(trainer)
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, expected.detach(), **near)
    torch.testing.assert_close(gradients, gradient(trainer.model, expected), **near)


def test_downweight_caps_false_alarms_at_the_median_of_their_rollout(tmp_path):
    trainer = double(tmp_path, method="downweight", false_alarm_share=0.6)
    experience = observed(trainer)
    weighted, capped = [], 0
    for i, rollout in enumerate(experience.rollouts):
        divergence = dense_divergence(trainer, rollout).clone()
        cap = median(divergence.tolist())
        for fork in experience.forks[i]:
            if not fork.real and divergence[fork.position] > cap:
                divergence[fork.position] *= cap / divergence[fork.position].item()
                capped += 1
        weighted.append(divergence)
    assert capped > 3
    expected = torch.cat(weighted).mean()
    loss, gradients = by_hand(trainer)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, gradient(trainer.model, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window_gap", [None, 1])
def test_logged_loss_is_the_divergence_and_the_weighted_trajectory_loss(tmp_path, window_gap):
    log = run(tmp_path, window_gap=window_gap, trajectory_weight=0.5).logs[0]
    expected = log["reverse_kl"] + 0.5 * log["topd/trajectory_loss"]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = run(tmp_path / "plain")
    checked = run(tmp_path / "checkpointed", **{CHECKPOINTING: True})
    torch.testing.assert_close(checked.gradients, plain.gradients)


# Safety


def shifted(trainer: TOPDTrainer, nats: float) -> TOPDTrainer:
    """Its student reports log-probs that are off by so much."""
    generate = trainer.observer.student.generate

    def wrong(*args, **kwargs):
        return [
            replace(written, logprobs=tuple(p + nats for p in written.logprobs))
            for written in generate(*args, **kwargs)
        ]

    trainer.observer.student.generate = wrong
    return trainer


def test_sampling_and_training_logprobs_agree(tmp_path):
    assert all(log["logprob_gap"] < 1e-5 for log in updates(run(tmp_path, max_steps=2).logs))


def test_a_logprob_gap_above_the_limit_stops_the_run(tmp_path):
    with pytest.raises(TOPDError, match=r"differ by 0\.1500 nats.*max_logprob_gap"):
        shifted(make(tmp_path), -0.15).train()


@pytest.mark.parametrize(("second", "said"), [(0.15, r"0\.1500"), (math.nan, "nan")])
def test_every_micro_batch_of_an_update_is_held_against_what_was_sampled(tmp_path, second, said):
    """The first of two is as it should be; no weights change before both were looked at."""
    trainer = make(tmp_path)
    collated, before = trainer._collated, copy.deepcopy(trainer.model.state_dict())

    def wrong(*args: Any) -> list[Any]:
        batches = collated(*args)
        batches[1]["sampled"] += second
        return batches

    trainer._collated = wrong
    with pytest.raises(TOPDError, match=rf"differ by {said} nats"):
        trainer.train()
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_logprob_gap_below_the_limit_is_logged(tmp_path):
    trainer = shifted(make(tmp_path, max_logprob_gap=0.2), -0.15)
    trainer.train()
    assert trainer.state.log_history[0]["logprob_gap"] == pytest.approx(0.15, rel=1e-4)


def test_weights_that_change_between_sampling_and_learning_stop_the_run(tmp_path):
    trainer = make(tmp_path)
    inspect = trainer.observer.inspect

    def meddling(*args, **kwargs):
        with torch.no_grad():
            trainer.model.lm_head.weight *= 1.5
        return inspect(*args, **kwargs)

    trainer.observer.inspect = meddling
    with pytest.raises(TOPDError, match="log-probs at sampling and in training"):
        trainer.train()


def test_a_student_with_nan_weights_is_named_as_the_fault(tmp_path):
    broken = student()
    broken.lm_head.weight.data[5] = math.nan
    with pytest.raises(TOPDError, match="student"):
        make(tmp_path, broken, teacher()).train()


@pytest.mark.parametrize("where", ["lora", "attention"])
def test_disable_dropout_leaves_no_dropout(tmp_path, where):
    attention, lora = (0.5, 0.0) if where == "attention" else (0.0, 0.5)
    logs = run_lora(
        tmp_path,
        student(attention_dropout=attention),
        lora_dropout=lora,
        max_logprob_gap=99,
    )
    assert logs[-1]["logprob_gap"] < 1e-5


def run_lora(folder: Path, model: PreTrainedModel, lora_dropout: float, **options) -> list[dict]:
    trainer = make(
        folder,
        model,
        teacher(),
        peft_config=LoraConfig(**LORA, lora_dropout=lora_dropout),
        max_steps=2,
        learning_rate=0.05,
        **options,
    )
    trainer.train()
    return updates(trainer.state.log_history)


def test_dropout_that_is_kept_shows_in_the_logprob_gap_only(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=EOS, initializer_range=0.6))
    recorded = run(tmp_path, model.train(), teacher(), disable_dropout=False, max_logprob_gap=99)
    assert recorded.logs[0]["logprob_gap"] > 0.1


# What comes out


def test_only_the_adapter_learns_and_student_and_adapter_load_as_trained(tmp_path):
    base = student()
    trainer = make(
        tmp_path,
        copy.deepcopy(base),
        teacher(),
        peft_config=LoraConfig(**LORA),
        max_steps=2,
        learning_rate=0.05,
    )
    trainer.train()
    inner = trainer.model.get_base_model().state_dict()
    kept = {n.replace(".base_layer", ""): w for n, w in inner.items() if "lora_" not in n}
    torch.testing.assert_close(kept, dict(base.state_dict()), rtol=0, atol=0)
    assert all(w.abs().max() > 0 for n, w in inner.items() if "lora_B" in n)
    trained = logits(trainer.model)
    assert (trained - logits(base)).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student").to(DEVICE)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_output_head_is_trained_or_refused(tmp_path):
    peft_config = LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]})
    try:
        trainer = make(tmp_path, peft_config=peft_config, learning_rate=0.05)
    except TOPDError:
        return
    trainer.train()
    head = trainer.model.get_base_model().lm_head
    assert head.lora_B["default"].weight.abs().max() > 0


def test_the_saved_student_loads_as_trained_with_tokenizer_and_card(tmp_path):
    trainer = make(tmp_path, max_steps=2, teacher_prompt="so {{ prompt }}")
    trainer.train()
    folder = tmp_path / "student"
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    for fact in ("| method | topd |", "| updates | 2 |", "with a prompt of its own"):
        assert fact in card


def test_the_teacher_is_left_as_it_was(tmp_path):
    frozen = teacher()
    run(tmp_path, student(), frozen, max_steps=2)
    torch.testing.assert_close(dict(frozen.state_dict()), dict(teacher().state_dict()))
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_run_folder_agrees_with_itself(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    initial, prompts = model_fingerprint(trainer.model), trainer.train_dataset
    trainer.train()
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (config["method"], config["window_length"], config["max_steps"]) == ("topd", K, 2)
    assert manifest["models"]["student"] == initial
    assert manifest["models"]["teacher"] == model_fingerprint(trainer.teacher_model)
    assert manifest["data"] == fingerprint(prompts)
    logs = updates(lines(tmp_path, "metrics"))
    rollouts, guidance = lines(tmp_path, "rollouts"), lines(tmp_path, "guidance")
    keys = [(r["step"], r["rollout"]) for r in rollouts]
    assert keys == [(step, i) for step in (0, 1) for i in range(8)]
    assert keys == [(g["step"], g["rollout"]) for g in guidance]
    assert [r["prompt"] for r in rollouts] == [g["prompt"] for g in guidance]
    for rollout in rollouts:
        assert tuple(rollout["prompt_ids"]) == prompts[rollout["prompt"]].student
        assert len(rollout["logprobs"]) == len(rollout["response_ids"])
        assert rollout["finished"] == (rollout["response_ids"][-1] == EOS)
        assert rollout["text"] == tiny_tokenizer().decode(rollout["response_ids"])
    for step, log in enumerate(logs):
        forks = [f for g in guidance if g["step"] == step for f in g["forks"]]
        real = [f for f in forks if f["real"]]
        assert log["topd/candidates"] == len(forks) > 5
        assert log["topd/real_divergent_points"] == len(real)
        assert len(forks) - len(real) == round(0.3 * len(forks))
        assert log["topd/false_alarm_share"] == pytest.approx(1 - len(real) / len(forks))
        assert log["topd/mean_ot"] == pytest.approx(fmean(f["distance"] for f in forks))
        assert log["topd/teacher_tokens"] == sum(len(f["teacher_tokens"]) for f in forks)
        assert max(f["distance"] for f in forks if not f["real"]) <= min(
            f["distance"] for f in real
        )


def test_targets_stand_on_the_windows_of_real_forks_and_sum_to_one(tmp_path):
    recorded = run(tmp_path)
    for guidance, rollout in zip(recorded.guidance, recorded.rollouts, strict=True):
        guided = []
        for fork in guidance["forks"]:
            rest = len(rollout["response_ids"]) - fork["position"]
            assert fork["student_length"] == min(K, rest)
            window = range(fork["position"], fork["position"] + fork["student_length"])
            guided += [(t, fork["teacher_tokens"]) for t in window if fork["real"]]
        assert [t["position"] for t in guidance["targets"]] == [t for t, _ in guided]
        for target, (_, allowed) in zip(guidance["targets"], guided, strict=True):
            assert sum(target["probabilities"]) == pytest.approx(1, abs=1e-12)
            assert set(target["tokens"]) <= set(allowed)
        assert guidance["weights"] == {}


def test_a_run_without_rollout_log_writes_none(tmp_path):
    make(tmp_path, log_rollouts=False).train()
    assert not (tmp_path / "rollouts.jsonl").exists()
    assert len(updates(lines(tmp_path, "metrics"))) == 1


# What is measured


def test_metrics_equal_those_worked_out_from_the_rollouts(tmp_path):
    trainer = make(tmp_path, max_completion_length=40)
    order = GroupSampler(8, 1, trainer.args.seed)
    prompts = [trainer.train_dataset[i] for i in order]
    experience = trainer.observer.observe(prompts, step=0)
    with torch.no_grad():
        everywhere = torch.cat([dense(trainer, r) for r in experience.rollouts])
        divergence = torch.cat([dense_divergence(trainer, r) for r in experience.rollouts])
    trainer.train()
    log = trainer.state.log_history[0]
    responses = [rollout.response for rollout in experience.rollouts]
    assert log["entropy"] == pytest.approx(-(everywhere.exp() * everywhere).sum(-1).mean().item())
    assert log["reverse_kl"] == pytest.approx(divergence.mean().item(), rel=1e-5)
    assert log["completions/mean_length"] == fmean(map(len, responses))
    clipped = sum(EOS not in response for response in responses)
    assert 0 < clipped < 8
    assert log["completions/clipped_ratio"] == clipped / 8
    shares = []
    for response in responses:
        seen, repeats = set(), 0
        for i in range(len(response) - 3):
            repeats += response[i : i + 4] in seen
            seen.add(response[i : i + 4])
        shares.append(repeats / max(len(response) - 3, 1))
    assert max(shares) > 0
    assert log["completions/repeated_4gram_share"] == pytest.approx(fmean(shares), abs=1e-6)


def test_logs_average_over_the_updates_since_the_last(tmp_path):
    single = updates(run(tmp_path / "one", max_steps=2, logging_steps=1).logs)
    both = updates(run(tmp_path / "two", max_steps=2, logging_steps=2).logs)
    for name in ("completions/mean_length", "topd/candidates", "loss"):
        assert both[0][name] == pytest.approx(fmean(log[name] for log in single), rel=1e-6)


# What is sampled


def test_group_sampler_repeats_every_index_in_an_order_of_its_own_each_epoch():
    sampler = GroupSampler(5, 3, seed=1)
    first = list(sampler)
    assert len(sampler) == 15
    assert first == list(sampler) == list(GroupSampler(5, 3, seed=1))
    assert first == [i for i in first[::3] for _ in range(3)]
    assert sorted(first[::3]) == list(range(5))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(sampler) == sorted(first)


def test_every_prompt_is_answered_num_generations_times_within_an_update(tmp_path):
    recorded = run(
        tmp_path, num_generations=4, max_steps=8, max_completion_length=6, method="opd"
    ).rollouts
    prompts = [r["prompt"] for r in recorded]
    assert prompts == [i for i in prompts[::4] for _ in range(4)]  # 8 rollouts are 2 prompts
    epochs = prompts[:32:4], prompts[32::4]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(8))
    assert epochs[0] != epochs[1]
    groups = [recorded[i : i + 4] for i in range(0, 64, 4)]
    distinct = [len({tuple(r["response_ids"]) for r in group}) for group in groups]
    assert fmean(distinct) > 3


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first = run(tmp_path / "first", max_steps=2)
    again = run(tmp_path / "again", max_steps=2)
    other = run(tmp_path / "other", max_steps=2, seed=43)
    assert again.rollouts == first.rollouts
    assert again.guidance == first.guidance
    assert again.logs == first.logs
    torch.testing.assert_close(again.weights, first.weights, rtol=0, atol=0)
    responses = [{tuple(r["response_ids"]) for r in some.rollouts} for some in (first, other)]
    assert len(responses[0] & responses[1]) < 4


def test_sampling_neither_reads_nor_moves_the_global_random_state(tmp_path):
    trainer = make(tmp_path, window_temperature=1.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = observed(trainer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = observed(trainer)
    assert (again.rollouts, again.forks) == (first.rollouts, first.forks)


# Evaluation


def test_evaluation_is_finite_and_the_same_at_every_step(tmp_path):
    trainer = make(tmp_path, eval_dataset=rows(5))
    first = trainer.evaluate()["eval_loss"]
    trainer.state.global_step = 3
    assert trainer.evaluate()["eval_loss"] == first
    assert 0 < first < math.inf


@pytest.mark.parametrize("size", [1, 3, 8])
def test_eval_loss_is_the_mean_over_tokens_whatever_the_batch_size(tmp_path, monkeypatch, size):
    trainer = make(tmp_path, eval_dataset=rows(), per_device_eval_batch_size=size)
    given, observe = [], Observer.observe

    def spy(*args, **kwargs):
        given.append(observe(*args, **kwargs))
        return given[-1]

    monkeypatch.setattr(Observer, "observe", spy)
    loss = trainer.evaluate()["eval_loss"]
    rollouts = [rollout for experience in given for rollout in experience.rollouts]
    assert len(rollouts) == 8
    expected = torch.cat([dense_divergence(trainer, r) for r in rollouts]).mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_does_not_disturb_training(tmp_path):
    plain = run(tmp_path / "plain", max_steps=2)
    evaluated = run(
        tmp_path / "evaluated",
        max_steps=2,
        eval_dataset=rows(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert sum("eval_loss" in log for log in evaluated.logs) == 2
    assert evaluated.rollouts == plain.rollouts
    assert updates(evaluated.logs) == updates(plain.logs)
    torch.testing.assert_close(evaluated.weights, plain.weights, rtol=0, atol=0)


def test_a_teacher_equal_to_the_student_has_no_divergence_unless_its_prompt_differs(tmp_path):
    def loss(folder: str, **options) -> float:
        twins = student(), student()
        trainer = make(tmp_path / folder, *twins, eval_dataset=rows(), **options)
        return trainer.evaluate()["eval_loss"]

    assert loss("same") == pytest.approx(0, abs=1e-6)
    assert loss("own", teacher_prompt="{{ solution }} {{ prompt }}") > 0.1


# Edges


def test_responses_of_one_token_train(tmp_path):
    ends_at_once = student()
    ends_at_once.generation_config.eos_token_id = list(range(VOCAB))
    recorded = run(tmp_path, ends_at_once, teacher())
    assert [len(r["response_ids"]) for r in recorded.rollouts] == [1] * 8
    assert [f["student_length"] for g in recorded.guidance for f in g["forks"]] == [1] * 8
    assert math.isfinite(recorded.logs[0]["loss"])


def test_another_method_is_free_to_differ_only_in_guidance(tmp_path):
    runs = [run(tmp_path / m, method=m) for m in ("opd", "topd", "downweight")]
    assert runs[0].rollouts == runs[1].rollouts == runs[2].rollouts
    assert [g["forks"] for g in runs[1].guidance] == [g["forks"] for g in runs[2].guidance]
    assert not any(g["forks"] or g["weights"] or g["targets"] for g in runs[0].guidance)


@pytest.mark.parametrize(("limit", "told"), [(1, 1), (200, 0)])
def test_rollouts_that_are_mostly_cut_off_are_told_once(tmp_path, caplog, limit, told):
    make(tmp_path, max_completion_length=limit, max_steps=2).train()
    assert caplog.text.count(f"rollouts did not end within {limit} tokens. Raise max_c") == told
