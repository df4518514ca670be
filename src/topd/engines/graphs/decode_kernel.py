"""Attention of one new token a row over that row's own keys, as one Triton kernel.

A program has a row and a head of keys. It writes the new key and value into the cache, and reads
what is before them up to the row's own length, or of a sliding window: nothing is masked that was
read, and no key is repeated for the queries that share it. The softmax runs along (Milakov and
Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867) with sums in float32.
Rows that continue prefixes read those where they lie, then their own entries.

Importing this needs Triton.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd.engines.graphs.attention import Prefixes
from topd.losses.kernels import runs_on

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST = 16  # entries that a product of the kernel has along each axis


def serves(keys: Tensor) -> bool:
    """Whether the kernel does this device and precision."""
    return keys.dtype in DTYPES and runs_on(keys.device)


def attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    scale: float,
    window: int | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """Attention [R 1 H D] of ``query`` [R H 1 D] over a row's entries up to the new one.

    Args:
        query: of the new tokens.
        new: their key and value, [R G 1 D] each; written into the cache.
        cache: keys and values, [R G L D] each, of which the last two axes are contiguous.
        place: [R], where the new token stands; entries before it are its row's.
        scale: of the scores.
        window: how many entries are seen, the new one among them; None: all.
        prefixes: what each row has before its entries in ``cache``; None: nothing.
    """
    rows, heads, _, width = query.shape
    groups, (key, value), (keys, values) = cache[0].shape[1], new, cache
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(rows, 1, heads, width, dtype=query.dtype, device=query.device)
    padded = max(LEAST, triton.next_power_of_2(width))
    before = prefixes or Prefixes(keys, values, place, place)  # of which nothing is read
    strides = [x.stride()[:2] for x in (query, key, value, keys)] + [(out.stride(0), out.stride(2))]
    strides.append(before.keys.stride()[:2])
    _attend[(rows, groups)](
        *(query, key, value, keys, values, place, out, *before),
        *(step for both in strides for step in both),
        scale,
        window or 0,
        width=width,
        padded=padded,
        queries=heads // groups,
        filled=max(LEAST, triton.next_power_of_2(heads // groups)),
        block=64 if padded * keys.element_size() <= 256 else 32,
        windowed=window is not None,
        continuing=prefixes is not None,
        num_warps=4,
        num_stages=2,
    )
    return out


@triton.jit
def _attend(
    query, key, value, keys, values, place, out, prefix_keys, prefix_values, first, known,
    query_row, query_head, key_row, key_head, value_row, value_head,
    cache_row, cache_head, out_row, out_head, prefix_entry, prefix_head, scale, window,
    width: tl.constexpr, padded: tl.constexpr, queries: tl.constexpr, filled: tl.constexpr,
    block: tl.constexpr, windowed: tl.constexpr, continuing: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    at = tl.load(place + row).to(tl.int32)
    before = at * 0
    if continuing:
        before = tl.load(known + row).to(tl.int32)
    own = at - before
    d = tl.arange(0, padded)
    g = tl.arange(0, filled)
    there = d < width
    both = (g < queries)[:, None] & there[None, :]
    here = (head * queries + g)[:, None]

    kind = keys.dtype.element_ty
    q = tl.load(query + row * query_row + here * query_head + d[None, :], mask=both, other=0.0)
    q = q.to(kind)
    k = tl.load(key + row * key_row + head * key_head + d, mask=there, other=0.0).to(kind)
    v = tl.load(value + row * value_row + head * value_head + d, mask=there, other=0.0).to(kind)
    base = row * cache_row + head * cache_head
    tl.store(keys + base + own * width + d, k, mask=there)
    tl.store(values + base + own * width + d, v, mask=there)

    most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    mass = tl.full([filled], 1.0, tl.float32)
    sums = tl.zeros([filled, padded], tl.float32) + v.to(tl.float32)[None, :]
    seen = at * 0
    if windowed:
        seen = tl.maximum(at - window + 1, 0)
    if continuing:
        begin = tl.load(first + row).to(tl.int64) * prefix_entry + head * prefix_head
        most, mass, sums = _over(
            most, mass, sums, q, prefix_keys + begin, prefix_values + begin, prefix_entry,
            seen, before, d, there, scale, block,
        )  # fmt: skip
    most, mass, sums = _over(
        most, mass, sums, q, keys + base, values + base, width,
        tl.maximum(seen - before, 0), own, d, there, scale, block,
    )  # fmt: skip
    found = sums / mass[:, None]
    at_out = out + row * out_row + here * out_head + d[None, :]
    tl.store(at_out, found.to(out.dtype.element_ty), mask=both)


@triton.jit
def _over(
    most, mass, sums, q, keys, values, step, first, end, d, there, scale, block: tl.constexpr
):  # fmt: skip
    """The softmax's largest score, mass and sums after entries first to end, ``step`` apart."""
    for start in range(first, end, block):
        n = start + tl.arange(0, block)
        known = n < end
        turned = keys + n[None, :] * step + d[:, None]
        k_block = tl.load(turned, mask=there[:, None] & known[None, :], other=0.0)
        score = tl.dot(q, k_block, input_precision="ieee") * scale
        score = tl.where(known[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        kept = tl.exp(most - higher)
        straight = values + n[:, None] * step + d[None, :]
        v_block = tl.load(straight, mask=known[:, None] & there[None, :], other=0.0)
        mass = mass * kept + tl.sum(share, 1)
        sums = sums * kept[:, None]
        sums += tl.dot(share.to(v_block.dtype), v_block, input_precision="ieee")
        most = higher
    return most, mass, sums
