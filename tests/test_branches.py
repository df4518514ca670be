"""Branches: continuations learned in their own context, packed after their rollout or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from conftest import DEVICE, EOS, USE_CPU, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.inputs.models.heads import head_of
from topd.losses import token_divergence
from topd.training.experience.evidence import Experience
from topd.training.learning import Totals, _added, collate, learning_terms, update_loss
from topd.training.learning.layout import Layout, can_pack
from topd.types import Branch, Guidance, SoftTarget

METHODS = [
    ("window_sft", {}),
    ("first_fork", {}),
    ("first_fork", {"after": 0.0}),
    ("window_kd", {}),
    ("window_kd", {"reverse": True}),
    ("relay", {}),
    ("eopd", {"threshold": 2.0}),
]
named = pytest.mark.parametrize(("method", "options"), METHODS)


def make(folder: Path, kind: str = "qwen3", **options) -> TOPDTrainer:
    args = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 24,
        "candidate_fraction": 0.15,
        "window_length": 6,
        "false_alarm_share": 0.2,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": USE_CPU,
        "seed": 3,
        "learning_rate": 1e-3,
        **options,
    }
    return TOPDTrainer(
        tiny_model(kind, seed=0).double(),
        tiny_model(kind, seed=1).double(),
        TOPDConfig(output_dir=str(folder), **args),
        rows(4),
        processing_class=tiny_tokenizer(),
    )


def observed(trainer: TOPDTrainer) -> Experience:
    experience = trainer.observer.observe(trainer.train_dataset, step=0)
    assert sum(len(guide.branches) for guide in experience.guidance) >= 3
    return experience


def loss_of(trainer: TOPDTrainer, experience: Experience, order: list[int], *, packed: bool):
    totals = Totals(
        sum(len(r.response) for r in experience.rollouts),
        sum(g.guided for g in experience.guidance),
    )
    batch = collate(experience, order, totals, trainer.args.device, packed=packed)
    terms = learning_terms(trainer.model, batch, head_of(trainer.teacher_model), trainer.args)
    loss, _ = update_loss(terms, batch, trainer.args)
    return loss, torch.autograd.grad(loss, list(trainer.model.parameters()))


def logprobs(model: torch.nn.Module, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """All log-probs [K V] along tokens after a prompt, from the model's own logits."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def by_hand(trainer: TOPDTrainer, experience: Experience) -> Tensor:
    """The update's loss, one rollout and one branch at a time."""
    tokens = sum(len(r.response) for r in experience.rollouts)
    guided = sum(g.guided for g in experience.guidance)
    guided = tokens if trainer.args.trajectory_reduction == "sum" else guided
    plain, trajectory = torch.zeros(()), torch.zeros(())
    for rollout, guide in zip(experience.rollouts, experience.guidance, strict=True):
        own = logprobs(trainer.model, rollout.prompt.student, rollout.response)
        theirs = logprobs(trainer.teacher_model, rollout.prompt.teacher, rollout.response)
        weights = torch.tensor(guide.weights, dtype=own.dtype)
        plain = plain + (weights * token_divergence(own, theirs.detach())).sum()
        for branch in guide.branches:
            before = rollout.response[: branch.start]
            own = logprobs(trainer.model, rollout.prompt.student + before, branch.tokens)
            theirs = logprobs(trainer.teacher_model, rollout.prompt.teacher + before, branch.tokens)
            if branch.loss == "cross_entropy":
                trajectory = trajectory - own.gather(-1, torch.tensor(branch.tokens)[:, None]).sum()
            else:
                kl = token_divergence(own, theirs.detach(), kind=branch.loss)
                trajectory = trajectory + kl.sum()
    return plain / tokens + trainer.args.trajectory_weight * trajectory / guided


