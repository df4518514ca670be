"""A student that FSDP2 has sharded: its weights whole, and what of accelerate's FSDP is refused.

The engines write as many tokens as a rollout happens to have. A sharded model gathers its weights
in every forward, so ranks whose rollouts differ in length would wait for each other for ever.
Therefore they write with a plain copy, whose weights are gathered once before an experience and
dropped after it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from transformers import PreTrainedModel

from topd.config import TOPDConfig
from topd.distributed import WRAPPER, whole
from topd.errors import LIBRARY_FAULTS, TOPDError
from topd.inputs.models.adapters import hollow, parts
from topd.runs.checkpoints import SHARDED


class WholeCopy:
    """A copy of a model, without weights until they are gathered.

    Args:
        model: the model, on its device, before it is sharded.
        dtype: what the engines compute in, as the sharded model does; None: its own.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        empty = {
            id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()
        }
        self.model: PreTrainedModel = copy.deepcopy(model, empty)
        self.device, self.dtype = model.device, dtype

    @contextmanager
    def gathered(self, source: nn.Module, *, exact: bool = False) -> Iterator[PreTrainedModel]:
        """The copy with the weights that ``source`` has now; a collective.

        Args:
            source: the model that was copied, sharded or not yet.
            exact: in its own dtype, to be saved.
        """
        names = dict(self.model.named_parameters())
        for name, parameter in source.named_parameters():
            own = names[name.replace(WRAPPER, "")]
            dtype = None if exact or not parameter.is_floating_point() else self.dtype
            own.data = whole(parameter).to(self.device, dtype)
        try:
            yield self.model
        finally:
            for own in names.values():
                own.data = own.data.new_empty(0)


def whole_copy(student: PreTrainedModel, accelerator: Accelerator) -> WholeCopy | None:
    """What the engines write with where FSDP2 is going to shard the student; else None.

    Raises TOPDError where accelerate would not shard, or cannot.
    """
    if fsdp_plugin() is None:
        return None
    if not accelerator.is_fsdp2:
        raise TOPDError(
            "accelerate: FSDP shards over several accelerators, and would run DDP here. Launch "
            "without it."
        )
    _check_shards(student, accelerator)
    student.to(accelerator.device)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    return WholeCopy(student, policy.param_dtype if policy else None)


def _check_shards(student: PreTrainedModel, accelerator: Accelerator) -> None:
    """Have a copy without weights sharded. Raises TOPDError if it fails, or parts shared weights.

    accelerate shards tied embeddings together only where an adapter leaves them as they are.
    """
    trial, fault = hollow(student), ""
    before = parts(trial)
    try:
        fsdp2_prepare_model(accelerator, trial)
        if torn := before.keys() - parts(trial).keys():
            fault = f"{' and '.join(sorted(min(torn, key=sorted)))} would no longer be one weight"
    except LIBRARY_FAULTS as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise TOPDError(
            f"student: FSDP2 cannot shard it: {fault.rstrip('.')}. Launch with --multi_gpu (DDP). "
            "Where an adapter is the cause (modules_to_save or trainable_token_indices on tied "
            "embeddings), leave them out, or set ensure_weight_tying."
        )


def try_optimizer(model: nn.Linear, optimizer: Optimizer, accelerator: Accelerator) -> None:
    """A step of a sharded layer; the optimiser's state is saved and loaded, as accelerate does.

    A collective, of FSDP2 alone; what raises is torch's.

    Args:
        model: with a row for every rank; it is sharded here.
        optimizer: made of ``model`` before it is sharded, as Trainer's is.
    """
    if not accelerator.is_fsdp2:
        return
    from torch.distributed.checkpoint import state_dict as stored  # half a second, for FSDP2 alone

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fully_shard(model.to(accelerator.device))
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
    model(torch.ones(1, model.in_features, device=accelerator.device)).sum().backward()
    optimizer.step()
    options = stored.StateDictOptions(
        full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True
    )
    state = stored.get_optimizer_state_dict(model, optimizer, options=options)
    stored.set_optimizer_state_dict(model, optimizer, state, options=options)


def is_sharded(files: Collection[str]) -> bool:
    """Whether files of a checkpoint are FSDP2's: it has another name for those of the optimiser."""
    return SHARDED["optimizer.pt"] in files


def check_kind(checkpoint: Path, files: Collection[str], copy: WholeCopy | None) -> None:
    """Refuse a checkpoint of FSDP2 where it is not launched, and another where it is: the files of
    the optimiser differ. Raises TOPDError.
    """
    sharded = is_sharded(files)
    if sharded == (copy is not None):
        return
    was, now = ("by FSDP2", "without it") if sharded else ("without FSDP2", "with it")
    raise TOPDError(
        f"resume_from_checkpoint: {checkpoint} was saved {was} and does not resume {now}. Launch "
        "the run as it was launched (docs/scaling.md), or begin a new one with this student."
    )


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What accelerate's launcher said to shard with."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return FullyShardedDataParallelPlugin() if launched else None


def check_launch(args: TOPDConfig) -> None:
    """Refuse what accelerate was launched with and does not go. Raises TOPDError."""
    if args.mixed_precision != "no" and not (args.bf16 or args.fp16):
        raise TOPDError(
            f"accelerate: mixed_precision: {args.mixed_precision} is the launcher's, and the run's "
            "own settings, which are recorded, have none. Set bf16: true (or fp16), or launch with "
            "--mixed_precision no."
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise TOPDError(
            f"accelerate: dynamo_backend: {compiler} has no effect here: the student's layers are "
            "called without the compiled wrapper. Launch with --dynamo_backend no."
        )
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise TOPDError(
                f"accelerate: {name} is not supported. Launch with --multi_gpu (DDP), or with FSDP "
                "as docs/scaling.md says."
            )
    plugin = fsdp_plugin()
    if plugin is None:
        return
    for holds, fault, remedy in (
        (plugin.fsdp_version == 2, "version 1 is not supported", "fsdp_version: 2"),
        (
            "FULL_STATE_DICT" in str(plugin.state_dict_type),
            f"{plugin.state_dict_type} makes checkpoints that load in no other place",
            "fsdp_state_dict_type: FULL_STATE_DICT",
        ),
        (
            not plugin.cpu_ram_efficient_loading,
            "cpu_ram_efficient_loading leaves ranks without the weights that they check",
            "fsdp_cpu_ram_efficient_loading: false",
        ),
    ):
        if not holds:
            raise TOPDError(
                f"accelerate: FSDP: {fault}. Set {remedy} (docs/scaling.md has a file)."
            )
