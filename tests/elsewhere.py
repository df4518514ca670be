"""A device that is none: its tensors say that they are elsewhere, and are computed on the CPU.

What a GPU would refuse is refused: a tensor that was left on the CPU, NumPy without a copy. So is
float64, which Apple's devices lack. ``python tests/elsewhere.py FOLDER METHOD ...`` trains there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("privateuseone", 0)  # "elsewhere:0" once it is there
INDICES = ("index.", "index_put", "_index_put", "_unsafe_index")  # may lie on the CPU


class There(Tensor):
    """A tensor elsewhere; ``raw`` is the one that is computed with."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            *(cls, raw.shape, raw.stride(), raw.storage_offset()), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list[Any]:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> None:
        raise TypeError("a tensor that is elsewhere has no NumPy array: .cpu() first")

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()


class Mode(TorchDispatchMode):
    """Also what has no tensor to begin with, such as ``torch.zeros(3, device=DEVICE)``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def there(made: Any) -> Any:
    """A result elsewhere."""
    if not isinstance(made, Tensor) or isinstance(made, There):
        return made
    if made.dtype == torch.float64:
        raise TypeError("float64, which Apple's devices lack")
    return There(made)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, and its result where a device would have it."""
    flat, _ = tree_flatten((args, kwargs))
    mine = [x for x in flat if isinstance(x, There)]
    left = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, There) and x.dim()]
    asked, name = kwargs.get("device"), func.__name__
    goes = asked is not None and torch.device(asked).type == DEVICE.type
    args_, kwargs_ = tree_map(lambda x: x.raw if isinstance(x, There) else x, (args, kwargs))
    kwargs_ |= {"device": torch.device("cpu")} if goes else {}
    made = func(*args_, **kwargs_)
    if name.startswith(("copy_", "_copy_from")):
        return args[0]
    copies = name.startswith(("_to_copy", "_local_scalar"))
    if mine and left and not copies and not name.startswith(INDICES):
        raise RuntimeError(f"{name}: tensors on the CPU and elsewhere")
    if not (goes or (mine and asked is None)):
        return made
    before = {id(x.raw): x for x in mine}  # what is changed in place stays the same tensor
    return tree_map(lambda x: before.get(id(x)) if id(x) in before else there(x), made)


def made_there(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` and the like, which make first and then move."""

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = data if isinstance(data, Tensor) else maker(data, **options)
        return made if device is None else made.to(device)

    return make


def empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    return there(torch.empty(size, dtype=dtype))


def main(folder: str, *methods: str) -> None:
    """A training there by each method; the device stays with the process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("elsewhere")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", lambda size, stride, **k: empty(size, **k), "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.elsewhere.is_available = lambda: True
    torch.tensor, torch.as_tensor = made_there(torch.tensor), made_there(torch.as_tensor)
    import topd.types

    topd.types.wide_dtype = lambda device: torch.float32 if device == DEVICE else torch.float64
    import topd.training.recorded

    # In such a mode transformers leaves what it loads without buffers: what is saved is not read.
    topd.training.recorded.check_saved = lambda *_: 0.0
    with Mode():
        from test_elsewhere import train

        for method in methods:
            train(Path(folder) / method, method)


if __name__ == "__main__":
    main(*sys.argv[1:])
