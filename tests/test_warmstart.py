"""Stage 1, and both stages end to end on little sums."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from conftest import EOS, USE_CPU, WORDS, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.losses import TokenTerms, token_divergence
from topd.report.headline import training_words
from topd.training.learning import LearningTerms, Totals, update_loss
from topd.training.warmstart import OF_ANSWERS, OF_ROLLOUTS, WarmstartConfig, WarmstartTrainer

SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "max_completion_length": 24,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
}


def make(folder: Path, *models: PreTrainedModel, data=None, **options) -> WarmstartTrainer:
    return WarmstartTrainer(
        *(models or (tiny_model("llama", seed=0), tiny_model("qwen3", seed=1))),
        WarmstartConfig(output_dir=str(folder), **{**SMALL, **options}),
        train_dataset=data or rows(),
        processing_class=tiny_tokenizer(),
    )


def gradient(model: PreTrainedModel, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


def dense(model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def answers(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_each_trainer_takes_its_own_arguments(tmp_path, monkeypatch):
    pair = tiny_model("llama", seed=0), tiny_model("qwen3", seed=1)
    with pytest.raises(TOPDError, match=r"WarmstartConfig is for .*WarmstartTrainer"):
        TOPDTrainer(*pair, WarmstartConfig(output_dir=str(tmp_path), **SMALL), rows())
    with pytest.raises(TOPDError, match="args: must be a WarmstartConfig, not TOPDConfig"):
        WarmstartTrainer(*pair, TOPDConfig(output_dir=str(tmp_path), **SMALL), rows())
    for teacher in ({}, {"teacher_model": None}):
        with pytest.raises(TOPDError, match=r"teacher_model: is missing.*the path of the student"):
            WarmstartTrainer(pair[0], **teacher, args=WarmstartConfig(output_dir=str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TOPDError, match="1024 tokens, the model has 512 positions"):
        WarmstartTrainer(*pair, processing_class=tiny_tokenizer())  # the defaults are its own


def test_a_warm_start_from_data_does_with_the_students_own_path_as_teacher(tmp_path):
    tiny_model("llama", seed=0).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    data = [{"prompt": "what is 1 + 2 ?", "solution": "so 3"}] * 4
    path = str(tmp_path / "student")
    trainer = make(tmp_path / "run", path, path, data=data, answers="data", kd_ratio=0.0)
    trainer.train()
    assert (tmp_path / "run" / "student" / "config.json").exists()


# The loss


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("who", ["data", "teacher"])
def test_loss_and_gradient_are_forward_kl_and_cross_entropy_at_temperature_1(
    tmp_path, who, kd_ratio
):
    pair = tiny_model("llama", seed=0).double(), tiny_model("qwen3", seed=1).double()
    trainer = make(tmp_path, *pair, answers=who, kd_ratio=kd_ratio, temperature=0.6)
    trainer.train()
    prompts = trainer.train_dataset
    student = tiny_model("llama", seed=0).double()
    tokens = []
    for prompt in prompts:
        own = dense(student, prompt.student, prompt.response)
        theirs = dense(pair[1], prompt.teacher, prompt.response).detach()
        divergence = token_divergence(own, theirs, kind="forward_kl")
        likelihood = own.gather(-1, torch.tensor(prompt.response)[:, None])[:, 0]
        tokens.append(kd_ratio * divergence - (1 - kd_ratio) * likelihood)
    expected = torch.cat(tokens).mean()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-6)
    norm = torch.cat([g.flatten() for g in gradient(student, expected)]).norm().item()
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert "logprob_gap" not in log  # nobody sampled these from the student


def test_cross_entropy_alone_asks_no_teacher(tmp_path, monkeypatch):
    """Neither its states nor its log-probs: what would need them is not reported."""
    trainer = make(tmp_path, answers="data", kd_ratio=0.0)
    score, asked = HFEngine.score, []
    monkeypatch.setattr(HFEngine, "score", lambda *a, **k: (asked.append(1), score(*a, **k))[1])
    trainer.train()
    assert not asked
    log = trainer.state.log_history[0]
    assert "forward_kl" not in log
    assert log["tokens/teacher_read"] == 0
    assert log["tokens/learned"] > 0
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert all(json.loads(line)["teacher_logprobs"] == [] for line in lines)
    assert trainer.evaluate(rows(2))["eval_loss"] > 0  # on rollouts, which are scored
    assert asked


def test_cross_entropy_alone_is_finite_where_the_divergence_is_not(tmp_path):
    """As it is where the student bars a token that the teacher takes for possible."""
    divergence, entropy, logprob = torch.tensor([[torch.inf, 1.0], [1.0, 1.0], [-2.0, -4.0]])
    terms = TokenTerms(divergence, entropy, logprob, torch.zeros(2, 0))
    given = {"weights": torch.ones(2), "capped": None, "advantages": None, "lengths": [2]}
    given |= {"target_probabilities": torch.zeros(2, 0), "totals": Totals(2, 0)}
    args = WarmstartConfig(output_dir=str(tmp_path), use_cpu=USE_CPU)
    loss, _ = update_loss(LearningTerms(terms, torch.zeros(())), given, args)
    assert loss.item() == 3.0


def test_a_token_of_weight_0_costs_nothing_where_its_divergence_is_infinite(tmp_path):
    divergence = torch.tensor([torch.inf, 1.0], requires_grad=True)
    terms = TokenTerms(divergence, torch.ones(2), torch.full((2,), -2.0), torch.zeros(2, 0))
    given = {"weights": torch.tensor([0.0, 1.0]), "capped": None, "advantages": None}
    given |= {"target_probabilities": torch.zeros(2, 0), "totals": Totals(2, 0), "lengths": [2]}
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=USE_CPU)
    loss, _ = update_loss(LearningTerms(terms, torch.zeros(())), given, args)
    loss.backward()
    assert (loss.item(), divergence.grad.tolist()) == (0.5, [0.0, 0.5])


# Who wrote the answers


def test_answers_from_the_data_are_its_solutions_and_an_end(tmp_path):
    trainer = make(tmp_path, answers="data")
    words = tiny_tokenizer().get_vocab()
    for prompt, row in zip(trainer.train_dataset, rows(), strict=True):
        assert prompt.response == (*(words[w] for w in row["solution"].split()), EOS)
    trainer.train()
    assert not (tmp_path / "answers.jsonl").exists()


def test_answers_that_are_there_need_the_positions_that_they_have(tmp_path):
    """However long others may be; the teacher's may be that long."""
    limit = tiny_model().config.max_position_embeddings
    make(tmp_path, answers="data", max_completion_length=limit)
    with pytest.raises(TOPDError, match="positions"):
        make(tmp_path, max_completion_length=limit)
    data = [{"prompt": "what ?", "solution": "so " * (limit - 2)}]
    with pytest.raises(TOPDError, match="positions"):
        make(tmp_path, data=data, answers="data", max_completion_length=limit)


