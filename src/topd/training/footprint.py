"""How much memory an update takes on a GPU, from the sizes of the models and the settings.

Counted from what is alive at once: weights, gradients and AdamW's moments; in each phase what it
adds. ``python -m bench.fits`` holds it against measured peaks (docs/hardware.md). Full attention is
assumed in all layers, so models with other caches take less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from topd.config import CHECKPOINTING, TOPDConfig
from topd.engines.graphs import BUCKETS, bucket
from topd.engines.graphs.buffers import SHARED_UNIT, grown, own_entries, rounded
from topd.inputs.teachers import TeacherSet
from topd.types import Prompt

GIB = 1 << 30
BESIDE = 1.0 * GIB  # the CUDA context, and what the allocator holds and cannot use
MOMENTS = 8  # bytes a trained weight: AdamW's two, in float32


@dataclass(frozen=True)
class ModelSize:
    """What a model's memory depends on.

    ``bytes`` are those of its weights; ``normed``: queries and keys have norms of their own.
    """

    bytes: int
    weights: int
    trained: int
    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    vocab: int
    normed: bool

    @property
    def wide(self) -> bool:
        """Whether autocast makes a second copy of the weights, in 16 bits."""
        return self.bytes > 3 * self.weights

    @property
    def cached(self) -> int:
        """Numbers in keys and values, a token."""
        return 2 * self.layers * self.keys


def size_of(model: PreTrainedModel, *, trained: bool = False) -> ModelSize:
    """The sizes of a model, which may be on the meta device."""
    parameters = list(model.parameters())
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad) if trained else 0,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocab=config.vocab_size,
        normed=any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


def size_of_all(teacher: PreTrainedModel | TeacherSet) -> ModelSize:
    """A teacher's; of several the largest one's, with the bytes of all."""
    models = teacher.models if isinstance(teacher, TeacherSet) else [teacher]
    sizes = [size_of(model) for model in models]
    return replace(max(sizes, key=lambda s: s.bytes), bytes=sum(s.bytes for s in sizes))


@dataclass(frozen=True)
class Work:
    """An update on one GPU. Lengths are in tokens, the longest that may come.

    ``rollouts`` in all, ``micro`` of them a forward and backward, ``scored`` a scoring forward,
    after which ``windows`` are written together, of ``window`` tokens.
    ``half``: products in 16 bits; ``recomputed``: activations are not kept. ``shortest`` is the
    shortest prompt; None: all are as long as the longest.
    """

    rollouts: int
    micro: int
    scored: int
    prompt: int
    response: int
    window: int = 0
    half: bool = True
    recomputed: bool = False
    chunk: int = 1024
    windows: int = 64
    shortest: int | None = None

    @property
    def longest(self) -> int:
        return self.prompt + self.response

    @property
    def entries(self) -> int:
        """Of a row of the buffers; more where an earlier update may have had shorter rows."""
        most = rounded(self.longest)
        shortest = self.prompt if self.shortest is None else self.shortest
        return grown(most) if rounded(shortest + self.response) < most else most


def work_of(args: TOPDConfig, prompts: Sequence[Prompt]) -> Work:
    """The update of a configuration on these prompts."""
    micro = args.per_device_train_batch_size
    written = [len(p.response) for p in prompts if p.response is not None]
    work = Work(
        rollouts=micro * args.gradient_accumulation_steps,
        micro=micro,
        scored=args.score_batch_size or micro,
        prompt=max(len(p.student) for p in prompts),
        shortest=min(len(p.student) for p in prompts),
        response=max(written, default=args.max_completion_length),
        window=args.longest_window if args.guidance_method().looks_ahead else 0,
        half=bool(args.bf16 or args.fp16),
        recomputed=bool(getattr(args, CHECKPOINTING)),
        chunk=args.chunk_tokens,
    )
    return with_windows(work, args.candidate_fraction)


def with_windows(work: Work, fraction: float) -> Work:
    """With as many windows as candidates of a scoring forward, that share of its tokens."""
    return replace(work, windows=min(BUCKETS[-1], 1 + int(work.scored * work.response * fraction)))


def peaks(student: ModelSize, teacher: ModelSize, work: Work) -> dict[str, float]:
    """Bytes that are taken at the highest of each phase of an update, all else included.

    The buffers that graphs write in stay from one update to the next. Those of windows grow, as no
    update has as many windows and tokens before them as the last; what graphs themselves keep is
    not counted.
    """
    byte = 2 if work.half else 4
    always = student.bytes + teacher.bytes + MOMENTS * student.trained + BESIDE
    copied = student.weights * byte if work.half and student.wide else 0
    states = work.rollouts * work.response * teacher.width * byte  # the teacher's, of all rollouts
    rows = bucket(work.rollouts)  # that are written together
    buffers = rows * work.entries * student.cached * byte
    writing = max(3 * rows * student.vocab * 4, _read(student, rows * work.prompt, byte))
    if work.window:
        entries = grown(rounded(work.scored * work.longest, SHARED_UNIT))
        entries += grown(bucket(work.windows) * own_entries(work.window))
        always += entries * teacher.cached * byte
    cast = buffers + copied + 4 * student.trained  # while it learns: and gradients
    return {
        "rollouts": always + copied + buffers + writing,
        "scoring and windows": always + states + buffers + copied + _scored(teacher, work, byte),
        "learning": always + states + cast + _learned(student, teacher, work, byte),
    }


def _read(model: ModelSize, tokens: int, byte: int) -> float:
    """What a forward without gradients holds at once, in a layer."""
    return tokens * (4 * model.width + 2 * model.inner + 2 * model.queries) * byte


def _scored(teacher: ModelSize, work: Work, byte: int) -> float:
    """A scoring forward, and its keys and values; or windows after it."""
    tokens = work.scored * work.longest
    forward = _read(teacher, tokens, byte)
    forward += 3 * min(work.chunk, tokens) * teacher.vocab * 4
    if not work.window:
        return forward
    cache = tokens * teacher.cached * byte
    return cache + max(forward, work.windows * 3 * teacher.vocab * 4)


def _learned(student: ModelSize, teacher: ModelSize, work: Work, byte: int) -> float:
    """Activations of a micro-batch, and the loss: a chunk's logits, and the head's gradient."""
    tokens = work.micro * (work.longest + work.window)
    layer = tokens * activations(student, byte)
    kept = tokens * student.width * 4 * student.layers
    logits = min(work.chunk, tokens) * (student.vocab + teacher.vocab) * (byte + 2)
    head = student.vocab * student.width * 4
    alive = kept + layer if work.recomputed else layer * student.layers
    return alive + max(logits + head, layer)


def activations(model: ModelSize, byte: int) -> int:
    """Bytes that a decoder layer keeps of a token for its backward pass.

    Of the residual stream two float32 copies and two normed ones; what the products read, which
    autocast copies for each of five; queries, keys, values and attention's output; norms of queries
    and keys keep what they read and what they made.
    """
    inputs = 5 if byte == 2 else 2
    attention = 2 * byte + (4 + byte if model.normed else 0)
    return (
        (16 + inputs * byte) * model.width
        + attention * (model.queries + model.keys)
        + 4 * byte * model.inner  # gate, up, the activation and its product
    )


def warning(peak: float, capacity: float) -> str | None:
    """What to say where the highest peak does not fit; None where it does."""
    if peak <= capacity:
        return None
    return (
        f"about {peak / GIB:.0f} GiB are needed at the highest, the GPU has {capacity / GIB:.0f}. "
        f"Lower per_device_train_batch_size or score_batch_size, set {CHECKPOINTING}: true, use "
        "lora, or serve the teacher (docs/hardware.md)."
    )


def memory_warning(
    student: PreTrainedModel,
    teacher: PreTrainedModel | TeacherSet,
    args: TOPDConfig,
    prompts: Sequence[Prompt],
    average: int = 0,
) -> str | None:
    """A warning where an update is predicted not to fit on this process's GPU; else None.

    None too where a configuration does not name the sizes, as of models without attention.
    ``average``: bytes of a self-teacher's besides its weights.
    """
    if args.device.type != "cuda" or not prompts:
        return None
    capacity = torch.cuda.get_device_properties(args.device).total_memory
    try:
        own, other = size_of(student, trained=True), size_of_all(teacher)
    except (AttributeError, TypeError):
        return None
    sizes = own, replace(other, bytes=0 if teacher is student else other.bytes + average)
    return warning(highest(peaks(*sizes, work_of(args, prompts)), args), capacity)


def highest(found: Mapping[str, float], args: TOPDConfig) -> float:
    """Bytes at the highest of the phases that there are; stage 1 writes no rollouts."""
    none = {"rollouts"} if args.learns_from_answers else set()
    if args.learns_from_answers and not args.asks_teacher:
        none.add("scoring and windows")
    return max(most for phase, most in found.items() if phase not in none)
