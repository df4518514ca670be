"""What a model writes with its cache, held against forwards without one, before it is used.

A model may read rightly and decode wrongly: its cache loses rows or is passed by, its attention
counts places where texts leave gaps, its padding is seen. So a few tokens are written as in use:
rows of several lengths, of which one ends early, in two batches, and windows after a draft that
holds and then does not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from topd.engines.forward import WAYS, Way
from topd.engines.hf import HFEngine
from topd.errors import TOPDError, compiler_faults, shown
from topd.types import Generation, Ids, Sampling, Texts, autocast_dtype, wide_dtype

logger = logging.get_logger(__name__)

NEAR = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats
NEAR_ELSEWHERE = 0.05
_KNOWN: dict[str, tuple[Way, str | None]] = {}  # the way, and why not in graphs
UNAPPLIED = {  # of a generation config what changes texts and no setting stands for: its default
    **{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "min_p": 0.0},
    **{"min_length": 0, "min_new_tokens": 0, "typical_p": 1.0, "guidance_scale": 1.0},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "stop_strings": None},
    **{"exponential_decay_length_penalty": None, "num_beams": 1, "top_h": None, "eta_cutoff": 0.0},
    **{"epsilon_cutoff": 0.0, "encoder_repetition_penalty": 1.0},
}
SLOW = {
    "fresh": "reads the prefix of every window again",
    "alone": "writes one row at a time",
    "whole": "writes without a cache, reading every text again for each token",
}


def check_decoding(engine: HFEngine) -> None:
    """Have an engine write in the fastest way that is exact for its model.

    Some forty forwards of a few tokens, once in a process for models of one configuration: in
    graphs as they will be used, else with weights as they are. Weights that are NaN are for others
    to report, and a model of fewer than eight positions is not tried.

    Raises:
        TOPDError: no way is exact; with what differs.
    """
    _say_unapplied(engine)
    kind = _kind(engine)
    if kind in _KNOWN:
        engine.way, broken = _KNOWN[kind]
        if engine.graphs is not None:
            engine.graphs.broken = broken
        return
    graphs = engine.graphs
    if graphs is not None:
        fault = _fault(engine, as_used=True)
        if fault is not None and not graphs.broken:
            graphs.give_up(engine.name, fault)
        graphs.release()  # buffers that grow take more than they need: the trial keeps none
    engine.graphs = None
    try:
        faults = _first_exact(engine)
    finally:
        engine.graphs = graphs
    _KNOWN[kind] = engine.way, None if graphs is None else graphs.broken
    if faults or engine.way == "whole":
        why = "its decoder takes no cache that is known here"
        if faults:
            why = f"in a faster way it differs from its own forwards ({faults[-1]})"
        slower = f"{type(engine.model).__name__} {SLOW[engine.way]}, which is slower"
        logger.warning(f"{engine.name}: {slower}: {why}.")


def _say_unapplied(engine: HFEngine) -> None:
    """Say once what transformers' own generate would do to this model's texts, and nobody here."""
    config = getattr(engine.model, "generation_config", None)
    values = {name: getattr(config, name, None) for name in UNAPPLIED}
    given = {k: v for k, v in values.items() if v not in (None, [], UNAPPLIED[k])}
    if given:
        logger.warning_once(
            f"{engine.name}: its generation config has "
            f"{', '.join(f'{k}: {shown(v)}' for k, v in given.items())}, not applied here: texts "
            "are drawn by temperature, top_p and top_k alone, so that their log-probs are the "
            "model's own. Served with it, it writes other texts."
        )


def _first_exact(engine: HFEngine) -> list[str]:
    """Have an engine write in the first way that is exact. Returns what was wrong with others."""
    first = engine.way
    faults: list[str] = []
    for way in WAYS[WAYS.index(first) :]:
        engine.way = way
        fault = _fault(engine)
        if fault is None:
            return faults
        faults.append(f"{way}: {fault}")
    engine.way = first
    raise TOPDError(
        f"{engine.name}: {type(engine.model).__name__} does not write what its own forwards "
        f"say ({'; '.join(faults)}). It is not supported: use a model of another architecture "
        "(docs/models.md)."
    )


def _kind(engine: HFEngine) -> str:
    """What decides how a model decodes, whatever its weights are."""
    model = engine.model
    parts = (type(model), model.dtype, model.device, model.config._attn_implementation)
    config = {k: v for k, v in model.config.to_dict().items() if k != "use_cache"}  # always said
    ways = f"{engine.way} {engine.graphs and _dtype(engine)}"
    return f"{parts} {ways} {json.dumps(config, default=str, sort_keys=True)}"


def _fault(engine: HFEngine, *, as_used: bool = False) -> str | None:
    """What is wrong with how an engine writes; None if nothing is."""
    try:
        gap, allowed = decoding_gap(engine, as_used=as_used)
    except compiler_faults() as error:  # of models' code too, where a cache does not suit it
        if should_reduce_batch_size(error):
            raise
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None if gap <= allowed else f"log-probs differ by {gap:.2g} nats"


@torch.no_grad()
def decoding_gap(engine: HFEngine, *, as_used: bool = False) -> tuple[float, float]:
    """How far what an engine writes and scores is from forwards of single rows without a cache.

    All are without autocast, as rounding hides least then, unless ``as_used``: graphs and their
    kernels are compiled for a precision, and another would say nothing of them.

    Returns:
        The largest difference of log-probs over what was written together, beside a row that
        ended, in windows, or scored, in nats; and what rounding explains. In half precision the
        largest of the rows' medians, which an expert chosen otherwise for one token does not move.
    """
    prompts, steps = _prompts(engine), 8
    if not prompts:
        return 0.0, 0.0
    steps = min(steps, len(prompts[2]))
    plain = copy.copy(engine)
    if not as_used:
        plain.autocast = nullcontext
    if not all(_alone(plain, p, p[-1:]).isfinite().all() for p in prompts):
        return 0.0, 0.0
    plain = _ending(plain, ())
    greedy, dtype = Sampling(0.0, max_new_tokens=steps), _dtype(plain)
    written = plain.generate(prompts, greedy, [0] * 3)
    early = _ending(plain, written[0].tokens[1:2])
    order = [prompts[2], prompts[0], prompts[1]]
    beside = early.generate(order, greedy, [0] * 3)
    middle = steps // 2
    drafts = [
        w.tokens[:middle] + p[:1] + w.tokens[middle + 1 :]
        for p, w in zip(prompts, written, strict=True)
    ]
    scores = plain.score(prompts, drafts)
    starts = [(0, 0), (2, 1), (0, 1), (1, 0)]
    windows = plain.continue_from(scores, starts, greedy, [0] * len(starts))
    cut = [prompts[b] + drafts[b][:t] for b, t in starts]
    rows = [*_apart(plain, prompts, written), *_apart(plain, order, beside)]
    rows += _apart(plain, cut, windows)
    told = zip(drafts, scores.logprobs.tolist(), strict=True)
    scored = [Generation(draft, tuple(logprobs), finished=True) for draft, logprobs in told]
    rows += _apart(plain, prompts, scored)
    gaps = [float(row.max() if dtype in NEAR else row.median()) for row in rows if len(row)]
    near = NEAR.get(dtype, NEAR_ELSEWHERE)
    rounding = _noise(plain, prompts) * (8 if dtype in NEAR else 1)  # a median against a maximum
    return max(gaps), min(max(near, rounding), 10 * near)  # more is not rounding


def _dtype(engine: HFEngine) -> torch.dtype:
    """What an engine computes in."""
    with engine.autocast():
        return autocast_dtype(engine.device) or engine.model.dtype


def _prompts(engine: HFEngine) -> list[Ids]:
    """Three texts of different lengths, random but fixed; none where positions do not suffice.

    One of one token comes after another: a model that keeps a state of its own must forget it.
    """
    config = engine.model.config.get_text_config()
    limits = (getattr(config, "max_position_embeddings", None), engine.switch)
    least = min((limit for limit in limits if limit and limit > 0), default=64)  # XLNet says -1
    lengths = (7, 1, 12) if least >= 21 else (2, 1, 4)
    if least < 8:
        return []
    barred = () if engine.barred is None else engine.barred.nonzero()[:, 0].tolist()
    unfit = {*barred, *engine.end_ids}
    some = range(0, engine.vocab_size, max(1, engine.vocab_size // 4096))
    allowed = torch.tensor([k for k in some if k not in unfit])
    drawn = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    ids = allowed[(drawn * len(allowed)).long()].split(lengths)
    return [tuple(part.tolist()) for part in ids]


def _ending(engine: HFEngine, ends: Ids) -> HFEngine:
    """The same engine with other tokens that end a text."""
    other = copy.copy(engine)
    other.end_ids = frozenset(ends)
    return other


def _apart(engine: HFEngine, prefixes: Texts, found: Sequence[Generation]) -> list[Tensor]:
    """|difference| of the log-probs of each row's tokens from those of single rows."""
    parts = []
    for prefix, one in zip(prefixes, found, strict=True):
        known = _alone(engine, prefix, one.tokens)
        parts.append((torch.tensor(one.logprobs[: len(known)], dtype=known.dtype) - known).abs())
    return [part.nan_to_num(nan=torch.inf) for part in parts]


