"""Attention of one new token a row over fixed buffers: by a Triton kernel where that is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import logging

from topd.errors import compiler_faults, first_line

logger = logging.get_logger(__name__)


class Prefixes(NamedTuple):
    """What rows have before their own entries: of E shared ones ``known`` from ``first`` on.

    Keys and values lie entry by entry, so that nothing depends on how many there are.
    """

    keys: Float[Tensor, "E G D"]
    values: Float[Tensor, "E G D"]
    first: Int[Tensor, " R"]
    known: Int[Tensor, " R"]


def way_to_attend(
    query: Tensor, keys: Tensor, *, windowed: bool, continuing: bool
) -> Callable[..., Tensor]:
    """:func:`topd.engines.graphs.decode_kernel.attend` where it serves, else :func:`_plain`."""
    shape = (query.shape[1], keys.shape[1], keys.shape[3])
    kernel = _tried(shape, query.dtype, keys.dtype, keys.device, windowed, continuing)
    return _plain if kernel is None else kernel.attend


def _plain(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    scale: float,
    window: int | None,
    prefixes: Prefixes | None = None,
) -> Tensor:
    """The same as :func:`topd.engines.graphs.decode_kernel.attend` in torch's own operations."""
    row, own = torch.arange(len(query), device=query.device), place
    if prefixes is not None:
        own = place - prefixes.known
    for cells, one in zip(cache, new, strict=True):
        cells[row, :, own] = one[:, :, 0].to(cells.dtype)
    key, value = cache
    entry, at = torch.arange(key.shape[2], device=key.device), own[:, None]
    seen, query = entry <= at, query.to(key.dtype)
    if window is not None:
        seen &= entry > at - window
    if prefixes is None:
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen[:, None, None], scale=scale, enable_gqa=True
        )
        return found.transpose(1, 2)
    keys, values, first, known = prefixes
    entry = torch.arange(len(keys), device=keys.device) - first[:, None]
    before = (entry >= 0) & (entry < known[:, None])
    if window is not None:
        before &= entry > place[:, None] - window
    q = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [R G h D]
    parts = torch.einsum("rghd,egd->rghe", q, keys), torch.einsum("rghd,rgld->rghl", q, key)
    scores = torch.cat(parts, -1).to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~torch.cat([before, seen], -1)[:, None, None], -torch.inf)
    there, here = scores.softmax(-1).to(q.dtype).split([len(keys), key.shape[2]], -1)
    found = torch.einsum("rghe,egd->rghd", there, values)
    found = found + torch.einsum("rghl,rgld->rghd", here, value)
    return found.flatten(1, 2)[:, None]


@functools.cache
def _tried(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    windowed: bool,
    continuing: bool,
) -> Any:
    """The kernel's module, if it gives what attention without it gives on a small example.

    That is in float64: in float32 it may have TF32's few digits, where those are allowed.
    """
    try:
        from topd.engines.graphs import decode_kernel
    except ImportError:  # no Triton
        return None
    heads, groups, width = shape
    if not decode_kernel.serves(torch.empty(0, dtype=kept, device=device)):
        return None
    some = torch.Generator().manual_seed(0)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=some).to(device, dtype)

    rows, length = 4, 160
    place = torch.tensor([0, 5, 130, 159], device=device)
    prefixes = None
    if continuing:  # of two texts of 130 entries
        first, known = torch.tensor([[0, 130, 130, 0], [0, 4, 120, 30]], device=device)
        keys, values = made(2, 260, groups, width).to(kept)
        prefixes = Prefixes(keys, values, first, known)
    query, fresh = made(rows, heads, 1, width), (made(rows, groups, 1, width),) * 2
    cells = made(rows, groups, length, width).to(kept)
    options: dict[str, Any] = {"scale": width**-0.5, "window": 40 if windowed else None}
    options["prefixes"] = prefixes
    try:
        found = decode_kernel.attend(query, fresh, (cells.clone(), cells.clone()), place, **options)
        if prefixes is not None:
            wide = prefixes.keys.double(), prefixes.values.double()
            options["prefixes"] = Prefixes(*wide, *prefixes[2:])
        asked, new, keys, values = (x.double() for x in (query, fresh[0], cells, cells))
        expected = _plain(asked, (new, new), (keys, values), place, **options)
        gap = float((found - expected).abs().max())
    except compiler_faults() as fault:
        logger.warning(f"no kernel for attention ({first_line(fault)}): slower.")
        return None
    if not gap <= (1e-4 if torch.float32 in (dtype, kept) and dtype == kept else 0.05):  # or NaN
        logger.warning(f"no kernel for attention: it is off by {gap:.2g}. Writing is slower.")
        return None
    return decode_kernel
