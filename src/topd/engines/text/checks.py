"""Start-up checks of a teacher by text: servers that continue a text, a tokenizer that joins it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from topd.engines.base import Wanted
from topd.engines.servers import RefusedError
from topd.engines.servers.vllm import ROUNDED
from topd.engines.text import SPARE, Written
from topd.engines.text.logprobs import TOLD, logprobs_of_tokens
from topd.engines.text.writers import Place, TextServers
from topd.errors import TOPDError
from topd.inputs.border import Border, tells_places
from topd.inputs.models import ModelSpec
from topd.inputs.models.vocabulary import PROBE, known_ids
from topd.inputs.served import ByText
from topd.inputs.text_models import reach_of
from topd.types import Ids, Prompt, Sampling

ASKED = 24  # tokens
GREEDY = Sampling(temperature=0.0, max_new_tokens=ASKED)
SEED = 2**32 - 2  # next to the largest of a run, which is random to llama.cpp
HALF, PLACES = 0.5, 8  # of the tokens of greedy answers, where there are so many
MASS = 1.01  # of the likeliest tokens in one place, with rounding
PIECE = f"{PROBE}\n"  # of a long text
FEW = 4  # pieces, which any server reads
PROMPTS = 4  # asked until one has an answer to be continued
OVER = (
    "Give a server of the completions API, or chat: true where its chat API continues the "
    "assistant's last message (continue_final_message of vLLM)."
)
LIMIT = "max_completion_tokens"
NO_SEED = "If it takes no seed, or none so large, set text.extra: {seed: null}."


def check_text_teacher(
    spec: ByText,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    prompts: Sequence[Prompt],
    *,
    whole: Sampling | None = None,
    most: int = 0,
) -> None:
    """Try a teacher by text as far as it goes without weights.

    The student's tokenizer must join a text at every border as it reads. Every server is asked to
    answer a prompt, then to continue from the middle of its own answer. Where only ``whole``
    answers are wanted of it, it is asked for the beginning of one, sampled so. A prompt that a
    server refuses is passed over, if it answers another. A server that counts what it reads is sent
    a text of ``most`` tokens, as long as the run's with what is to be written after it.

    Raises:
        TOPDError: a tokenizer that does not read back, a server that starts over, rewrites white
            space, cuts long texts or does not know the model, or an API key that is not there.
        StoppedError: a server does not answer.
    """
    check_border("student", tokenizers[0])
    if spec.as_text:
        check_border("teacher", tokenizers[1])
    if spec.text is None:
        return
    for url in spec.text.url:
        one = spec.text.model_copy(update={"url": (url,)})
        writer = TextServers("teacher", one, tokenizers[1])
        how = replace(whole, max_new_tokens=ASKED) if whole else GREEDY
        _check_answers(writer, prompts[:PROMPTS], how, bool(whole))
        _check_context(writer, most, how)
        if spec.text.logprobs:
            _check_tells(writer, prompts[:PROMPTS], Border(tokenizers[0]))


def check_room(spec: ModelSpec, prompts: Sequence[Prompt], more: int) -> None:
    """Whether a teacher in this process has room for ``more`` tokens after the longest prompt.

    What the student writes between them is counted in the teacher's tokens once it is there.
    Raises TOPDError.
    """
    reach, longest = reach_of(spec.load_config()), max((len(p.teacher) for p in prompts), default=0)
    if reach is not None and longest + more + SPARE > reach:
        raise TOPDError(
            f"teacher.as_text: the longest prompt has {longest} of the teacher's tokens, and it is "
            f"to write {more + SPARE} more; it has {reach} positions. Lower max_prompt_length, "
            "max_completion_length or window_length."
        )


def check_border(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Join a text at every border between its tokens. Raises TOPDError if it reads otherwise."""
    if not tells_places(tokenizer):
        raise TOPDError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) does not tell which characters a "
            "token is made of (offset_mapping): a teacher by text needs one that does. Choose a "
            "model with a fast tokenizer (tokenizer.json)."
        )
    border = Border(tokenizer)
    known = known_ids(tokenizer, PROBE)
    # a tokenizer of few words, which makes one token of all others, or none
    few = not known or set(known) & set(tokenizer.all_special_ids)
    ids = border.ids((), " " + (_known_part(tokenizer) if few else PROBE)) or ()
    whole = border.text(ids) or ""
    befores = [(ids[:end], border.text(ids[:end])) for end in range(len(ids))]
    if not whole or any(
        text is not None and border.ids(before, whole[len(text) :]) is None
        for before, text in befores
    ):
        raise TOPDError(
            f"{name}: its tokenizer does not read back what it is given (lower case, or other "
            "white space): a teacher by text needs one that does. Choose another model."
        )


