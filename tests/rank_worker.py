"""What each of two ranks does for tests/test_ranks.py; one process does the same for comparison.

``python tests/rank_worker.py FOLDER CASE...`` runs cases (functions of this module) as the rank
that the environment says (RANK, WORLD_SIZE, ...), and leaves ``CASE-RANK.pt`` in the folder.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from conftest import rows, shorten, tiny_model
from test_evaluate import tiny_evaluator
from test_trainer import lines, make, student, teacher
from test_warmstart import make as stage_1
from topd import TOPDTrainer
from topd.distributed import agreed, end_ranks, everywhere, on_first, rank
from topd.errors import StoppedError, TOPDError
from topd.evaluate import EvaluationCallback, Evaluator
from topd.runs import lock
from topd.training.experience.evidence import Experience
from topd.training.learning import collate

BATCH, RANKS = 4, 2
FILE = Path(__file__).parents[1] / "docs" / "fsdp2.yaml"
FORK = {
    **{"method": "first_fork", "candidate_loss": "surprise", "candidate_threshold": None},
    **{"look_ahead_until": None, "false_alarm_share": 0.3, "candidate_fraction": 0.3},
}
HALF = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)
SAVED = {"save_strategy": "steps", "save_steps": 1}


def launched() -> dict[str, str]:
    """What accelerate's launcher tells ranks of FSDP with the file of docs/scaling.md."""
    two = ["--num_machines", "2", "--num_processes", "16", "--main_process_port", "29500"]
    words = ["--config_file", str(FILE), *two, "--machine_rank", "1", "-m", "topd"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if "FSDP" in k}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Gradients(TrainerCallback):
    """Keeps the gradients of every update, whole."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        names = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
        self.kept.append({name: whole(p.grad).clone() for name, p in names})


def made(folder: Path, ranks: int, **options: Any) -> TOPDTrainer:
    """A trainer of epochs of one update each: ranks share its four micro-batches."""
    sizes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 4 // ranks}
    return make(folder, data=rows(16), **{"max_steps": 2, **sizes, **options})


def trained(
    folder: Path, ranks: int, change: Callable[..., Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Two updates: gradients, weights, logs and records."""
    gradients = Gradients()
    trainer = made(folder, ranks, callbacks=[gradients], **options)
    if change:
        change(trainer, ranks)
    trainer.train()
    return {"gradients": gradients.kept, **left(trainer)}


def left(trainer: TOPDTrainer) -> dict[str, Any]:
    """What a run came to."""
    state = trainer.model.state_dict()
    found = {
        "weights": {name: whole(value) for name, value in state.items()},
        "sharded": sum(isinstance(value, DTensor) for value in state.values()),
        "logs": trainer.state.log_history,
    }
    names = ("rollouts", "guidance", "tokens") if rank() == 0 else ()
    return found | {name: lines(trainer.run_folder, name) for name in names}


def without(trainer: TOPDTrainer, ranks: int) -> None:
    """Nothing to learn from the second, fourth, ... micro-batch: with two ranks, from rank 1."""
    trainer.observer.guided = emptied(trainer.observer.guided, ranks, weights=True)


def without_forks(trainer: TOPDTrainer, ranks: int) -> None:
    """The same micro-batches have no fork."""
    trainer.observer.guided = emptied(trainer.observer.guided, ranks, weights=False)


def emptied(guided: Callable[..., Experience], ranks: int, *, weights: bool) -> Any:
    def changed(*args: Any) -> Experience:
        found = guided(*args)
        guidance, hidden = list(found.guidance), list(found.branch_hidden)
        for i, guide in enumerate(guidance):
            if rank() == 1 or (ranks == 1 and i // BATCH % RANKS == 1):
                kept = (0.0,) * len(guide.weights) if weights else (1.0,) * len(guide.weights)
                guidance[i], hidden[i] = replace(guide, weights=kept, targets=(), branches=()), ()
        return replace(found, guidance=tuple(guidance), branch_hidden=tuple(hidden))

    return changed


def reply(_: Mapping[str, Any], turns: Sequence[str]) -> str:
    """An environment that says two words of it again."""
    return " ".join(turns[-1].split()[:2]) or "3"


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "opd": (None, {"method": "opd", **SAVED}),
    "topd": (None, {"method": "topd"}),
    "first_fork": (None, FORK),
    "topd, nothing on rank 1": (without, {"method": "topd"}),
    "first_fork, no fork on rank 1": (without_forks, FORK),
    "turns": (None, {"method": "topd", "environment": "rank_worker:reply", "max_turns": 3}),
}


