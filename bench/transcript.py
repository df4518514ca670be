"""docs/transcript.md: from two models of one's own to a page, as a terminal of 80 columns shows it.

    python -m bench.transcript

The lines are run in a folder that has a clone of this repository and nothing else, in a new
environment, for which pip needs a package index.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
import time
from pathlib import Path

import typer

MAKE = """\
import json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, logging
import torch

logging.disable_progress_bar()

words = [*"0123456789+=?", "<pad>", "<eos>", "<unk>"]
known = {word: i for i, word in enumerate(words)}
plain = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
for seed, (name, width) in enumerate({"student": 32, "teacher": 64}.items()):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=14,
        pad_token_id=13,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
for name, first in {"train": 0, "test": 5}.items():
    with open(f"{name}.jsonl", "w") as file:
        for a in range(first, first + 5):
            for b in range(10):
                row = {"prompt": f"{a}+{b}=?", "answer": str(a + b)}
                print(json.dumps(row), file=file)
"""
TRAIN = (
    "topd train --student student --teacher teacher --data.path train.jsonl --data.chat false "
    "--max_steps 10 --max_completion_length 8 --learning_rate 1e-2 --output_dir runs/mine"
)
LINES = (
    "python3 -m venv env",
    "env/bin/pip install -qq --constraint topd/constraints.txt ./topd",
    ". env/bin/activate && python make.py",
    TRAIN,
    "topd show runs/mine --rollout 3",
    "topd report runs/mine",
    "topd eval runs/mine/student test.jsonl --max-tokens 8 --samples 1 --output runs/eval",
    "topd audit runs/mine",
)
HEAD = """# A transcript

Two models of your own, a file of prompts, and what every command prints, in 80 columns. The
models have random weights, so nothing worth having is learned; what you see is the way that a
pair of yours takes. It starts beside a clone of the repository, `topd`. Everything below this
introduction is written by `python -m bench.transcript`, on two cores with the load that it names;
the time of the install is also that of the package index.

"""


def main(path: Path = Path("docs/transcript.md")) -> None:
    """Run every line in an empty folder and write the page."""
    parts = [HEAD, f"Load at the start: {os.getloadavg()[0]:.1f}.\n\n`make.py`:\n\n"]
    parts.append(f"```python\n{MAKE}```\n")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "make.py").write_text(MAKE, encoding="utf-8")
        here, clone = str(Path(__file__).parents[1]), str(Path(folder) / "topd")
        subprocess.run(["git", "clone", "--quiet", here, clone], check=True)  # noqa: S603, S607
        parts += [_shown(line, folder) for line in LINES]
    path.write_text("".join(parts), encoding="utf-8")


def _shown(line: str, folder: str) -> str:
    """A command with its time and what it prints. Raises CalledProcessError where it fails."""
    before, begun = _children(), time.perf_counter()
    done = subprocess.run(  # noqa: S602 - the lines above
        line,
        shell=True,
        cwd=folder,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_own_environment(folder),
    )
    wall, cpu = time.perf_counter() - begun, _children() - before
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(folder, "~").rstrip()
    text = "\n".join(row.rstrip() for row in text.splitlines())
    return f"\n## {cpu:.1f} CPU s, {wall:.1f} s\n\n```console\n$ {line}\n{text}\n```\n"


def _own_environment(folder: str) -> dict[str, str]:
    """Of a terminal of 80 columns, where the new environment comes first."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**given, "COLUMNS": "80", "PATH": f"{folder}/env/bin{os.pathsep}{given['PATH']}"}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    typer.run(main)
