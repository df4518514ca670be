"""The memory of an update, against what autograd keeps and against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench.families import tiny
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from topd import TOPDConfig
from topd.engines.graphs.buffers import Buffers, grown
from topd.training.footprint import (
    BESIDE,
    GIB,
    ModelSize,
    Work,
    activations,
    highest,
    memory_warning,
    peaks,
    size_of,
    warning,
    work_of,
)
from topd.training.warmstart import WarmstartConfig
from topd.types import Prompt

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
}


def kept(kind: str, layers: int, *, half: bool) -> int:
    """Bytes that autograd keeps of 400 tokens, without weights."""
    model = tiny_model(kind, num_hidden_layers=layers, **SIZES).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (storage.data_ptr() not in weights and tensor.dim() > 2) or len(tensor) == 400:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other gets its place
        return tensor

    ids = torch.zeros(2, 200, dtype=torch.long, device=model.device)
    kind_of = model.device.type
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(kind_of, torch.bfloat16, enabled=half),
    ):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("half", [True, False])
def test_a_layers_activations_are_those_that_autograd_keeps(model_kind, half):
    size = size_of(tiny_model(model_kind, **SIZES))
    found = (kept(model_kind, 4, half=half) - kept(model_kind, 2, half=half)) / 2 / 400
    assert activations(size, 2 if half else 4) == pytest.approx(found, rel=0.03)


def test_sizes_are_those_of_the_model_and_its_adapter():
    model = tiny_model("llama")
    count = sum(p.numel() for p in model.parameters())
    size = size_of(model, trained=True)
    assert (size.weights, size.trained, size.bytes) == (count, count, 4 * count)
    assert (size.layers, size.width, size.queries, size.keys) == (2, 32, 32, 16)
    assert not size.normed
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert size_of(adapted, trained=True).trained == 2 * 2 * (32 + 32)
    assert size_of(tiny_model("qwen3").bfloat16()).bytes == 2 * size_of(tiny_model()).weights


SIZE = ModelSize(4_000, 1_000, 1_000, 2, 8, 16, 8, 4, 100, False)
WORK = Work(4, 2, 2, 10, 20, half=False)


def test_weights_gradients_and_moments_are_counted_once():
    """float32: 4 bytes stored, 8 of AdamW, 4 of gradients while it learns."""
    found = peaks(SIZE, replace(SIZE, trained=0), WORK)
    always = 4_000 + 4_000 + 8_000 + BESIDE
    buffers = 4 * 128 * 2 * 2 * 4 * 4  # of graphs: lengths are rounded up
    prefixes = 4 * 10 * (4 * 8 + 2 * 16 + 2 * 8) * 4  # a layer of the prompts' forward
    assert found["rollouts"] == always + buffers + prefixes
    states = 4 * 20 * 8 * 4
    layer = 60 * (24 * 8 + 8 * 12 + 16 * 16)
    loss = 60 * 200 * 6 + 100 * 8 * 4
    assert found["learning"] == always + states + buffers + 4_000 + 2 * layer + max(loss, layer)


def test_rows_between_two_buckets_take_the_larger_one():
    some, more, most = (
        peaks(SIZE, SIZE, replace(WORK, rollouts=rows))["learning"] for rows in (32, 33, 64)
    )
    states = 20 * 8 * 4
    assert more - some == pytest.approx(32 * 128 * 2 * 2 * 4 * 4 + states)
    assert most - more == pytest.approx(31 * states)


def test_buffers_that_may_have_been_too_small_are_a_quarter_larger():
    """For rollouts where prompts differ by more than lengths are rounded to; for windows always."""
    often = replace(WORK, prompt=200, shortest=200)  # 220 tokens: 256 entries
    alike, other = (
        peaks(SIZE, SIZE, replace(often, shortest=n))["learning"] for n in (107, 106)
    )  # 127 and 126 tokens, and 2 of slack: 256 and 128 entries
    assert alike == peaks(SIZE, SIZE, replace(often, shortest=None))["learning"]
    assert other - alike == 4 * 256 // 4 * 2 * 2 * 4 * 4
    looking = replace(WORK, window=5, windows=8)
    found, without = (peaks(SIZE, SIZE, work)["rollouts"] for work in (looking, WORK))
    assert found - without == (1024 + 8 * 16) * 5 / 4 * 2 * 2 * 4 * 4  # prefixes; 16 a window


def test_buffers_grow_as_is_predicted():
    model = tiny_model()
    place = torch.zeros(4, dtype=torch.long, device=model.device)
    buffers, entry = Buffers(model, place), torch.zeros(1, 2, 1, 8, device=model.device)
    for length, expected in ((128, 128), (256, grown(256)), (320, 320), (384, grown(384))):
        buffers.open(4, length)
        with buffers.noting() as cache:
            cache.update(entry, entry, 0)
        assert buffers.layers[0].own.pair[0].numel() == 4 * expected * 2 * 8


def test_what_takes_less_memory_is_predicted_to():
    def peak(**changes) -> float:
        return max(peaks(SIZE, SIZE, replace(WORK, micro=64, response=500, **changes)).values())

    assert peak(recomputed=True) < peak()
    assert peak(half=True) < peak()
    lora = replace(SIZE, trained=10)
    assert max(peaks(lora, SIZE, WORK).values()) < max(peaks(SIZE, SIZE, WORK).values())
    assert (
        peaks(SIZE, SIZE, WORK)["scoring and windows"]
        < (peaks(SIZE, SIZE, replace(WORK, window=5))["scoring and windows"])
    )


def test_the_work_is_that_of_the_settings_and_the_longest_prompt():
    args = TOPDConfig(
        output_dir="unused",
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_completion_length=30,
        window_length=7,
        method="topd",
    )
    prompts = [Prompt(0, (1,) * n, (1,)) for n in (3, 9, 4)]
    expected = Work(6, 2, 2, 9, 30, window=7, half=False, windows=2, shortest=3)
    assert work_of(args, prompts) == expected
    args.score_batch_size = 6
    assert work_of(args, prompts) == replace(expected, scored=6, windows=5)
    args.method = "opd"
    assert work_of(args, [replace(prompts[0], response=(5,) * 4)]).response == 4


@pytest.mark.parametrize(("kd_ratio", "most"), [(0.0, 1), (0.5, 2)])
def test_stage_1_writes_no_rollouts_and_by_cross_entropy_scores_none(kd_ratio, most):
    found = {"rollouts": 3, "scoring and windows": 2, "learning": 1}
    args = WarmstartConfig(output_dir="unused", use_cpu=True, kd_ratio=kd_ratio)
    assert highest(found, args) == most
    assert highest(found, TOPDConfig(output_dir="unused", use_cpu=True)) == 3


def test_a_run_that_will_not_fit_is_warned_of_with_what_to_do(monkeypatch):
    assert warning(10 * GIB, 24 * GIB) is None
    said = warning(30 * GIB, 24 * GIB)
    assert said is not None
    assert said.startswith("about 30 GiB are needed at the highest, the GPU has 24.")
    assert "per_device_train_batch_size" in said
    model, prompts = tiny_model(), [Prompt(0, (1, 2), (1, 2))]
    args = TOPDConfig(output_dir="unused", use_cpu=True)
    assert memory_warning(model, model, args, prompts) is None  # no GPU
    gpu = SimpleNamespace(total_memory=GIB)
    monkeypatch.setattr(TOPDConfig, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert "the GPU has 1." in str(memory_warning(model, model, args, prompts))
    for kind in ("Mamba", "RWKV", "xLSTM"):  # without attention: nothing is predicted
        assert memory_warning(tiny(kind), model, args, prompts) is None
        assert memory_warning(model, tiny(kind), args, prompts) is None
    gpu.total_memory = 2 * GIB
    assert memory_warning(model, tiny_model(), args, prompts) is None
    assert memory_warning(model, tiny_model(), args, prompts, GIB) is not None  # with an average