def ddp(folder: Path, ranks: int) -> dict[str, Any]:
    """Every case under DDP."""
    return {
        name: trained(folder / name, ranks, change, **args)
        for name, (change, args) in CASES.items()
    }


def fsdp(folder: Path, ranks: int) -> dict[str, Any]:
    """Every case under accelerate's FSDP2."""
    os.environ.update(launched())
    return ddp(folder, ranks)


def ddp_resumed(folder: Path, ranks: int, kind: str = "ddp") -> dict[str, Any]:
    """The first case's run, which was saved, continued with from its first update.

    The other ranks take another checkpoint for the newest, as on a file system that shows it late.
    """
    if rank() == 0:
        shutil.copytree(folder.parent / kind / "opd", folder)
        shutil.rmtree(folder / "student")
    everywhere(None)
    trainer = made(folder, ranks, **CASES["opd"][1])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{1 + (rank() > 0)}"))
    return left(trainer)


def fsdp_resumed(folder: Path, ranks: int) -> dict[str, Any]:
    """The same under FSDP2."""
    os.environ.update(launched())
    return ddp_resumed(folder, ranks, "fsdp")


def answered(folder: Path, ranks: int) -> dict[str, Any]:
    """Stage 1, whose teacher's answers the ranks write among them; then a stop on one of them."""
    options = {"gradient_accumulation_steps": 2 // ranks, "answer_batch_size": 3}
    trainer = stage_1(folder / "whole", data=rows(16), **options)
    trainer.train()
    stopped = stage_1(folder / "stopped", data=rows(16), **options)
    stopped.watch.reason = StoppedError("asked.", 75) if rank() == ranks - 1 else None
    try:
        stopped.train()
    except StoppedError as error:
        said = str(error)
    learned = [prompt.response for prompt in trainer.train_dataset]
    written = (folder / "whole" / "answers.jsonl").read_text()
    return {"learned": learned, "written": written, "said": said, "cost": trainer.answered.tokens}


def reordered(folder: Path, ranks: int) -> list[list[int]]:
    """The prompts of two epochs of three updates, whole and resumed within the second."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // ranks}
    options = {**sizes, **SAVED, "max_steps": 6, "method": "opd", "max_completion_length": 2}
    make(folder / "whole", data=rows(12), **options).train()
    if rank() == 0:
        shutil.copytree(folder / "whole", folder / "cut")
        for name in ("student", "checkpoint-5", "checkpoint-6"):
            shutil.rmtree(folder / "cut" / name)
    everywhere(None)
    again = make(folder / "cut", data=rows(12), **options)
    again.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-4"))
    everywhere(None)
    return [[r["prompt"] for r in lines(folder / k, "rollouts")] for k in ("whole", "cut")]


class OnLast(TrainerCallback):
    """Asks for a checkpoint after an update, and at an event after the next for an end; on one
    rank. It has a figure of its own in the log.
    """

    def __init__(self, trainer: TOPDTrainer, ranks: int, event: str) -> None:
        self.trainer, self.asks, self.event = trainer, rank() == ranks - 1, event

    def on_step_end(self, args, state, control, **_) -> None:
        if self.asks:
            self.trainer.log({"own": 1.0})
        control.should_save |= self.asks and state.global_step == 1

    def on_log(self, args, state, control, **_) -> None:
        self._end("log", state, control)

    def on_substep_end(self, args, state, control, **_) -> None:
        self._end("substep", state, control)

    def _end(self, event: str, state: TrainerState, control: TrainerControl) -> None:
        ends = self.asks and event == self.event and state.global_step == 2
        control.should_training_stop |= ends


def asked(folder: Path, ranks: int) -> list[tuple[int, list[str]]]:
    """Where a run ends that a callback of one rank ends, and what it has saved; by event."""
    found, rare = [], {"max_steps": 4, "save_strategy": "steps", "save_steps": 9}
    for event in ("log", "substep"):
        trainer = made(folder / event, ranks, method="opd", **rare)
        trainer.add_callback(OnLast(trainer, ranks, event))
        trainer.train()
        everywhere(None)
        saved = [path.name for path in (folder / event).glob("checkpoint-*")]
        found.append((trainer.state.global_step, saved))
    return found


def faults(folder: Path, ranks: int) -> dict[str, str]:
    """What every rank raises where one of them has a fault."""
    found = {}

    def one_fails() -> None:
        if rank() == ranks - 1:
            raise TOPDError("rank 1: its fault.")

    def broken(trainer: TOPDTrainer, _: int, step: int = 0) -> None:
        score = trainer.observer.score

        def failing(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == step:
                one_fails()
            return score(*args, **kwargs)

        trainer.observer.score = failing

    def gap(trainer: TOPDTrainer, _: int) -> None:
        generate = trainer.observer.student.generate

        def wrong(*args: Any, **kwargs: Any) -> Any:
            off = 0.8 if rank() == ranks - 1 else 0.0
            return [
                replace(w, logprobs=tuple(p - off for p in w.logprobs))
                for w in generate(*args, **kwargs)
            ]

        trainer.observer.student.generate = wrong

    def judged(trainer: TOPDTrainer, _: int) -> None:
        evaluator = tiny_evaluator()

        def judge(text: str, row: Any) -> bool:
            if trainer.state.global_step == 1:
                one_fails()
            return bool(text)

        made = Evaluator(evaluator.prompts, evaluator.rows, judge, evaluator.tokenizer)
        trainer.add_callback(EvaluationCallback(trainer, made, every=1))

    later, rare = partial(broken, step=1), {"save_strategy": "steps", "save_steps": 9}
    for name, change, args in (
        *(("observe", broken, rare), ("gap", gap, rare)),
        *(("later", later, rare), ("later, not saved", later, {}), ("judged", judged, rare)),
    ):
        try:
            trained(folder / name, ranks, change, **args)
        except TOPDError as error:
            found[name] = str(error)
    try:
        agreed(one_fails)
    except TOPDError as error:
        found["agreed"] = str(error)
    found["everywhere"] = str(everywhere(rank()))
    found["on_first"] = str(on_first(rank()))
    return found


def apart(folder: Path, ranks: int) -> dict[str, str]:
    """What is said where the second rank was given something else than the first."""
    found, last, learned = {}, ranks > 1 and rank() == ranks - 1, {"method": "opd", "max_steps": 1}
    data, held_out = rows(16), rows(7)
    given: dict[str, dict[str, Any]] = {
        "nothing": {},
        "data": {"data": data[::-1] if last else data},
        "eval": {"eval_dataset": {"a": held_out, "b": held_out[: 6 if last else 7]}},
        "temperature": {"temperature": 0.8 if last else 1.0},
        "learning_rate": {"learning_rate": 1e-2 if last else 1e-3},
    }
    models = {"teacher": (student(), tiny_model("qwen3", seed=2 if last else 1))}
    waits, lock.PATIENCE = lock.PATIENCE, 1.0
    for name in (*given, "teacher", "answers", "folder"):
        place = folder / f"{name}{last if name == 'folder' else ''}"
        options = {"data": data, **learned, **given.get(name, {})}
        try:
            if name == "answers":
                stage_1(place, data=data[: 10 if last else 16]).train()
            else:
                make(place, *models.get(name, ()), **options).train()
        except TOPDError as error:
            found[name] = str(error).replace(str(place), "FOLDER")
    lock.PATIENCE = waits
    return found


def evaluated(folder: Path, ranks: int) -> dict[str, Any]:
    """The evaluation of 7 prompts, after which the last batch of a rank is filled up; before the
    training, in it, and after it. How often a rank writes its state is counted.
    """
    best = {**SAVED, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options = {"per_device_eval_batch_size": 2, "method": "opd", "eval_dataset": rows(7), **best}
    trainer, written, write = made(folder, ranks, **options), [], TrainerState.save_to_json
    loss = trainer.evaluate()["eval_loss"]
    TrainerState.save_to_json = lambda self, path: written.append(path) or write(self, path)
    try:
        trainer.train()
    finally:
        TrainerState.save_to_json = write
    losses = [loss, trainer.evaluate()["eval_loss"]]
    return {"losses": losses, "written": len(written), **left(trainer)}


def fsdp_evaluated(folder: Path, ranks: int) -> dict[str, Any]:
    """The same under FSDP2."""
    os.environ.update(launched())
    return evaluated(folder, ranks)


def fsdp_optimizers(folder: Path, ranks: int) -> dict[str, str]:
    """What is said of optimisers that cannot be sharded, saved or loaded under FSDP2."""
    os.environ.update(launched())
    said = {}
    for name in ("adafactor", "adagrad", "sgd"):
        try:
            made(folder / name, ranks, optim=name)
        except TOPDError as error:
            said[name] = str(error)
    made(folder / "momentum", ranks, optim="sgd", optim_args="momentum=0.9")
    return said


def fsdp_adapters(folder: Path, ranks: int) -> dict[str, str]:
    """What is said under FSDP2 of adapters on tied embeddings."""
    os.environ.update(launched())
    said, tie = {}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for name, options in (
        ("tokens", {"trainable_token_indices": [3]}),
        ("modules", {"modules_to_save": ["embed_tokens"]}),
        ("both", tie),
    ):
        models = student(tie_word_embeddings=True), teacher()
        lora = LoraConfig(r=2, target_modules=["q_proj"], **options)
        try:
            make(folder / name, *models, data=rows(4), peft_config=lora)
        except TOPDError as error:
            said[name] = str(error)
    return said


def pretended() -> None:
    """Have accelerate shard on a CPU, where it silently runs DDP else."""
    init = AcceleratorState.__init__

    def pretending(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = pretending


def layouts(folder: Path, ranks: int) -> dict[str, Any]:
    """One update of students that are sharded in other ways, or not where there is one rank."""
    return {
        "in one": by_hand(folder / "in one", ranks, fully_shard),
        "tied": by_hand(folder / "tied", ranks, layers, tie_word_embeddings=True),
        "half": by_hand(folder / "half", ranks, partial(layers, mp_policy=HALF)),
    }


def by_hand(folder: Path, ranks: int, shard: Callable[[nn.Module], Any], **changes: Any) -> Any:
    """Loss and gradient of one update of a student that ``shard`` shards."""
    model = student(**changes)
    trainer = make(folder, model, teacher(), data=rows(16), **FORK)
    own = [i for i in range(16) if ranks == 1 or i // BATCH % RANKS == rank()]
    prompts = [trainer.train_dataset[i] for i in own]
    experience = trainer.observer.observe(prompts, step=0, numbers=own)
    totals = trainer._totals(experience)
    batch = collate(experience, range(len(own)), totals, trainer.args.device)
    trainer.args.max_logprob_gap = 1.0  # what is written in float32 may be learned in bfloat16
    if ranks > 1:
        shard(model)
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    return {
        "loss": sum(everywhere(loss.item())) / ranks,
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters()},
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "dtype": loss.dtype,
    }


def layers(model: nn.Module, **policy: Any) -> None:
    """As accelerate does: layers, embeddings and [norm, head] each on their own."""
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        fully_shard(model.model.embed_tokens, **policy)
        fully_shard([model.model.norm, model.lm_head], **policy)
    else:
        tail = [model.model.norm, model.model.embed_tokens, model.lm_head]
        fully_shard(tail, **policy)
    fully_shard(model, **policy)


def main(folder: Path, ranks: int, cases: Sequence[str]) -> None:
    """Run the cases and store what came of them, each rank for itself."""
    torch.set_num_threads(1)
    gc.freeze()
    shorten(pytest.MonkeyPatch())
    for case in cases:
        torch.save(globals()[case](folder / case, ranks), folder / f"{case}-{rank()}.pt")
    end_ranks()


if __name__ == "__main__":
    pretended()
    main(Path(sys.argv[1]), RANKS, sys.argv[2:])