def _known_part(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer of few words makes of the probe: itself, where it knows no such words."""
    vocabulary = tokenizer.get_vocab()
    specials = set(tokenizer.all_special_tokens)
    return " ".join([w for w in sorted(vocabulary) if w.isalnum() and w not in specials][:8])


def _check_answers(
    writer: TextServers, prompts: Sequence[Prompt], asked: Sampling, whole: bool
) -> None:
    """Have a server begin a ``whole`` answer, or continue its own greedy one, at two places."""
    url, answer = writer.spec.url[0], ""
    faults: list[str] = []
    refused: RefusedError | None = None
    for prompt in prompts:
        try:
            answer, ended = _asked(writer, prompt.teacher, "", asked)
            if whole and (answer or not ended):  # it may think first
                return
            faults = []
            for cut in _cuts(answer):
                fault = _fault(answer, cut, _asked(writer, prompt.teacher, answer[:cut]).text)
                if not fault:
                    return
                faults.append(fault)
        except RefusedError as error:
            refused = error
            continue
        if faults:
            break
    if refused and not faults:
        named = LIMIT in str(refused) and writer.spec.limit != LIMIT
        seeds = "seed" in str(refused).lower() and "seed" not in writer.spec.extra
        seed = NO_SEED if seeds else ""
        hint = OVER if answer else f"Set text.limit: {LIMIT}." if named else seed
        raise TOPDError(f"{refused} {hint}".rstrip()) from refused
    if not faults:
        raise TOPDError(
            f"teacher.text: {url} writes next to nothing, or one word, to the first prompts "
            f"({answer!r}). Is teacher.tokenizer the one whose chat template the model was trained "
            "with?"
        )
    raise TOPDError(f"teacher.text: {url} {faults[0]}")


def _check_tells(writer: TextServers, prompts: Sequence[Prompt], border: Border) -> None:
    """Have a server tell the log-probs of its own answers' tokens, as the student splits them."""
    answers: dict[Ids, str] = {}
    for prompt in prompts:
        with suppress(RefusedError):
            answers[prompt.teacher] = _asked(writer, prompt.teacher, "").text
    rows = [border.ids((), answer) or () for answer in answers.values()]
    places = writer.read_places(list(answers), list(answers.values()))
    read = [[(piece, logprob) for piece, logprob, _ in one] for one in places]
    pairs = zip(rows, read, strict=True)
    told = [x for ids, pieces in pairs for x in logprobs_of_tokens(border, ids, pieces)]
    known = sum(not math.isnan(x) for x in told)
    if known < TOLD * len(told):
        raise TOPDError(
            f"teacher.text.logprobs: {writer.spec.url[0]} splits text otherwise than the student's "
            f"tokenizer: of {len(told)} tokens of the student's it tells {known}. Log-probs of "
            "single tokens want tokenizers that are alike: leave text.logprobs out, and set "
            "token_loss: none."
        )
    _check_likeliest(writer, places, list(answers.values()))


def _check_likeliest(
    writer: TextServers, read: Sequence[Sequence[Place]], answers: Sequence[str]
) -> None:
    """Hold what a server tells of its greedy answers against the likeliest tokens that it tells.

    A greedy token is the likeliest in its place, unless the log-probs are those of another place;
    and natural log-probs are those of probabilities that sum to 1 at most.
    """
    own: list[tuple[float, list[float]]] = []
    for places, answer in zip(read, answers, strict=True):
        left = len(answer)
        for piece, logprob, likeliest in reversed(places):
            left -= len(piece)
            if left >= 0 and logprob is not None and likeliest:
                own.append((logprob, likeliest))
    mass = max((sum(map(math.exp, likeliest)) for _, likeliest in own), default=0.0)
    first = sum(logprob >= max(likeliest) - ROUNDED for logprob, likeliest in own)
    why = ""
    if mass > MASS:
        why = f"whose probabilities sum to {mass:.3g} in one place: they are no natural logarithms"
    elif len(own) >= PLACES and first < HALF * len(own):
        why = (
            f"by which {first} of {len(own)} tokens that it wrote at temperature 0 are the "
            "likeliest: they are those of another place, or it does not write greedily"
        )
    if why:
        raise TOPDError(
            f"teacher.text.logprobs: {writer.spec.url[0]} tells log-probs {why}. Leave "
            "text.logprobs out, and set token_loss: none."
        )


def _check_context(writer: TextServers, most: int, how: Sampling) -> None:
    """Have a server read a short text, half of ``most`` tokens, and all: some, as Ollama, cut what
    is longer than their context, and answer all the same.
    """
    piece = writer.tokenizer(PIECE, add_special_tokens=False)["input_ids"]
    times = most // len(piece) if piece else 0  # a tokenizer of few words reads nothing
    if times < FEW:
        return
    wanted = Wanted(how, [SEED])  # of as many tokens as before: one token is an error to some
    # each begins otherwise, at every start: what a server has kept it may not count
    texts = [f"{uuid4().int % 10**4:04} {PIECE * n}" for n in (1, times // 2, times)]
    short, half, long = (writer.tokens_read(text, wanted) for text in texts)
    if not (short and half and long):  # it does not tell
        return
    due = short + (half - short) * (times - 1) / (times // 2 - 1)
    if long < TOLD * due:
        raise TOPDError(
            f"teacher.text: {writer.spec.url[0]} has read {long} tokens of a text of some "
            f"{due:.0f}: it cuts what is longer, and answers all the same. Here texts have up to "
            f"some {most}. Give it a longer context (Ollama: OLLAMA_CONTEXT_LENGTH), or lower "
            "max_prompt_length or max_completion_length."
        )


def _asked(writer: TextServers, prompt: Ids, text: str, how: Sampling = GREEDY) -> Written:
    return writer.write([prompt], [text], Wanted(how, [SEED]))[0]


def _cuts(answer: str) -> list[int]:
    """Two places in an answer where a word begins, and the text after does not begin as all of it.

    Else a server that starts its answer over might seem to continue.
    """
    spaces = [i for i in range(1, len(answer) - 1) if answer[i] == " " and answer[i - 1] != " "]
    places = spaces or ([len(answer) // 2] if len(answer) >= 4 else [])
    first = answer.split()
    due = {i: _begin(answer[i:]).split() for i in places}
    telling = [i for i in places if due[i] != first[: len(due[i])]]
    return sorted(telling, key=lambda i: abs(i - len(answer) // 2))[:2]


def _begin(text: str, words: int = 3) -> str:
    """The first words of a text, with the white space before them."""
    found = re.match(rf"(\s*\S+){{1,{words}}}", text)
    return found.group() if found else text


def _fault(answer: str, cut: int, found: str) -> str:
    """What is wrong with a continuation of ``answer[:cut]``; empty if nothing is."""
    due = _begin(answer[cut:])
    if found.startswith(due):
        return ""
    shown = f"asked to continue {answer[:cut]!r}, it wrote {found[:60]!r}"
    if "".join(found.split()).startswith("".join(due.split())):
        return (
            f"rewrites white space: {shown}, where {due!r} was due. Text would not be joined as "
            "it was written: choose another server, or one that returns text as it is."
        )
    over = _begin(found).split() == _begin(answer).split()
    how = "starts its answer over" if over else "does not continue a text"
    return f"{how}: {shown}; its own answer went on with {due!r}. {OVER}"
