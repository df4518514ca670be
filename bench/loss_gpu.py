"""The chunked loss on a GPU: ``python -m bench.loss_gpu``, a line of JSON for each part.

Forward and backward of the reverse KL with weights per token and a trained head, bfloat16, by our
kernels, our eager path, torch.compile of its block, and Liger's LigerFusedLinearJSDLoss at beta 1
(which has no weights per token); beside the matrix products that none can do without: both
models' logits, the gradients of states and head. Medians of CUDA events; memory is the peak over
the inputs and the gradients. Values and gradients against float64, on fewer tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear

from bench.measure import Table
from topd.losses import TokenTerms, Upstream, chunked, linear_token_terms
from topd.losses.terms import Task
from topd.types import Head

try:
    from topd.losses import kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]

CHUNKS = (1024, 2048, 4096)
TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16))

NAMES = {
    "kernels": "ours, kernels",
    "eager": "ours, eager",
    "compiled": "ours, block compiled",
    "liger": "Liger",
    "TRL": "TRL",
}
COLUMNS = ("by", "chunk", "divergence", "ms", "over the bare products", "GB over gradients")
LEFT = {"reason", "fault"}
NOTE = "Ours has a weight for each token; the means of Liger and TRL have none."

Found = dict[str, Any]


class Case:
    """Both models' states and heads on one device; logits of size 2 or so, close to each other."""

    def __init__(
        self,
        tokens: int,
        vocab: int,
        width: int,
        other: int,
        device: torch.device,
        targets: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device)
            return values.mul_(scale).bfloat16()

        self.hidden = normal(tokens, width).requires_grad_()
        self.weight = normal(vocab, width, scale=2 * width**-0.5).requires_grad_()
        self.teacher_hidden = normal(tokens, other)
        self.teacher_weight = normal(vocab, other, scale=2 * other**-0.5)
        self.tokens = torch.randint(vocab, (tokens,), generator=generator, device=device)
        shape = (tokens, targets)
        self.targets = torch.randint(vocab, shape, generator=generator, device=device)
        factors = torch.rand(tokens, 1 + targets, generator=generator, device=device) / tokens
        self.expected = Upstream(factors[:, 0], None, -factors[:, 1:] if targets else None)

    def loss(
        self, chunk: int, kind: str = "reverse_kl", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Ours; in another dtype if asked."""
        hidden, weight, other, theirs = (
            x if dtype is None else x.to(dtype)
            for x in (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        )
        terms = linear_token_terms(
            hidden,
            Head(weight),
            other,
            Head(theirs),
            self.tokens,
            self.targets,
            kind=kind,  # type: ignore[arg-type]
            chunk_tokens=chunk,
            expected=self.expected,
            promised=True,
        )
        loss = (terms.divergence * self.expected.divergence).sum()
        if self.expected.target_logprobs is not None:
            loss = loss + (terms.target_logprobs * self.expected.target_logprobs).sum()
        return loss

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Value and gradients, which are then dropped."""
        loss().backward()
        self.hidden.grad = self.weight.grad = None

    def gradients(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """The value, and the gradients by states and head."""
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, (self.hidden, self.weight))]

    @torch.no_grad()
    def products(self, chunk: int) -> None:
        """What no way can do without, ``chunk`` tokens at a time."""
        for h, g in zip(self.hidden.split(chunk), self.teacher_hidden.split(chunk), strict=True):
            logits = linear(h, self.weight)
            linear(g, self.teacher_weight)
            torch.mm(logits, self.weight)
            torch.mm(logits.T, h)


