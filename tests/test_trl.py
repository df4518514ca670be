"""With no guidance, loss, gradient and entropy are those of TRL's DistillationTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset
from torch import Tensor

from conftest import USE_CPU, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.types import Rollout

pytest.importorskip("trl", minversion="1.16")
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

QUIET = {"use_cpu": USE_CPU, "report_to": "none", "disable_tqdm": True}
SETTINGS = [(1.0, 1.0), (1.0, 0.7), (0.0, 1.0), (0.0, 0.7), (0.5, 1.0), (0.5, 0.7), (0.2, 1.0)]


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student, and a teacher of another family and width, in float64; always the same weights."""
    return (
        tiny_model("llama", seed=0, initializer_range=0.3).double(),
        tiny_model("qwen3", seed=1, hidden_size=40, initializer_range=0.3).double(),
    )


def ours(folder: Path, **changes) -> TOPDTrainer:
    student, teacher = pair()
    args = {
        "method": "opd",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 24,
        "seed": 5,  # rollouts of many lengths
        "chunk_tokens": 5,
        **changes,
    }
    return TOPDTrainer(
        student,
        teacher,
        TOPDConfig(output_dir=str(folder), **QUIET, **args),
        train_dataset=questions(),
        processing_class=tiny_tokenizer(),
    )


def theirs(folder: Path, beta: float, temperature: float) -> DistillationTrainer:
    student, teacher = pair()
    args = DistillationConfig(
        output_dir=str(folder),
        beta=beta,
        temperature=temperature,
        bf16=False,
        gradient_checkpointing=False,
        **QUIET,
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=Dataset.from_list(questions()),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    return trainer


def questions() -> list[dict[str, str]]:
    """Eight prompts of two lengths."""
    return [
        {**row, "prompt": "so " + row["prompt"] if i % 2 else row["prompt"]}
        for i, row in enumerate(rows())
    ]


def laid_out(sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask in TRL's layout."""
    width = max(map(len, sequences))

    def fill(values: Sequence[int]) -> list[int]:
        gap = [0] * (width - len(values))
        return [*gap, *values] if left else [*values, *gap]

    return (
        torch.tensor([fill(sequence) for sequence in sequences]),
        torch.tensor([fill([1] * len(sequence)) for sequence in sequences]),
    )


def trl_inputs(rollouts: Sequence[Rollout], items: int) -> dict[str, Tensor]:
    prompt_ids, prompt_mask = laid_out([r.prompt.student for r in rollouts], left=True)
    completion_ids, completion_mask = laid_out([r.response for r in rollouts], left=False)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "num_items_in_batch": torch.tensor(float(items)),
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("beta", "temperature"), SETTINGS)
def test_loss_gradient_and_entropy_of_an_update_equal_those_of_trl(tmp_path, beta, temperature):
    mine = ours(tmp_path / "topd", beta=beta, temperature=temperature)
    rollouts = mine.observer.observe(mine.train_dataset, step=0).rollouts
    lengths = [len(rollout.response) for rollout in rollouts]
    assert len(set(lengths)) >= 3
    prompts = mine.train_dataset
    batches, _ = mine.get_batch_samples(iter([prompts[:4], prompts[4:]]), 2, mine.args.device)
    loss = sum(mine.compute_loss(mine.model, batch) for batch in batches)
    loss.backward()

    trl = theirs(tmp_path / "trl", beta, temperature)
    expected = sum(
        trl.compute_loss(trl.model, trl_inputs(rollouts[i : i + 4], sum(lengths))) for i in (0, 4)
    )
    expected.backward()

    close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}  # TRL's loss itself is in float32
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(gradients(mine.model), gradients(trl.model), **close)
    entropy = mine.meter.take()["entropy"]
    by_batch = trl._metrics["train"]["entropy"]
    weighted = by_batch[0] * sum(lengths[:4]) + by_batch[1] * sum(lengths[4:])
    assert entropy == pytest.approx(weighted / sum(lengths), rel=1e-5)
