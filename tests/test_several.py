"""Several teachers: each text read by its own, or by their mean; one given twice is one."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import USE_CPU, rows, tiny_model, tiny_tokenizer, write_pair
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.commands.audit import audit_run, replay_step
from topd.commands.recipe import read_recipe
from topd.commands.train import run_recipe
from topd.engines.hf import HFEngine
from topd.engines.several import MeanTeacher, SeveralHeads, SeveralTeachers
from topd.errors import TOPDError
from topd.inputs.teachers import Routes, Teachers, TeacherSet
from topd.report import write_report
from topd.training.footprint import size_of, size_of_all
from topd.training.learning import Totals, collate, learning_terms
from topd.types import Head, Prompt, Sampling

SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 12,
    "seed": 3,
    "method": "topd",
    "window_length": 4,
    "candidate_fraction": 0.3,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
}
TIMES = ("second", "runtime", "rollouts/", "teacher/")


def named(count: int = 8) -> list[dict[str, str]]:
    """Rows in turn for two teachers."""
    return [{**row, "teacher": ("math", "code")[i % 2]} for i, row in enumerate(rows(count))]


def trainer(folder: Path, teachers: Any, data: Any = None, **options: Any) -> TOPDTrainer:
    return TOPDTrainer(
        tiny_model("llama", seed=0),
        teachers,
        TOPDConfig(output_dir=str(folder), **{**SMALL, **options}),
        train_dataset=data or named(),
        processing_class=tiny_tokenizer(),
    )


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [
        {key: v for key, v in row.items() if key != "teacher" and not any(t in key for t in TIMES)}
        for row in found
    ]


@pytest.mark.parametrize("mix", ["column", "mean"])
@pytest.mark.parametrize("method", ["topd", "first_fork"])
def test_one_teacher_given_twice_is_one(tmp_path, mix, method) -> None:
    teacher = tiny_model(seed=1)
    options = {"method": method, "candidate_threshold": None}
    one = trainer(tmp_path / "one", copy.deepcopy(teacher), **options)
    both = Teachers({"math": teacher, "code": teacher})
    two = trainer(tmp_path / "two", both, teachers_mix=mix, **options)
    for made in (one, two):
        made.train()
    assert all(
        torch.equal(p, q)
        for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True)
    )
    for name in ("rollouts", "guidance", "metrics"):
        assert records(tmp_path / "one", name) == records(tmp_path / "two", name)
    whose = [
        json.loads(line).get("teacher")
        for line in (tmp_path / "two/rollouts.jsonl").read_text().splitlines()
    ]
    assert set(whose) == ({"math", "code"} if mix == "column" else {None})


def test_every_row_is_seen_by_its_own_teacher(tmp_path) -> None:
    models = {"math": tiny_model(seed=1), "code": tiny_model("llama", seed=2, hidden_size=48)}
    made = trainer(tmp_path / "both", Teachers(models), window_temperature=1.0)
    prompts = made.train_dataset
    seen = made.observer.observe(prompts, step=0)
    with pytest.raises(ValueError, match="zip"):  # not zeros: nobody has said whose text it is
        made.observer.teacher.embed(torch.zeros(1, 2, dtype=torch.long))
    for name, model in models.items():
        alone = trainer(tmp_path / name, copy.deepcopy(model), window_temperature=1.0)
        own = alone.observer.observe(prompts, step=0)
        assert [r.response for r in own.rollouts] == [r.response for r in seen.rollouts]
        mine = [i for i, prompt in enumerate(prompts) if prompt.teacher_name == name]
        assert len(mine) == 4
        for i in mine:
            torch.testing.assert_close(
                seen.teacher_logprobs[i], own.teacher_logprobs[i], atol=1e-5, rtol=0
            )
            assert [f.position for f in seen.forks[i]] == [f.position for f in own.forks[i]]
            for fork, theirs in zip(seen.forks[i], own.forks[i], strict=True):
                assert fork.teacher_tokens == theirs.teacher_tokens
                assert fork.distance == pytest.approx(theirs.distance, abs=1e-5)


@pytest.mark.parametrize("method", ["opd", "window_kd"])
def test_the_loss_is_the_sum_of_what_each_teacher_asks(tmp_path, method) -> None:
    """Losses of the rows of one teacher, taken with that teacher alone, add up to the whole."""
    models = {"math": tiny_model(seed=1), "code": tiny_model("llama", seed=2, hidden_size=48)}
    options = {"method": method, "false_alarm_share": 0.0}
    made = trainer(tmp_path / "both", Teachers(models), **options)
    prompts, device = made.train_dataset, made.accelerator.device
    seen = made.observer.observe(prompts, step=0)
    batch = collate(seen, range(8), Totals(1, 1), device, packed=False)
    whole = learning_terms(made.model, batch, made.observer.teacher.head, made.args)
    loss = torch.zeros(())
    branches = torch.zeros(())
    for name, model in models.items():
        alone = trainer(tmp_path / name, copy.deepcopy(model), **options)
        own = alone.observer.observe(prompts, step=0)
        mine = [i for i, prompt in enumerate(prompts) if prompt.teacher_name == name]
        part = collate(own, mine, Totals(1, 1), device, packed=False)
        terms = learning_terms(made.model, part, alone.observer.teacher.head, alone.args)
        loss, branches = loss + terms.tokens.divergence.sum(), branches + terms.branches
    torch.testing.assert_close(whole.tokens.divergence.sum(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.branches, branches, rtol=1e-5, atol=1e-5)
    assert (branches > 0) == (method == "window_kd")


def test_a_teacher_s_embeddings_are_not_rounded_to_the_dtype_of_another() -> None:
    models = [tiny_model(seed=1).bfloat16(), tiny_model("llama", seed=2, hidden_size=48)]
    teacher = SeveralTeachers([HFEngine(m, eos_ids=(2,)) for m in models], {"a": 0, "b": 1}, [0, 1])
    tokens = torch.tensor([[5, 6], [7, 8]])
    found = teacher.embed(tokens)
    for row, model in enumerate(models):
        own = model.get_input_embeddings()(tokens[row])
        assert torch.equal(found[row, :, : own.shape[-1]], own.float())


def test_a_mean_of_heads_by_hand(monkeypatch) -> None:
    """p = (softmax(l1) + softmax(l2)) / 2, and each row's own head where they are routed."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, d, generator=generator, dtype=torch.float64) for d in (3, 5)]
    heads = [Head(weights[0], softcap=2.0), Head(weights[1], scale=0.5)]
    states = [torch.randn(4, d, generator=generator, dtype=torch.float64) for d in (3, 5)]
    logits = [2 * torch.tanh(states[0] @ weights[0].T / 2), 0.5 * states[1] @ weights[1].T]
    mean = sum(x.softmax(-1) for x in logits) / 2
    found = SeveralHeads.of(heads, (0.5, 0.5)).logits(torch.cat(states, -1))
    torch.testing.assert_close(found.exp(), mean)
    wide = torch.zeros(8, 6, dtype=torch.float64)
    wide[:4, :3], wide[4:, :5], wide[4:, 5] = states[0], states[1], 1
    torch.testing.assert_close(SeveralHeads.of(heads).logits(wide), torch.cat(logits))
    wide, logits = wide.roll(2, 0)[::3], torch.cat(logits).roll(2, 0)[::3].split(1)  # in turn
    third = SeveralHeads.of([*heads, heads[1]])  # whose rows there are none of
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "nonzero", None, raising=False)  # it waits for the device
        torch.testing.assert_close(third.logits(wide), torch.cat(logits))
    narrow = SeveralHeads.of(heads).narrowed(4)
    torch.testing.assert_close(narrow.logits(wide), torch.cat(logits)[:, :4])
    torch.testing.assert_close(narrow.raw(torch.float64)(wide), torch.cat(logits)[:, :4])


