"""Element-wise parts of a decoder, compiled: normalisations, gates, rotations, and the draw.

Small pieces of a few functions each, shared by all layers, so that compiling takes seconds. What
does not compile runs as it is, said once. ``TORCH_COMPILE_DISABLE=1`` leaves all as it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from topd.engines.draws import draw, exponential
from topd.errors import compiler_faults, first_line
from topd.types import Sampling

logger = logging.get_logger(__name__)

PLAIN = Sampling()
LEAST = 1 << 24  # weights of a model: of a smaller one compiling takes longer than it saves
GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
ROTATION = "apply_rotary_pos_emb"
RECOMPILED = 64  # shapes of one piece


class Piece:
    """A function that is compiled at its first call, and left as it is if that fails."""

    def __init__(self, name: str, plain: Callable[..., Any]) -> None:
        self._name, self._plain = name, plain
        self._compiled: Callable[..., Any] | None = None
        try:
            self._compiled = torch.compile(plain)
        except compiler_faults() as fault:  # of a Python that torch does not compile for
            self._give_up(fault)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain function; the first axis, which is the first tensor's, may have any size."""
        if self._compiled is None:
            return self._plain(*args, **kwargs)
        tensors = [x for x in args if isinstance(x, Tensor)]
        for tensor in tensors:
            if len(tensor) == len(tensors[0]) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        config: Any = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        try:
            with config.patch({limit: RECOMPILED}):
                return self._compiled(*args, **kwargs)
        except compiler_faults() as fault:
            self._give_up(fault)
            return self._plain(*args, **kwargs)

    def _give_up(self, fault: Exception) -> None:
        self._compiled = None
        logger.warning(f"{self._name}: not compiled ({first_line(fault)}); writing is slower.")


_pieces: dict[Any, Piece] = {}  # of all models of this process


def piece(name: str, key: Any, plain: Callable[..., Any]) -> Piece:
    """The piece of a function, one for all that ask with the same key."""
    if key not in _pieces:
        _pieces[key] = Piece(name, plain)
    return _pieces[key]


class Fused:
    """The pieces of one model.

    Args:
        model: whose decoder has them.
        on: whether they are used; by default on a GPU, from ``LEAST`` weights on.
    """

    def __init__(self, model: PreTrainedModel, *, on: bool | None = None) -> None:
        decoder = model.get_decoder()
        size = sum(weight.numel() for weight in decoder.parameters())
        self.wanted = (model.device.type == "cuda" and size >= LEAST) if on is None else on
        self._modules = [*decoder.modules()] if self.wanted else []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the model's forward uses the pieces."""
        with ExitStack() as stack:
            for module in self._modules:
                forward = self._forward(module)
                if forward is not None and "forward" not in vars(module):
                    vars(module)["forward"] = forward
                    stack.callback(vars(module).pop, "forward")
            for source in {type(module).__module__ for module in self._modules}:
                rotate = getattr(sys.modules.get(source), ROTATION, None)
                if callable(rotate) and not isinstance(rotate, Piece):
                    setattr(sys.modules[source], ROTATION, piece("rotation", rotate, rotate))
                    stack.callback(setattr, sys.modules[source], ROTATION, rotate)
            yield

    def _forward(self, module: nn.Module) -> Callable[..., Any] | None:
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm"):
            return MethodType(piece(kind.__name__, kind, kind.forward), module)
        if kind.__name__.endswith("MLP") and _is_gated(kind):
            act: Any = module.act_fn
            gate = piece("gate", type(act), _gate_of(act))

            def forward(x: Tensor) -> Tensor:
                parts: Any = module
                return parts.down_proj(gate(parts.gate_proj(x), parts.up_proj(x)))

            return forward
        return None

    def drawn(
        self,
        logits: Float[Tensor, "N V"],
        keys: tuple[Int[Tensor, " N"], Int[Tensor, " N"]],
        tokens: Int[Tensor, " V"],
        sampling: Sampling,
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """A token a row and its log-prob, with the numbers of these keys and tokens."""
        if not self.wanted:
            return draw(logits, exponential(*keys, tokens), sampling)
        if sampling.top_k or sampling.top_p < 1:
            made = piece("numbers", exponential, _numbers)
            return draw(logits, made(logits, *keys, tokens), sampling)
        scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
        return piece("draw", draw, _drawn)(scaled, *keys, tokens)


def _gate_of(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def gate(x: Tensor, y: Tensor) -> Tensor:
        return act(x) * y

    return gate


@functools.cache
def _is_gated(kind: type) -> bool:
    """Whether a class computes the gated product that we write in another way.

    Its source is read once, not at every text for every layer.
    """
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    return GATED in source


def _drawn(logits: Tensor, first: Tensor, second: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return draw(logits, exponential(first, second, tokens), PLAIN)


def _numbers(logits: Tensor, first: Tensor, second: Tensor, tokens: Tensor) -> Tensor:
    return exponential(first, second, tokens)
