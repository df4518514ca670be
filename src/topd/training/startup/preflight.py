"""What must work at the end of a run is tried at its beginning, and its end is held against it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from topd.errors import TOPDError
from topd.inputs.models import (
    LOADED,
    ModelSource,
    ModelSpec,
    config_of,
    generation_config_of,
)
from topd.inputs.models.bare import named_faults
from topd.inputs.models.heads import evaluating
from topd.inputs.models.saved import remake_buffers
from topd.inputs.models.vocabulary import PROBE, known_ids

logger = logging.get_logger(__name__)
SPLIT = (PROBE, "It's 12345.67,\n\n  HELLO\t\tThere")  # numbers and spaces: tokenizers group them
MOST_KL = 1e-2  # nats a token between the student in memory and the one on disk
_UNUSED = {  # fields of a generation config that greedy decoding, or one beam, does not read
    "do_sample": "temperature top_p min_p top_h typical_p top_k epsilon_cutoff eta_cutoff",
    "num_beams": "early_stopping length_penalty",
}


def check_kept(sources: Sequence[object], run: Path) -> None:
    """Whether a run would write over one of its own models at its end. Raises TOPDError."""
    written = {(run / name).resolve() for name in ("student", "adapter")}
    for source in sources:
        place = source.config._name_or_path if isinstance(source, LOADED) else source
        place = str(getattr(place, "path", None) or place)
        if Path(os.path.expanduser(place)).resolve() in written:
            raise TOPDError(
                f"output_dir: {run}: this run would save its student over {place}, one of its "
                "models. Choose another folder."
            )


def check_saving(student: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save all of a student but its weights, in a folder of no importance. Raises TOPDError."""
    config = copy.deepcopy(generation_config_of(student))
    if config is None and isinstance(student, LOADED):
        raise TOPDError(
            "student: its generation_config is None, and transformers does not save it so. Set "
            "model.generation_config = GenerationConfig.from_model_config(model.config)."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            if config is not None:
                mend(config)
                config.save_pretrained(folder)
            with named_faults():
                tokenizer.save_pretrained(folder)
            config_of(student).save_pretrained(folder)
        except (ValueError, TypeError, AttributeError, OSError) as error:
            full = isinstance(error, OSError) and error.errno is not None
            raise TOPDError(
                "student: what belongs to it cannot be saved, so a run would be lost at its end: "
                f"{str(error).rstrip('.')}. "
                + (
                    f"Free some space in {tempfile.gettempdir()}, or set TMPDIR."
                    if full
                    else "Correct its generation_config.json, config.json or tokenizer."
                )
            ) from error
        _check_read_back(folder, student, tokenizer)


def _check_read_back(folder: str, student: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the tokenizer that was saved is the same once it is read. Raises TOPDError if not.

    transformers goes by the model's type: of some types it makes their own tokenizer of any file.
    """
    trusted = getattr(student, "trust_remote_code", False)
    try:
        again = ModelSpec(path=folder, trust_remote_code=trusted).load_tokenizer()
    except TOPDError:  # it needs code that is not saved with it
        return
    if all(known_ids(again, text) == known_ids(tokenizer, text) for text in SPLIT):
        return
    kinds = [type(one).__name__ for one in (tokenizer, again)]
    raise TOPDError(
        f"student: its tokenizer ({kinds[0]}) would be another once it is saved with the student "
        f"and read again ({kinds[1]}), and split text otherwise: transformers goes by the model's "
        f"type, {config_of(student).model_type}. Leave tokenizer (processing_class) of the student "
        "out, or choose a student whose own tokenizer it is."
    )


def mend(config: GenerationConfig | None) -> None:
    """Take out of a generation config what it does not use and transformers refuses to save."""
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        dropped = []
        for switch, names in _UNUSED.items():
            if getattr(config, switch, None) in (None, False, 1):
                dropped += [name for name in names.split() if getattr(config, name, None)]
        for name in dropped:
            setattr(config, name, None)
        config.validate(strict=True)
        logger.warning(
            f"student: its generation config has {', '.join(dropped)}, which it does not use "
            "(do_sample or num_beams is off). They are left out of what is saved."
        )


def without_dropout(model: nn.Module) -> None:
    """Set every dropout, layer drop and router noise of a model to 0, whatever class it has.

    Raises:
        TOPDError: its noise is part of what it computes without noise too (PhiMoE's routing).
    """
    noisy = any("jitter" in name for module in model.modules() for name in vars(module))
    before = _logits(model) if noisy else None
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    if before is not None and not torch.equal(before, _logits(model)):
        raise TOPDError(
            f"student: {type(model).__name__} is another model once its router noise (jitter) is "
            "0, and samples its experts otherwise. It cannot be trained here: choose a student of "
            "another architecture."
        )


def check_forward(model: PreTrainedModel) -> None:
    """Compare forwards in training and in evaluation: what differs is noise.

    Where it comes from the configuration itself, read at every forward (Falcon), it is set to 0
    there. Raises TOPDError if it is not gone then.
    """
    if not _noise(model):
        return
    config = model.config.get_text_config()
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
    noise = _noise(model)
    if noise:
        raise TOPDError(
            f"student: {type(model).__name__} computes otherwise in training than in sampling, by "
            f"up to {noise:.3g} in its last hidden states, although its dropout is off. Turn "
            "noise off in its configuration, or set disable_dropout: false and max_logprob_gap."
        )


@torch.no_grad()
def _noise(model: PreTrainedModel) -> float:
    """How far last hidden states differ between training and evaluation; 0 for rounding alone."""
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    decoder = model.get_decoder()

    def states(mode: bool) -> Tensor:
        model.train(mode)
        return decoder(input_ids=ids, use_cache=False).last_hidden_state.float()

    with evaluating(model):
        expected = states(False)
        gap = max((states(True) - expected).abs().max().item() for _ in range(2))
    return gap if gap > 1e-2 * expected.abs().max().item() else 0.0  # a NaN is for score to report


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """[16 16 V] logits of random tokens in evaluation; 0 for NaN."""
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (16, 16), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        return model(input_ids=ids.to(model.device), use_cache=False).logits.nan_to_num()


@torch.no_grad()
def check_saved(folder: Path, model: PreTrainedModel | PeftModel) -> float:
    """Read a saved student and compare it with the one in memory on a few tokens.

    16-bit weights are compared in float32: an adapter that is merged is rounded, as are products on
    another device. The tokens are random ones of the whole vocabulary: what a model makes of the
    first few, which no text has, multiplies rounding to nats.

    Returns:
        The largest KL(in memory || on disk) of a next token, nats.

    Raises:
        TOPDError: it is above ``MOST_KL``, or one of the two has NaN logits; everything that was
            written stays there.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    size = base.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, 16), generator=torch.Generator().manual_seed(0))
    forward = getattr(model, "_original_forward", model)  # not accelerate's, with its autocast
    half = base.dtype.itemsize == 2
    with evaluating(model), _wide(model) if half else nullcontext():
        ours = forward(input_ids=ids.to(model.device), use_cache=False).logits
    if ours.isnan().any():
        raise TOPDError(
            f"{folder}: the student has NaN logits since its last update. Earlier checkpoints are "
            "kept: resume from one with a lower learning_rate; 16-bit weights are better loaded "
            "in float32, with bf16: true."
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        dtype = torch.float32 if half else base.dtype
        saved = type(base).from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        saved = remake_buffers(saved)
    finally:
        logging.set_verbosity(verbosity)
    theirs = saved(input_ids=ids, use_cache=False).logits
    gap = kl(ours.cpu(), theirs)
    if not gap <= MOST_KL:  # NaN too
        raise TOPDError(
            f"{folder}: holds another model than the one that was trained: their next tokens "
            f"differ by {gap:.3g} nats, the limit is {MOST_KL}. Checkpoints and adapter/ are kept: "
            "use those."
        )
    return gap


@contextmanager
def _wide(model: nn.Module) -> Iterator[None]:
    """Inside, a model's weights are in float32 and on the CPU; then they are those of before."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(
                "cpu", torch.float32 if tensor.is_floating_point() else None
            )
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def kl(ours: Tensor, theirs: Tensor) -> float:
    """The largest KL divergence of a next token, nats; NaN where logits are."""
    p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    return float((p.exp() * (p - q).masked_fill(p == -torch.inf, 0.0)).sum(-1).max())