def test_the_mean_scores_and_writes_as_its_distribution(tmp_path) -> None:
    models = [tiny_model(seed=1), tiny_model("llama", seed=2, hidden_size=48)]
    engines = [HFEngine(model, eos_ids=(2,)) for model in models]
    shares = Routes({"a": 0, "b": 1, "c": 0}, "mean").shares
    assert shares == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    teacher = MeanTeacher(engines, shares)
    prompt, answer = (5, 6, 7), (8, 9, 10, 11)

    def logprobs(text: tuple[int, ...]) -> Any:
        ids = torch.tensor([text])
        own = [model(input_ids=ids).logits[0, -1].softmax(-1) for model in models]
        return sum(share * p for share, p in zip(shares, own, strict=True)).log()

    scores = teacher.score([prompt], [answer])
    expected = [logprobs(prompt + answer[:t])[answer[t]] for t in range(4)]
    torch.testing.assert_close(scores.logprobs[0], torch.stack(expected), atol=1e-5, rtol=0)
    (window,) = teacher.continue_from(scores, [(0, 2)], Sampling(0.0, max_new_tokens=5), [1])
    text = prompt + answer[:2]
    for token, said in zip(window.tokens, window.logprobs, strict=True):
        expected = logprobs(text)
        assert token == int(expected.argmax())
        assert said == pytest.approx(expected.max().item(), abs=1e-5)
        text += (token,)
    assert window.hidden.shape == (len(window.tokens), 80)