class Timer:
    """Milliseconds by CUDA events; wall clock where there is no GPU."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs

    def __call__(self, case: Callable[[], object], warm: int = 2) -> float:
        """The median of the runs, after ``warm`` others."""
        for _ in range(warm):
            case()
        return statistics.median(self._once(case) for _ in range(self.runs))

    def _once(self, case: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            case()
            return 1000 * (time.perf_counter() - started)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        case()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def peak_over(case: Case, step: Callable[[], object]) -> float | None:
    """GB over the inputs and the gradients at the highest; None where there is no GPU."""
    device = case.hidden.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.element_size() for x in (case.hidden, case.weight))
    return round((torch.cuda.max_memory_allocated() - before - gradients) / 1e9, 3)


def ours(case: Case, timer: Timer, way: str, chunk: int, kind: str = "reverse_kl") -> Found:
    """Our loss by the kernels, or by the eager path."""
    with using(way):
        step = partial(case.step, partial(case.loss, chunk, kind))
        found = {"ms": timer(step), "peak_gb_over_gradients": peak_over(case, step)}
    return {"chunk_tokens": chunk, "kind": kind, **found}


@contextmanager
def using(way: str) -> Iterator[None]:
    """Have the loss take the kernels or the eager path."""
    if way == "kernels" and kernels is None:
        raise ImportError("the kernels need Triton")
    chunked.kernels = kernels if way == "kernels" else None
    try:
        yield
    finally:
        chunked.kernels = kernels


def products(case: Case, timer: Timer) -> Found:
    """The bare products at several chunks: the base of all ratios is the fastest."""
    chunks = [chunk for chunk in (*CHUNKS, len(case.hidden)) if chunk <= len(case.hidden)]
    return {"ms_by_chunk": {c: timer(partial(case.products, c)) for c in sorted({*chunks})}}


def compiled(case: Case, timer: Timer, chunk: int) -> Found:
    """The eager path with torch.compile on what stands between the products."""
    block = chunked._block
    made = torch.compile(block, dynamic=False)

    def own(
        logits: Tensor, teacher: Tensor, here: slice, task: Any, upstream: Any, values: Any
    ) -> Tensor | None:
        """The block on a task of its own rows: it would be compiled for each position else."""
        task = replace(task, tokens=task.tokens[here], target_tokens=task.target_tokens[here])
        upstream = Upstream(*(None if x is None else x[here] for x in upstream[:3]))
        values = TokenTerms(*(x[here] for x in values))
        return made(logits, teacher, slice(None), task, upstream, values)

    chunked._block = own
    try:
        return ours(case, timer, "eager", chunk)
    finally:
        chunked._block = block


def liger(case: Case, timer: Timer, compile_it: bool) -> Found:
    """Liger's chunked distillation loss at beta 1, KL(p_S || p_T), a mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compile_it
    )
    given = case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.tokens
    step = partial(case.step, lambda: loss(*given, None, None))
    return {
        "compiled": compile_it,
        "ms": timer(step),
        "peak_gb_over_gradients": peak_over(case, step),
    }


def errors(small: Case, way: str, kind: str) -> Found:
    """Largest differences from float64, relative to the largest value there: value, gradients."""
    with using(way):
        found = small.gradients(partial(small.loss, 64, kind))
    with using("eager"):
        exact = small.gradients(partial(small.loss, 64, kind, torch.float64))
    names = ("value", "hidden", "weight")
    gaps = {
        name: float((x.double() - y.double()).abs().max() / y.double().abs().max())
        for name, x, y in zip(names, found, exact, strict=True)
    }
    return {"kind": kind, "way": way, **gaps}


def tiles(case: Case, timer: Timer) -> Found:
    """Milliseconds of both passes over 1,024 tokens' logits, for several tiles."""
    rows = min(1024, len(case.hidden))
    with torch.no_grad():
        logits = linear(case.hidden[:rows], case.weight)
        teacher = linear(case.teacher_hidden[:rows], case.teacher_weight)
    task = Task(
        Head(case.weight), Head(case.teacher_weight), case.teacher_hidden, case.tokens,
        case.targets, "reverse_kl", 0.5, 1.0, rows,
    )  # fmt: skip
    shape = kernels._shape(task, logits)
    found = logits.new_empty(7, rows, dtype=torch.float32)
    places = case.tokens[:rows, None]
    upstream = case.expected.at(slice(0, rows), found[0])
    factors = kernels._factors(upstream._replace(target_logprobs=None), places)
    at = logits.gather(1, places)
    before = kernels.READ_BLOCK, kernels.READ_WARPS, kernels.WRITE_BLOCK, kernels.WRITE_WARPS
    results: Found = {"rows": rows, "read_bytes": 2 * logits.nbytes, "read": {}, "write": {}}
    for block, warps in TILES:
        kernels.READ_BLOCK = kernels.WRITE_BLOCK = block
        kernels.READ_WARPS = kernels.WRITE_WARPS = warps
        name = f"{block}x{warps}"
        read = partial(kernels._read, logits, teacher, found, task, shape)
        results["read"][name] = timer(read)
        write = partial(kernels._write, logits, teacher, at, places, factors, found, shape)
        results["write"][name] = timer(write)
    kernels.READ_BLOCK, kernels.READ_WARPS, kernels.WRITE_BLOCK, kernels.WRITE_WARPS = before
    return results


def head_product(case: Case, timer: Timer, chunk: int) -> Found:
    """The head's gradient: added by cuBLAS in float32, or made in bfloat16 and added."""
    vocab, device = case.weight.shape[0], case.weight.device
    slope = torch.randn(chunk, vocab, device=device, dtype=torch.bfloat16)
    states, total = case.hidden.detach()[:chunk], torch.zeros_like(case.weight, dtype=torch.float32)
    wide = chunked.adds_wide(device, torch.bfloat16)
    found: Found = {"chunk_tokens": chunk, "adds_wide": wide}
    if wide:
        added = partial(torch.addmm, total, slope.T, states, out_dtype=total.dtype, out=total)
        found["ms_added_in_float32"] = timer(added)
    found["ms_made_and_added"] = timer(lambda: total.add_(slope.T @ states))
    found["ms_product"] = timer(lambda: slope.T @ states)
    return found