def test_a_solution_longer_than_the_limit_is_refused_with_its_row(tmp_path):
    long = [{"prompt": "what ?", "solution": "so " * count} for count in (24, 29)]
    said = "data row 2: the solution has 25 tokens.*Above it: 2 of 4 rows, the longest 30"
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, data=[*rows(2), *long], answers="data")


def test_the_teacher_answers_every_prompt_and_unfinished_answers_are_left_out(tmp_path, caplog):
    trainer = make(tmp_path)
    prompts = list(trainer.train_dataset)
    trainer.train()
    stored = answers(tmp_path)[1:]
    assert len(stored) == len(prompts)
    finished = [answer for answer in stored if answer]
    assert 0 < len(finished) < len(prompts)
    assert all(answer.index(EOS) == len(answer) - 1 for answer in finished)
    learned = [(p.index, list(p.response)) for p in trainer.train_dataset]
    assert learned == [(i, answer) for i, answer in enumerate(stored) if answer]
    rollouts = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    seen = sorted(json.loads(line)["response_ids"] for line in rollouts)
    assert seen == sorted(finished)
    cut = len(stored) - len(finished)
    said = f"{cut} of the teacher's 8 answers did not end within 24 tokens and are left out."
    assert said in caplog.text
    assert trainer.state.log_history[-1]["answers/unfinished"] == cut / 8
    words = " ".join(training_words(tmp_path))
    assert f"{100 * cut / 8:.3g} % of the answers did not end within the limit" in words


def test_more_answers_than_are_learned_are_told_beforehand(tmp_path, caplog):
    for count, told in ((9, 0), (10, 1)):
        caplog.clear()
        make(tmp_path / str(count), data=rows(count)).train()
        assert caplog.text.count("learns 9 at most. With data.limit: 9") == told