@named
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradient_are_those_of_every_branch_alone(tmp_path, method, options, packed):
    trainer = make(tmp_path, method=method, method_options=options, trajectory_weight=0.7)
    experience = observed(trainer)
    loss, gradient = loss_of(trainer, experience, [0, 1, 2, 3], packed=packed)
    expected = by_hand(trainer, experience)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    parameters = list(trainer.model.parameters())
    reference = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("guidance", "learned"),
    [
        (Guidance((1.0, 1.0, 0.0, 0.5, 0.0, 0.0)), 4),
        (Guidance((0.0,) * 6), 0),
        (Guidance((0.0,) * 6, advantages=(0.0, 0.0, -1.0, 0.0, 0.0, 0.0)), 3),
        (Guidance((0.0,) * 6, targets=(SoftTarget(4, (1,), (1.0,)),)), 5),
        (Guidance((1.0,) + (0.0,) * 5, branches=(Branch(2, (7, 8), "forward_kl"),)), 3),
        (Guidance((0.0,) * 6, capped=(1,)), 6),
    ],
)
def test_only_tokens_up_to_the_last_that_counts_are_read(guidance, learned):
    assert guidance.learned == learned


def test_what_follows_the_fork_is_not_read_where_it_counts_nothing(tmp_path):
    trainer = make(tmp_path, method="first_fork", method_options={"after": 0.0})
    experience = observed(trainer)
    batch = collate(experience, range(4), Totals(1, 1), trainer.args.device)
    ends = [g.branches[0].start + 1 if g.branches else len(g.weights) for g in experience.guidance]
    assert batch["lengths"] == ends
    assert sum(ends) < sum(len(r.response) for r in experience.rollouts)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packing_changes_nothing_whatever_else_is_in_the_batch(tmp_path, kind):
    trainer = make(tmp_path, kind, method="window_kd")
    experience = observed(trainer)
    whole, gradient = loss_of(trainer, experience, [2, 0, 3, 1], packed=True)
    parts = [loss_of(trainer, experience, part, packed=False) for part in ([0], [1, 2], [3])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-6, atol=1e-6)
    added = [sum(g) for g in zip(*(g for _, g in parts), strict=True)]
    torch.testing.assert_close(added, list(gradient), rtol=1e-4, atol=1e-6)


def test_the_mask_of_packed_branches_is_made_and_kept_once_for_all_layers():
    """[B 1 L L] of a bool mask would become one of floats in each layer, kept for the gradient."""
    length, masks = 40, set()
    model = tiny_model(num_hidden_layers=4)
    layout = Layout([[0] * length], [[]], [(0, length - 8, 16, 8)])
    visible = layout.visible(length, DEVICE)

    def noted(kept: Tensor) -> Tensor:
        if kept.dim() == 4 and kept.shape[-2:] == (length, length):  # expanded over heads, or not
            masks.add(kept.untyped_storage().data_ptr())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda kept: kept):
        more = {"attention_mask": _added(visible, torch.float32)}
        ids = torch.zeros(1, length, dtype=torch.long)
        found = model.get_decoder()(input_ids=ids, use_cache=False, **more).last_hidden_state
    assert len(masks) == 1
    more = {"attention_mask": visible}
    plain = model.get_decoder()(input_ids=ids, use_cache=False, **more).last_hidden_state
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_the_mask_of_branches_has_the_precision_of_attention(dtype):
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with torch.autocast(DEVICE.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        added = _added(visible, torch.float32)
    assert added.dtype == (dtype or torch.float32)
    assert (added.float().softmax(-1) > 0).equal(visible)


def test_only_full_attention_that_takes_masks_is_packed():
    assert can_pack(tiny_model("llama"))
    assert can_pack(tiny_model("qwen3"))
    assert not can_pack(tiny_model("qwen3", attn_implementation="eager"))
    sliding = tiny_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not can_pack(sliding)


def test_a_relay_goes_on_from_the_teachers_window_until_its_end(tmp_path):
    trainer = make(tmp_path, method="relay", method_options={"tokens": 5})
    experience = observed(trainer)
    longer = 0
    for rollout, forks, guide in zip(
        experience.rollouts, experience.forks, experience.guidance, strict=True
    ):
        windows = {fork.position: fork.teacher_tokens for fork in forks if fork.real}
        for branch in guide.branches:
            window = windows[branch.start]
            assert branch.tokens[: len(window)] == window
            more = len(branch.tokens) - len(window)
            assert more <= 5
            assert more == 0 if window[-1] == EOS else more >= 1
            longer += more > 0
            assert rollout.response[: branch.start] + branch.tokens != rollout.response
    assert longer


@named
def test_a_run_with_branches_trains_and_records_them(tmp_path, method, options):
    trainer = make(tmp_path, method=method, method_options=options, max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
    )
    text = (tmp_path / "guidance.jsonl").read_text()
    assert '"branches"' in text
