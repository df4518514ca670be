"""A training on a device of its own: nothing is left on the CPU, and nothing is wider than float32.

No GPU is needed for it: ``elsewhere.py`` has the device.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from conftest import cpu_only, rows, tiny_model, tiny_tokenizer
from topd import TOPDConfig, TOPDTrainer

pytestmark = [
    cpu_only,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="a torch without devices in Python",
    ),
]


KINDS = ("llama", "qwen3")
METHODS = ("opd", "topd", "first_fork", "olive", "relay", "teachability", "eopd")


def train(folder: Path, method: str, **options: Any) -> None:
    """Two updates of a tiny pair on the device that there is."""
    models = (tiny_model(kind, seed=i, attn_implementation="eager") for i, kind in enumerate(KINDS))
    args = TOPDConfig(
        output_dir=str(folder), method=method, max_steps=2, per_device_train_batch_size=4,
        max_completion_length=12, window_length=4, candidate_fraction=0.3, learning_rate=1e-3,
        warmup_steps=0, save_strategy="no", disable_tqdm=True, seed=46, **options,
    )  # fmt: skip
    trainer = TOPDTrainer(
        *models, args, train_dataset=rows(), eval_dataset=rows(4), processing_class=tiny_tokenizer()
    )
    trainer.train()
    trainer.evaluate()


def logs(folder: Path) -> list[dict[str, float]]:
    """All figures but those of time."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in log.items() if "second" not in k and "runtime" not in k} for log in found
    ]


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """A run of every method there, in a process of its own: a device stays with its process."""
    folder = tmp_path_factory.mktemp("there")
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run(
        [sys.executable, script, str(folder), *METHODS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_training_elsewhere_is_that_on_the_cpu(there, tmp_path, method):
    train(tmp_path / method, method, use_cpu=True)
    for one, other in zip(logs(tmp_path / method), logs(there / method), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