def test_that_most_answers_are_cut_off_is_told_early(tmp_path, caplog, monkeypatch):
    trainer = make(tmp_path, max_completion_length=8, answer_batch_size=2, data=rows(8))
    monkeypatch.setattr("topd.training.warmstart.ENOUGH", 4)
    written = answers_of(trainer, [[], [], [], [5, EOS], [5, EOS], [5, EOS], [5, EOS], [5, EOS]])
    trainer.train()
    assert "3 of the teacher's first 4 answers did not end within 8 tokens" in caplog.text
    assert "enable_thinking: false" in caplog.text
    assert len(written) == 4

    trainer = make(tmp_path / "none", answer_batch_size=2, data=rows(8))
    written = answers_of(trainer, [[]] * 8)
    with pytest.raises(TOPDError, match="none of the teacher's first 4 answers ended"):
        trainer.train()
    assert len(written) == 2  # calls: it stopped half way


def answers_of(trainer: WarmstartTrainer, known: list[list[int]]) -> list[int]:
    """Have the teacher write known answers; returns the sizes of the calls that it gets."""
    calls: list[int] = []

    def answer(prompts, first):
        calls.append(len(prompts))
        return known[first : first + len(prompts)]

    trainer._answer = answer
    return calls


def test_the_teacher_reads_its_own_prompt_to_answer(tmp_path):
    asked: list[tuple[int, ...]] = []
    trainer = make(
        tmp_path, teacher_prompt="{{ solution }} {{ prompt }}", max_completion_length=200
    )
    generate = trainer.observer.teacher.generate

    def spy(prompts, *args, **kwargs):
        asked.extend(prompts)
        return generate(prompts, *args, **kwargs)

    trainer.observer.teacher.generate = spy
    expected = [prompt.teacher for prompt in trainer.train_dataset]
    trainer.train()
    assert asked == expected
    assert all(p.student != p.teacher for p in trainer.train_dataset)


def test_batch_size_does_not_change_the_teachers_answers(tmp_path):
    for size in (1, 3, 8):
        make(tmp_path / str(size), per_device_train_batch_size=size).train()
    assert answers(tmp_path / "1") == answers(tmp_path / "3") == answers(tmp_path / "8")


def test_no_finished_answer_at_all_is_an_error(tmp_path):
    with pytest.raises(TOPDError, match="none of the teacher's 8 answers ended within 1 token"):
        make(tmp_path, max_completion_length=1).train()


# Answers are written once


def refuse_to_answer(trainer: WarmstartTrainer) -> WarmstartTrainer:
    def generate(*_, **__):
        raise AssertionError("the teacher wrote")

    trainer.observer.teacher.generate = generate
    return trainer


