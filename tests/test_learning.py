"""Learning on a GPU as on a CPU: kernels without masks, and nobody waits for the device."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from conftest import DEVICE, USE_CPU, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.config import CHECKPOINTING
from topd.losses import chunked, linear_token_terms
from topd.training import learning
from topd.types import Head

METHODS = [
    {"method": "opd"},
    {"method": "topd", "trajectory_weight": 0.5},
    {"method": "olive"},
    {"method": "window_kd"},
    {"method": "window_sft"},
    {"method": "relay"},
    {"method": "topd", "beta": 0.3},
]
methods = pytest.mark.parametrize("options", METHODS, ids=lambda x: "-".join(map(str, x.values())))


def make(folder: Path, **options: Any) -> TOPDTrainer:
    args = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 24,
        "candidate_fraction": 0.15,
        "window_length": 6,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": USE_CPU,
        "seed": 3,
        **options,
    }
    return TOPDTrainer(
        tiny_model("qwen3", seed=0),
        tiny_model("qwen3", seed=1),
        TOPDConfig(output_dir=str(folder), **args),
        rows(4),
        processing_class=tiny_tokenizer(),
    )


def batch_of(trainer: TOPDTrainer) -> learning.LearningBatch:
    """The one micro-batch of an update."""
    experience = trainer.observer.observe(trainer.train_dataset, step=0)
    (trainer.batches,) = [trainer._collated(experience, [len(trainer.train_dataset)])]
    return trainer.batches[0]


def gradients(trainer: TOPDTrainer, batch: learning.LearningBatch) -> list[Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return [p.grad.clone() for p in trainer.model.parameters()]


@methods
@pytest.mark.parametrize("overlap", [False, True])
def test_the_loss_keeps_the_promise_of_its_factors(options, overlap, tmp_path, monkeypatch):
    """As on a GPU, where it is not looked into: a promise that is broken gives NaN."""
    trainer = make(tmp_path, **options)
    batch, found = batch_of(trainer), []
    trainer.args.overlap = overlap  # of which the loss knows importance only
    batch["sampled"] = batch["sampled"] + torch.linspace(-1, 1, len(batch["sampled"]))
    for promised in (False, True):
        monkeypatch.setattr(learning, "_promised", lambda _, answer=promised: answer)
        found.append(gradients(trainer, batch))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("method", ["opd", "window_kd"])
def test_attention_has_a_mask_for_packed_branches_only(method, tmp_path, monkeypatch):
    """Without one the kernels are those for causal attention, flash among them."""
    trainer, seen = make(tmp_path, method=method), []
    batch, attend = batch_of(trainer), torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        seen.append((attn_mask, kwargs["is_causal"], query.dtype))
        return attend(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    trainer.compute_loss(trainer.model, batch)
    assert len(seen) == trainer.model.config.num_hidden_layers
    assert (batch["visible"] is None) is (method == "opd")
    for mask, causal, dtype in seen:
        assert causal is (mask is None) is (method == "opd")
        assert mask is None or (mask.dtype == dtype and mask is seen[0][0])


def test_the_loss_has_the_memory_of_weights_that_autocast_made_narrow(tmp_path, monkeypatch):
    """Where activations are recomputed nobody needs them any more, and the loss is the peak."""
    options = {CHECKPOINTING: True, "bf16": True, "max_logprob_gap": 9.0}
    trainer, made, held = make(tmp_path, method="opd", **options), [], []
    shapes, terms = {p.shape for p in trainer.model.parameters()}, learning._terms

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
                made.extend([weakref.ref(found)] * (found.shape in shapes))
            return found

    def watched(*args: Any) -> Any:
        held.append(sum(one() is not None for one in made))
        return terms(*args)

    monkeypatch.setattr(learning, "_terms", watched)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(trainer)
    trainer.model.train()
    with Noted():
        trainer.compute_loss(trainer.model, batch).backward()
    assert len(made) >= 2 * 2 * 7  # of two layers, in both forwards
    assert held == [0]


@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_has_the_same_gradient_every_time_with_deterministic_kernels(biased, monkeypatch):
    """To the bit, with places named twice; a biased head takes the eager path on a GPU too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    generator = torch.Generator(DEVICE).manual_seed(0)
    states, weight, others, theirs = (
        torch.randn(n, 8, generator=generator, device=DEVICE) for n in (40, 97, 40, 97)
    )
    tokens, targets = torch.arange(40), torch.arange(40)[:, None].expand(-1, 3) // 2
    bias = weight[:, 0].clone() if biased else None
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            head = Head(weight.clone().requires_grad_(), bias)
            given = states, head, others, Head(theirs), tokens, targets
            terms = linear_token_terms(*given, chunk_tokens=16)
            loss = terms.divergence.sum() - terms.logprob.sum() - terms.target_logprobs.sum()
            found += torch.autograd.grad(loss, head.weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [*METHODS, {"method": "downweight"}, {"method": "eopd"}])
def test_a_micro_batch_waits_for_nothing_and_makes_nothing_elsewhere(
    options, tmp_path, monkeypatch
):
    """On a device without values both are refused, so that a GPU is not needed to see it."""
    trainer = make(tmp_path, **options)
    observer = trainer.observer
    experience = observer.observe(trainer.train_dataset, step=0)
    totals = trainer._totals(experience)
    for one in (trainer.model, observer.teacher.model):
        one.to("meta")
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)  # knows no such device
    monkeypatch.setattr(chunked, "_without_autocast", lambda _: nullcontext())
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)  # waits once
    rows, device = range(len(experience.rollouts)), torch.device("meta")
    batch = learning.collate(experience, rows, totals, device)
    assert {x.device for x in batch.values() if isinstance(x, Tensor)} == {device}
    terms = learning.learning_terms(trainer.model, batch, observer.teacher.head, trainer.args)
    loss, trajectory = learning.update_loss(terms, batch, trainer.args)
    trainer._measure(terms, trajectory, batch)
    loss.backward()
    assert all(p.grad.is_meta for p in trainer.model.parameters())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU is never waited for")
@methods
def test_a_micro_batch_waits_for_the_device_once_in_transformers_and_never_here(options, tmp_path):
    """transformers looks whether position ids are those of packed texts, before its layers."""
    trainer = make(tmp_path, bf16=True, max_logprob_gap=9.0, **options)
    batch = batch_of(trainer)
    gradients(trainer, batch)  # what is tried or compiled once
    trainer.gaps.clear()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.compute_loss(trainer.model, batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # not the notice of set_sync_debug_mode itself, that it is a prototype
    places = [x.filename for x in waits if "called a synchronizing" in str(x.message)]
    assert all("masking_utils" in place for place in places), places
    assert len(places) <= 1
