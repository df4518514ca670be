"""Which weights and which prompts: SHA-256 of models and data."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from topd.distributed import WRAPPER, whole
from topd.types import Prompt

BELOW = "sha256_below"  # of a model with an adapter: of the one below, before it was wrapped


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the token ids of all prompts, in order, and their teachers' names, if any."""
    digest = hashlib.sha256()
    for prompt in prompts:
        named = [] if prompt.teacher_name is None else [prompt.teacher_name]
        record = [prompt.student, prompt.teacher, prompt.response, *named]
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


def model_fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Name, size and a SHA-256 over every parameter's name, shape, type and values.

    Of a student with an adapter, those of the model below it, as it was before if that is known; of
    a teacher, which is frozen, its adapter's too.
    """
    tensors = _base_weights(model)
    config = getattr(model, "config", None)
    return {
        "name": getattr(config, "_name_or_path", "") or type(model).__name__,
        "class": type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__,
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": getattr(model, BELOW, None) or _tensor_digest(tensors),
    }


def is_elsewhere(model: torch.nn.Module) -> bool:
    """Whether a model's layers are at a server, so that its fingerprint is of its head alone."""
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    return getattr(config, "num_hidden_layers", None) == 0


def trained_digest(model: torch.nn.Module) -> str:
    """SHA-256 over 64 spaced values of every trainable parameter: one update changes it.

    A collective where the model is sharded; the digest is that of the whole model.
    """
    return _spaced_digest({n: p for n, p in model.named_parameters() if p.requires_grad})


def saved_digest(model: torch.nn.Module) -> str:
    """The same, and of the buffers that are saved: a model's own code may change them in training.

    A checkpoint of an adapter has none of them.
    """
    kept = model.state_dict().keys()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return _spaced_digest({**trained, **{n: b for n, b in model.named_buffers() if n in kept}})


def _spaced_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    values: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        step = max(1, tensor.numel() // 64)
        values[name.replace(WRAPPER, "")] = whole(tensor).flatten()[::step]
    return _tensor_digest(_fetched(values))


def _fetched(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat tensors on the CPU; those of one kind come together, as each copy waits for a GPU."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        kinds[tensor.dtype, tensor.device][name] = tensor
    found: dict[str, torch.Tensor] = {}
    for some in kinds.values():
        parts = torch.cat([*some.values()]).cpu().split([*map(len, some.values())])
        found.update(zip(some, parts, strict=True))
    return found


def _base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    learns = any(parameter.requires_grad for parameter in model.parameters())
    if not (isinstance(model, PeftModel) and learns):
        return weights
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if ".lora_" not in name
    }


def _plain(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name; those that torchao has quantised are made of several."""
    for name, tensor in sorted(tensors.items()):
        if hasattr(tensor, "__tensor_flatten__"):
            parts = tensor.__tensor_flatten__()[0]
            yield from _plain({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            yield name, tensor


def _tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in _plain(tensors):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