def profile(case: Case, chunk: int) -> Found:
    """Milliseconds of every GPU kernel in one forward and backward."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = partial(case.step, partial(case.loss, chunk))
    step()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:16]
    return {"ms": {e.key[:90]: round(e.self_device_time_total / 1e3, 3) for e in rows}}


def parts(
    tokens: int, vocab: int, width: int, other: int, runs: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Found]]]:
    """What is measured, the most important first; what compiles for long comes last."""
    case, timer = Case(tokens, vocab, width, other, device), Timer(device, runs)
    chunks = [chunk for chunk in CHUNKS if chunk <= tokens] or [tokens]
    yield "products", partial(products, case, timer)
    yield from (("kernels", partial(ours, case, timer, "kernels", chunk)) for chunk in chunks)
    yield "eager", partial(ours, case, timer, "eager", chunks[0])
    small = Case(64, vocab, width, other, device, targets=3)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        yield "errors", partial(errors, small, "kernels", kind)
        yield "errors", partial(errors, small, "eager", kind)
    yield "head_product", partial(head_product, case, timer, chunks[-1])
    yield "tiles", partial(tiles, case, timer)
    if device.type == "cuda":
        yield "profile", partial(profile, case, chunks[min(1, len(chunks) - 1)])
    for kind in ("forward_kl", "jsd"):
        yield (
            "kernels",
            partial(ours, case, timer, "kernels", chunks[min(1, len(chunks) - 1)], kind),
        )
    yield "liger", partial(liger, case, timer, False)
    yield "compiled", partial(compiled, case, timer, chunks[0])
    yield "liger", partial(liger, case, timer, True)


def measure(
    tokens: int = 8192,
    vocab: int = 151936,
    width: int = 1024,
    other: int = 2560,
    runs: int = 7,
    seconds: float = 60.0,
    device: str = "cuda",
) -> Iterator[Found]:
    """One record a part: its figures, or the reason why there are none.

    Ratios are over the fastest way to do the bare products. Parts that would begin after
    ``seconds`` are left out, and say so.
    """
    place, began, base = torch.device(device), time.perf_counter(), None
    with ThreadPoolExecutor(1) as pool:
        for name, part in parts(tokens, vocab, width, other, runs, place):
            spent = time.perf_counter() - began
            if spent > seconds:
                yield {"part": name, "reason": f"left out: {spent:.0f} s were spent"}
                continue
            future = pool.submit(part)
            fault = future.exception()
            record: Found = {"part": name}
            record |= {"reason": repr(fault)[:600]} if fault else future.result()
            if name == "products" and not fault:
                base = min(record["ms_by_chunk"].values())
            if base and isinstance(record.get("ms"), float):
                record["over_products"] = round(record["ms"] / base, 3)
            yield {**record, "seconds": round(time.perf_counter() - began - spent, 1)}


def tables(rows: Sequence[Found]) -> Iterator[Table]:
    """The ways beside the bare products, what they are off by, and what had no figures."""
    bare = next((row["ms_by_chunk"] for row in rows if "ms_by_chunk" in row), {})
    if bare:
        yield Table("Loss, forward and backward", COLUMNS, list(_ways(rows, bare)), NOTE)
    gaps = [
        [NAMES[row["way"]], row["kind"], *(f"{row[n]:.1e}" for n in ("value", "hidden", "weight"))]
        for row in rows
        if "way" in row
    ]
    columns = ["by", "divergence", "value", "by states", "by head"]
    yield Table("Largest gaps from float64, relative", columns, gaps, "Of 64 tokens, in bfloat16.")
    left = [
        [row.get("part", "all"), row.get("reason") or row["fault"]] for row in rows if LEFT & {*row}
    ]
    if left:
        yield Table("Parts of the loss without figures", ["part", "reason"], left)


def _ways(rows: Sequence[Found], bare: Found) -> Iterator[list[str]]:
    """A line for each way, over the fastest of the bare products."""
    chunk = min(bare, key=bare.__getitem__)
    yield ["bare products", str(chunk), "", f"{bare[chunk]:.1f}", "1", ""]
    for row in rows:
        if row.get("part") in NAMES and "ms" in row:
            name = NAMES[row["part"]] + ", compiled" * row.get("compiled", False)
            kind, gb = row.get("kind", "reverse_kl"), row["peak_gb_over_gradients"]
            over, size = f"{row['ms'] / bare[chunk]:.2f}", str(row.get("chunk_tokens", ""))
            yield [name, size, kind, f"{row['ms']:.1f}", over, "" if gb is None else f"{gb:.2f}"]


def main(
    tokens: int = 8192,
    vocab: int = 151936,
    width: int = 1024,
    other: Annotated[int, typer.Option(help="Width of the teacher's states.")] = 2560,
    runs: int = 7,
    seconds: Annotated[float, typer.Option(help="Begin no part after these.")] = 60.0,
    device: str = "cuda",
) -> None:
    """Print a line of JSON for each part."""
    card = torch.cuda.get_device_name() if device == "cuda" else device
    print(
        json.dumps({"part": "machine", "card": card, "torch": torch.__version__, "argv": sys.argv})
    )
    for record in measure(tokens, vocab, width, other, runs, seconds, device):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    typer.run(main)
