"""Whether all ranks train the same: else each would, unnoticed, learn something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topd.config import TOPDConfig
from topd.distributed import check_alike, several
from topd.inputs.models.fingerprints import fingerprint
from topd.runs.checkpoints import FREE, without_names
from topd.runs.files import as_json
from topd.training.startup import sets_of
from topd.types import Prompt


def data_prints(prompts: Sequence[Prompt], evaluation: Any) -> dict[str, Any]:
    """Of manifest.json: fingerprints of the training's prompts and of an evaluation's, by set."""
    held_out = {name: fingerprint(rows) for name, rows in sets_of(evaluation).items()}
    return {"data": fingerprint(prompts), "eval_data": held_out}


def check_ranks_agree(
    args: TOPDConfig,
    prompts: Sequence[Prompt],
    evaluation: Any = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Refuse ranks of other settings, prompts, models or packages. A collective.

    Args:
        args: the settings of this rank.
        prompts: of its training.
        evaluation: its evaluation's, or sets of them by name.
        record: what manifest.json would hold of it.

    Raises:
        TOPDError: on all ranks; it names what differs.
    """
    if not several():
        return
    settings = {k: v for k, v in as_json(args.to_dict()).items() if k not in FREE}
    made_of = {**record["models"], "versions": record["versions"]} if record else {}
    data = record or data_prints(prompts, evaluation)
    held_out = {f"eval_dataset {name}".strip(): own for name, own in data["eval_data"].items()}
    check_alike({"train_dataset": data["data"], **held_out, **without_names(made_of), **settings})