def forget_the_run(folder: Path) -> None:
    """Leave the answers only, as an interruption while they are written does."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "answers.jsonl":
            path.unlink()


def test_stored_answers_are_used_again(tmp_path):
    first = make(tmp_path)
    first.train()
    forget_the_run(tmp_path)
    again = refuse_to_answer(make(tmp_path))
    again.train()
    assert again.train_dataset == first.train_dataset


def test_an_interrupted_writing_goes_on_where_it_stopped(tmp_path):
    make(tmp_path).train()
    forget_the_run(tmp_path)
    path = tmp_path / "answers.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for kept in (lines[:1], lines[:5], [lines[0][:9]]):  # the header; four answers too; half of it
        path.write_text("".join(kept))
        make(tmp_path).train()
        assert path.read_text() == whole
        forget_the_run(tmp_path)


@pytest.mark.parametrize("lost", [4, 8])
def test_a_line_cut_short_by_a_crash_is_written_again(tmp_path, lost):
    make(tmp_path).train()
    forget_the_run(tmp_path)
    path = tmp_path / "answers.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-lost])
    make(tmp_path).train()
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.9}, {"data": rows(7)}, {"seed": 7}, {"teacher": tiny_model(seed=5)}],
    ids=lambda change: next(iter(change)),
)
def test_answers_made_otherwise_are_not_used_again(tmp_path, change):
    make(tmp_path).train()
    forget_the_run(tmp_path)
    options = dict(change)
    models = [tiny_model("llama", seed=0), options.pop("teacher", tiny_model("qwen3", seed=1))]
    with pytest.raises(TOPDError, match=r"answers\.jsonl"):
        make(tmp_path, *models, **options).train()


@pytest.mark.parametrize("content", ['{"q": "mine"}\n{"q": "cut', "one line"])
def test_a_file_of_that_name_that_is_not_ours_is_not_cut(tmp_path, content):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(TOPDError, match=r"answers\.jsonl: holds answers to other prompts"):
        make(tmp_path).train()
    assert (tmp_path / "answers.jsonl").read_text() == content


@pytest.mark.parametrize("content", ["", "[1, 2]\n", '{"prompts": "of others"}\n[1]\n'])
def test_a_file_that_has_not_the_answers_is_refused(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(TOPDError, match=r"other\.jsonl does not answer these"):
        make(tmp_path / "run", answers=str(path)).train()


def test_a_warm_start_takes_no_method_that_looks_ahead(tmp_path):
    with pytest.raises(TOPDError, match="a warm start takes opd"):
        make(tmp_path, method="topd")


@pytest.mark.parametrize("name", OF_ROLLOUTS)
def test_what_is_said_of_the_students_own_samples_is_refused(name):
    """Their defaults are not: a configuration that is read back has them all."""
    words = {"solver": "sinkhorn", "embedding": "student", "candidate_loss": "surprise"}
    words |= {"trajectory_reduction": "sum", "overlap": True}
    number = 0.5 if name in ("candidate_fraction", "false_alarm_share") else 7
    WarmstartConfig(output_dir="unused", use_cpu=True, **{name: getattr(WarmstartConfig, name)})
    with pytest.raises(TOPDError, match=f"{name}: has no effect"):
        WarmstartConfig(output_dir="unused", use_cpu=True, **{name: words.get(name, number)})


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_how_the_teacher_writes_is_refused_where_the_data_has_the_answers(name):
    options = {"output_dir": "unused", "use_cpu": True, name: 1.0 if name == "top_p" else 7}
    WarmstartConfig(**options)
    with pytest.raises(TOPDError, match=f"{name}: has no effect with answers: data"):
        WarmstartConfig(**options, answers="data")


# Both stages, from nothing. Over six seeds the reverse KL fell to 0.40-0.48 of what it was in the
# warm start, then to 0.41-0.54 of that by OPD and by TOPD.


def sums() -> list[dict[str, str]]:
    return [
        {
            "prompt": f"what is {a} + {b} ?",
            "solution": f"first take {a} then add {b} so the sum is {a + b} . "
            f"the answer is {a + b} .",
        }
        for a in range(5)
        for b in range(5)
    ]


def learner(seed: int) -> PreTrainedModel:
    return tiny_model("llama", seed=seed, vocab=len(WORDS), initializer_range=0.1)


def stage(kind: type[TOPDTrainer], folder: Path, student, teacher, **options) -> Path:
    """Run one stage on the sums; the folder of its student."""
    args = {
        **SMALL,
        "per_device_train_batch_size": 25,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        **options,
    }
    config = WarmstartConfig if kind is WarmstartTrainer else TOPDConfig
    trainer = kind(
        student,
        teacher,
        config(output_dir=str(folder), **args),
        train_dataset=sums(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return folder / "student"


def reverse_kl(folder: Path, student: Path, teacher: Path) -> float:
    """Of 50 fresh rollouts, the same seeds for every student; nats a token."""

    def once(seed: int) -> float:
        trainer = TOPDTrainer(
            str(student),
            str(teacher),
            TOPDConfig(
                output_dir=str(folder),
                seed=seed,
                max_completion_length=24,
                per_device_eval_batch_size=25,
                use_cpu=USE_CPU,
                disable_tqdm=True,
            ),
            eval_dataset=sums(),
        )
        return trainer.evaluate()["eval_loss"]

    return fmean(once(seed) for seed in (7, 8))


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> tuple[Path, Path, float]:
    """A teacher that knows the sums, a student warmed up by it, and the student's reverse KL."""
    folder = tmp_path_factory.mktemp("stages")
    teacher = stage(
        WarmstartTrainer,
        folder / "teacher",
        learner(1),
        learner(2),
        answers="data",
        kd_ratio=0.0,
        max_steps=50,
    )
    raw = folder / "raw"
    learner(3).save_pretrained(raw)
    tiny_tokenizer().save_pretrained(raw)
    warm = stage(
        WarmstartTrainer,
        folder / "warm",
        str(raw),
        str(teacher),
        max_steps=12,
        temperature=1.0,
        top_p=1.0,
    )
    before, after = (reverse_kl(folder / "eval", s, teacher) for s in (raw, warm))
    assert after < 0.6 * before
    return teacher, warm, after


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_after_a_warm_start_the_second_stage_nears_the_teacher(tmp_path, taught, method):
    teacher, warm, before = taught
    student = stage(
        TOPDTrainer,
        tmp_path / method,
        str(warm),
        str(teacher),
        method=method,
        max_steps=12,
        learning_rate=5e-3,
        window_length=6,
        candidate_fraction=0.1,
    )
    assert reverse_kl(tmp_path / "eval", student, teacher) < 0.65 * before
