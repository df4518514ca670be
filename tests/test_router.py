"""The load-balancing loss of a mixture of experts is the model's own, and has its gradient."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, JetMoeConfig, MixtralConfig, Qwen3MoeConfig

from conftest import DEVICE, USE_CPU, VOCAB, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.errors import TOPDError
from topd.training.learning.router import check_router, router_weight

SIZE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "output_router_logits": True,
    "router_aux_loss_coef": 0.5, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STUDENTS = {
    "mixtral": MixtralConfig(**SIZE, intermediate_size=48, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZE, intermediate_size=48, moe_intermediate_size=16, num_experts=4, head_dim=8
    ),
}
LAYERS = {"target_modules": ["q_proj", "v_proj"]}
METHODS = [{"method": "opd"}, {"method": "window_kd"}, {"method": "topd", "trajectory_weight": 0.5}]


def student(kind: str, **changed):
    torch.manual_seed(0)
    config = copy.deepcopy(STUDENTS[kind])
    for name, value in changed.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # float64 too
    return model.to(DEVICE)


def make(folder: Path, model, **options) -> TOPDTrainer:
    peft_config = options.pop("peft_config", None)
    args = {
        "method": "opd", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_completion_length": 12, "window_length": 4, "candidate_fraction": 0.3, "max_steps": 1,
        "save_strategy": "no", "use_cpu": USE_CPU, "seed": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "warmup_steps": 0, **options,
    }  # fmt: skip
    data = [{"prompt": "so " * i + row["prompt"]} for i, row in enumerate(rows(4))]  # ragged
    return TOPDTrainer(
        model,
        tiny_model("qwen3", seed=1),
        TOPDConfig(output_dir=str(folder), **args),
        data,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def gradients(model, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(model.parameters(), found, strict=True)
    ]


def own_balance(model, batch) -> Tensor:
    """What the model's forward says by itself, of the rows without their padding."""
    mask = torch.zeros_like(batch["input_ids"])
    for row, count in enumerate(batch["read"]):
        mask[row, :count] = 1
    return model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).aux_loss


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_the_update_has_the_models_own_balance_and_its_gradient(tmp_path, kind, options):
    """Over micro-batches of unlike size: each by its share of the rollouts."""
    trainer = make(tmp_path, student(kind).double(), **options)
    model, config = trainer.model, trainer.model.config
    experience = trainer.observer.observe(trainer.train_dataset, step=0)
    batches = trainer._collated(experience, [3, 1])
    assert all(batch["visible"] is None for batch in batches)
    shares = [3 / 4, 1 / 4]

    def update() -> Tensor:
        return sum(trainer.compute_loss(model, batch) for batch in batches)

    both = update()
    balance = sum(s * own_balance(model, b) for s, b in zip(shares, batches, strict=True))
    expected = gradients(model, 0.5 * balance)
    assert max(g.abs().max() for g in expected) > 1e-4
    learned = gradients(model, both)
    config.output_router_logits = False
    plain = update()
    torch.testing.assert_close(both - plain, (0.5 * balance).to(both.dtype), rtol=1e-6, atol=1e-6)
    without = gradients(model, plain)
    for ours, rest, theirs in zip(learned, without, expected, strict=True):
        torch.testing.assert_close(ours - rest, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_learns_and_logs_the_balance(tmp_path, lora):
    """The coefficient changes the weights, and its part of the loss is in metrics.jsonl."""
    options = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", **LAYERS)} if lora else {}

    def run(weight: float) -> tuple[dict, list[Tensor]]:
        folder = tmp_path / str(weight)
        trainer = make(
            folder, student("mixtral", router_aux_loss_coef=weight), bf16=False, **options
        )
        trainer.train()
        logs = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return logs[0], [p.detach().clone() for p in trainer.model.parameters()]

    (plain, without), (log, learned) = run(0.0), run(4.0)
    assert "router_aux_loss" not in plain
    assert log["loss"] - plain["loss"] == pytest.approx(log["router_aux_loss"], rel=1e-4)
    assert log["router_aux_loss"] > 4.0  # a balance is at least 1, times the weight
    assert any(not torch.equal(p, q) for p, q in zip(without, learned, strict=True))


def test_recomputed_activations_keep_the_gradient_of_the_balance_or_are_refused(tmp_path):
    for reentrant in (False, True):
        trainer = make(
            tmp_path / str(reentrant), student("mixtral"), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        if reentrant:
            with pytest.raises(TOPDError, match=r"has no gradient.*use_reentrant: false"):
                trainer.train()
        else:
            trainer.train()


def test_a_balance_that_the_model_does_not_give_is_refused(tmp_path):
    model = tiny_model()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    said = r"weight 0\.5, and Qwen3ForCausalLM does not say.*output_router_logits: false"
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, model)


def test_a_balance_under_a_name_of_its_own_is_found_or_refused():
    """JetMoE's coefficient has another name; one that nobody knows is not passed over."""
    config = JetMoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2,
        kv_channels=8, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, aux_loss_coef=0.25,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    assert router_weight(model) == 0.25
    check_router(model)
    model.aux_loss_coef = 0.75  # what its forward reads
    with pytest.raises(TOPDError, match=r"weight 0\.25, and JetMoeForCausalLM does not say"):
        check_router(model)