@pytest.mark.parametrize("mix", ["column", "mean"])
def test_a_recipe_with_teachers_is_audited_and_replayed(tmp_path, mix) -> None:
    recipe = recipe_of(tmp_path, teachers_mix=mix, max_steps=3, save_strategy="steps", save_steps=2)
    with contextlib.chdir(tmp_path):
        run_recipe(recipe, quiet=True)
        found = audit_run(Path("run"), updates=3, seed=0)
        assert found.faults == []
        assert replay_step(Path("run"), 2).faults == []
        if mix == "mean":
            return
        path = Path("run/rollouts.jsonl")
        lines = whole = path.read_text().splitlines()
        first = json.loads(lines[0])
        other = {"math": "code", "code": "math"}[first["teacher"]]
        lines = [json.dumps({**first, "teacher": other}), *whole[1:]]
        path.write_text("\n".join(lines) + "\n")
        assert any("its teacher" in fault for fault in audit_run(Path("run")).faults)
    page = write_report(tmp_path / "run").read_text()
    assert "By teacher" in page
    assert '"whose": "math"' in page or '"whose":"math"' in page
    logs = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = [json.loads(x) for x in whole]
    for log in logs[:3]:
        own = [row for row in seen if row["step"] == log["step"] - 1]
        for name in ("math", "code"):
            mine = [row for row in own if row["teacher"] == name]
            gap = sum(sum(row["logprobs"]) - sum(row["teacher_logprobs"]) for row in mine)
            expected = gap / sum(len(row["logprobs"]) for row in mine)
            assert log[f"teacher/{name}/reverse_kl_sampled"] == pytest.approx(expected, abs=1e-4)


def recipe_of(root: Path, data: Any = None, **changes: Any) -> Path:
    """A recipe of two teachers, and the models and data that it names."""
    path = write_pair(root)
    tiny_model("llama", seed=2, hidden_size=48).save_pretrained(root / "code")
    tiny_tokenizer().save_pretrained(root / "code")
    lines = [json.dumps(row) for row in data or named()]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    teachers = {"math": str(root / "teacher"), "code": {"path": str(root / "code")}}
    content = {
        **{"student": str(root / "student"), "data": str(root / "prompts.jsonl")},
        **{"teachers": teachers, "output_dir": str(root / "run"), **SMALL, **changes},
    }
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ([*named()[:2], {**named()[2], "teacher": "law"}], {}, "data row 2: column 'teacher' is"),
        ([*named()[:1], rows()[1]], {}, "data row 1: column 'teacher' is missing: it has"),
        (None, {"teacher_column": "whose"}, "data row 0: column 'whose' is missing"),
        ([row for row in named() if row["teacher"] == "math"], {}, "code is named by no row"),
        (None, {"teacher": "x"}, "has teacher and teachers"),
        (None, {"teachers": {"math": "x"}}, "2 to 256 by name"),
        (None, {"teachers": {"math": "self", "code": "x"}}, "self is not one of several"),
        (None, {"teachers_mix": "sum"}, "teachers_mix"),
        (None, {"teachers": None, "teacher": "teacher", "teachers_mix": "mean"}, "no effect"),
        (None, {"teachers_mix": "mean", "window_rejoin": 2}, "window_rejoin: has no effect with"),
        (None, {"teachers_mix": "mean", "teacher_column": "who"}, "teacher_column: has no effect"),
        (None, {"teachers": None}, "teacher is missing"),
    ],
)
def test_bad_input_is_told_before_weights_load(tmp_path, monkeypatch, data, changes, said) -> None:
    path = recipe_of(tmp_path, data, **changes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("topd.training.startup.load_pair", lambda *_: pytest.fail("loaded"))
    with pytest.raises(TOPDError, match=said):
        run_recipe(path, quiet=True)


def test_a_probe_looks_at_one_teacher(tmp_path) -> None:
    from topd.commands.recipe import one_teacher

    with pytest.raises(TOPDError, match="look at one teacher"):
        one_teacher(read_recipe(recipe_of(tmp_path)))


def test_names_of_one_source_share_a_model() -> None:
    teachers = Teachers({"a": "x", "b": {"path": "x"}, "c": {"path": "x", "dtype": "bfloat16"}})
    assert len(teachers.distinct) == 2
    assert teachers.places == {"a": 0, "b": 0, "c": 1}
    assert Prompt(0, (1,), (1,)).teacher_name is None


def test_memory_of_several_is_that_of_the_largest_and_the_bytes_of_all() -> None:
    models = [tiny_model(seed=1), tiny_model("llama", seed=2, hidden_size=48)]
    teachers = TeacherSet(Teachers({"a": models[0], "b": models[1]}), models)
    small, large = map(size_of, models)
    assert size_of_all(teachers) == replace(large, bytes=small.bytes + large.bytes)
    assert size_of_all(models[0]) == small
