"""What the task files beside this one name: local data in, verified answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from topd.errors import TOPDError
from topd.evaluate.answers import AnswerVerifier, reference_text
from topd.evaluate.spec import EvaluationSpec

VERIFY = AnswerVerifier()


def load(*, file: str, data_dir: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """The problems of ``file`` in ``data_dir``, as the split ``test``.

    lm-evaluation-harness passes ``--metadata`` here, together with arguments of the model.

    Raises:
        TOPDError: no ``data_dir``, no such file, or unknown columns.
    """
    if data_dir is None:
        raise TOPDError('--metadata: say where the data is: --metadata \'{"data_dir": "FOLDER"}\'.')
    rows = EvaluationSpec(path=str(Path(data_dir) / file)).load()
    kept = [{"prompt": row["prompt"], "answer": reference_text(row["answer"])} for row in rows]
    return {"test": datasets.Dataset.from_list(kept)}


def score(doc: Mapping[str, Any], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """The share of right responses to one problem: pass@1 over its repeats."""
    responses = [results[0]] if isinstance(results[0], str) else list(results[0])
    right = [VERIFY(response, doc) for response in responses]
    return {"pass@1": sum(right) / len(right)}