def _alone(engine: HFEngine, prefix: Ids, tokens: Ids) -> Tensor:
    """[K] log-probs of tokens after (or, for its own last ones, in) a prefix, without a cache."""
    text = prefix + tokens
    return _logprobs(engine, [text])[0][len(text) - len(tokens) - 1 :]


def _noise(engine: HFEngine, prompts: Texts) -> float:
    """What rounding alone does: padded rows whose embeddings are an ulp off against single ones.

    Padding alone says nothing where kernels give rows of any batch the same bits, as a CPU's do.
    """
    signs = torch.Generator().manual_seed(0)
    eps = torch.finfo(_dtype(engine)).eps

    def moved(_module: object, _inputs: object, embedded: Tensor) -> Tensor:
        sign = torch.randint(0, 2, embedded.shape, generator=signs).to(embedded) * 2 - 1
        return embedded * (1 + eps * sign)

    hook = engine.model.get_input_embeddings().register_forward_hook(moved)
    try:
        together = _logprobs(engine, prompts)
    finally:
        hook.remove()
    single = [_logprobs(engine, [prompt])[0] for prompt in prompts]
    apart = [(a[: len(b)] - b).abs() for a, b in zip(together, single, strict=True) if len(b)]
    return float(torch.cat(apart).max())


def _logprobs(engine: HFEngine, texts: Texts) -> list[Tensor]:
    """[L - 1] log-probs of all tokens of each text but its first, from one forward."""
    with engine.evaluating():
        ids = engine.padded(texts)
        logits = engine.head.logits(engine.forward(ids)[:, :-1])
    logits = logits.to(wide_dtype(logits.device)).log_softmax(-1)
    found = logits.gather(-1, ids[:, 1:, None])[:, :, 0].cpu()
    return [row[: len(text) - 1] for row, text in zip(found, texts, strict=True)]
