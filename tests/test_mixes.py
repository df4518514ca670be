"""Whose text an update learns: the teacher's answers (GKD), earlier windows, and until when."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench.controls import SURE, _rl, true_fork
from bench.larger import perplexity
from bench.world import right, verdict

from conftest import rows, tiny_tokenizer, write_pair
from conftest import torch_on_device as torch
from test_methods import no_windows
from test_trainer import SMALL, dense_divergence, lines, make, run, student, updates
from topd import TOPDConfig, TOPDTrainer
from topd.commands.audit import audit_run
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.statistics import stopped_falling
from topd.testbed import FAMILIES, problems
from topd.testbed.arithmetic import value
from topd.testbed.guesses import answer
from topd.testbed.models import AUTHORS, tokenizer_of
from topd.testbed.world import labels, write
from topd.training.metrics import Means
from topd.training.replay import EarlierWindows
from topd.types import Prompt, Rollout, TokenScores

SPENT = ("student_written", "teacher_written", "teacher_read")

# The teacher's own responses


def test_a_share_of_nothing_is_opd_bit_for_bit(tmp_path):
    plain = run(tmp_path / "plain", method="opd", max_steps=2)
    mixed = run(tmp_path / "mixed", method="opd", max_steps=2, teacher_share=0.0)
    assert plain.rollouts == mixed.rollouts
    torch.testing.assert_close(mixed.weights, plain.weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, []), (0.5, [1, 3, 5]), (0.25, [3]), (1.0, [*range(6)])]
)
def test_the_teachers_updates_are_spread_evenly(share, expected):
    args = TOPDConfig(output_dir="unused", teacher_share=share, use_cpu=True)
    assert [step for step in range(6) if args.teacher_writes(step)] == expected


@pytest.mark.parametrize("kind", ["sampled", "none"])
def test_the_teachers_updates_need_its_distributions(kind):
    options = {"method": "topd", "token_loss": kind, "teacher_share": 0.5}
    with pytest.raises(TOPDError, match=r"teacher_share: with token_loss: .* nothing is learned"):
        TOPDConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize("change", [{"token_loss": "sampled"}, {"logging_strategy": "no"}])
def test_what_ends_looking_ahead_by_logs_needs_logs_of_the_divergence(change):
    options = {"method": "topd", "look_ahead_until": "auto", **change}
    with pytest.raises(TOPDError, match="auto goes by the divergence of each log"):
        TOPDConfig(output_dir="unused", use_cpu=True, **options)


def test_every_second_update_is_plain_distillation_on_what_the_teacher_wrote(tmp_path):
    trainer = make(tmp_path, method="topd", max_steps=4, teacher_share=0.5)
    trainer.train()
    logs = updates(lines(tmp_path, "metrics"))
    assert [log["tokens/student_written"] > 0 for log in logs] == [True, False, True, False]
    assert [log["topd/candidates"] > 0 for log in logs] == [True, False, True, False]
    for step in (1, 3):
        records = [r for r in lines(tmp_path, "rollouts") if r["step"] == step]
        length = sum(len(r["response_ids"]) for r in records)
        assert logs[step]["tokens/teacher_written"] == length
        assert not any(r["logprobs"] for r in records)
        prompts = [tuple(r["teacher_prompt_ids"]) for r in records]
        greedy = trainer.observer.teacher.generate(
            prompts, trainer.args.window_sampling(trainer.args.max_completion_length), [0] * 8
        )
        assert [tuple(r["response_ids"]) for r in records] == [g.tokens for g in greedy]


def test_the_loss_on_the_teachers_text_is_the_divergence_there(tmp_path):
    trainer = make(tmp_path, method="opd", teacher_share=1.0)
    seen = trainer.observer.observe(trainer.train_dataset, step=0, teacher_writes=True)
    whole = torch.cat([dense_divergence(trainer, rollout) for rollout in seen.rollouts])
    trainer.train()
    (log,) = updates(lines(tmp_path, "metrics"))
    assert log["loss"] == pytest.approx(whole.mean().item(), rel=1e-4)


def test_a_run_that_the_teacher_wrote_in_is_audited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {**SMALL, "max_steps": 4, "output_dir": "run", "teacher_share": 0.5}
    run_recipe(write_pair(tmp_path, **keys), quiet=True)
    assert audit_run(Path("run"), updates=4).faults == []


# What an update spends


@pytest.mark.parametrize(
    "options",
    [
        {"method": "topd", "candidate_loss": "rewritten"},
        {"method": "relay", "method_options": {"tokens": 3}, "false_alarm_share": 0.0},
        {"method": "olive", "false_alarm_share": 0.0, "window_length": 8},  # rollouts are cut off
        {"method": "relay", "window_rejoin": 2, "false_alarm_share": 0.0},
    ],
)
def test_every_token_that_the_engines_write_and_read_is_counted(tmp_path, monkeypatch, options):
    trainer, counts = make(tmp_path, **options), dict.fromkeys(SPENT, 0)
    student, teacher = trainer.observer.student, trainer.observer.teacher

    def count(engine, name, key, tokens):
        call = getattr(engine, name)

        def counted(*args, **kwargs):
            found = call(*args, **kwargs)
            counts[key] += tokens(args, found)
            return found

        monkeypatch.setattr(engine, name, counted)

    def written(_, found):
        return sum(len(one.tokens) for one in found)

    count(student, "generate", "student_written", written)
    count(teacher, "continue_from", "teacher_written", written)
    count(teacher, "score", "teacher_read", lambda args, _: sum(map(len, args[0] + args[1])))
    trainer.train()
    (log,) = updates(lines(tmp_path, "metrics"))
    assert {key: log[f"tokens/{key}"] for key in SPENT} == counts
    assert min(counts.values()) > 0


# Earlier windows


FORK = {"method": "window_kd", "trajectory_weight": 0.7, "false_alarm_share": 0.0}


def test_a_window_of_before_is_learned_as_if_it_were_new(tmp_path):
    """The same windows once more: as many guided tokens again, the mean of L_traj as it was."""
    trainer = make(tmp_path, **FORK, window_replay=1000)
    store = EarlierWindows(1000, seed=0)
    seen = trainer.observer.observe(trainer.train_dataset, step=0)
    means = Means()
    assert store.with_earlier(seen, 0, means) is seen
    again = store.with_earlier(seen, 1, means)
    assert sum(g.guided for g in again.guidance) == 2 * sum(g.guided for g in seen.guidance) > 0
    alone = again.rollouts[len(seen.rollouts) :]
    read = sum(len(r.prompt.student) for r in alone) + sum(g.guided for g in seen.guidance)
    means.add("tokens/learned", 0, 1)
    assert means.take() == {"tokens/learned": read}
    losses = []
    for experience in (seen, again):
        batches = trainer._collated(experience, [4, 4])
        losses.append(sum(trainer.compute_loss(trainer.model, b) for b in batches).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_so_many_are_drawn_of_all_before(tmp_path):
    trainer = make(tmp_path, **FORK, window_replay=3)
    seen = trainer.observer.observe(trainer.train_dataset, step=0)
    drawn = []
    for seed in (0, 0, 1):
        store = EarlierWindows(3, seed)
        store.with_earlier(seen, 0, Means())
        drawn.append(store.with_earlier(seen, 1, Means()).rollouts[len(seen.rollouts) :])
    assert len(drawn[0]) == 3
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_read_again_is_counted_and_no_log_prob_is_missed(tmp_path):
    plain = run(tmp_path / "plain", **FORK, max_steps=2)
    again = run(tmp_path / "again", **FORK, max_steps=2, window_replay=4)
    one, other = (updates(r.logs) for r in (plain, again))
    assert one[0] == other[0]
    assert other[1]["tokens/learned"] > one[1]["tokens/learned"]
    assert other[1]["tokens/teacher_written"] == one[1]["tokens/teacher_written"]


def test_windows_are_not_in_a_checkpoint():
    with pytest.raises(TOPDError, match="window_replay: a checkpoint"):
        TOPDConfig(
            output_dir="unused", **FORK, window_replay=4, save_strategy="steps", use_cpu=True
        )


@pytest.mark.parametrize("method", ["opd", "eopd"])
def test_a_method_that_does_not_look_ahead_has_no_windows_to_learn_again(method):
    """eopd marks text of the rollouts, which another update is not to learn."""
    args = {"output_dir": "unused", "save_strategy": "no", "use_cpu": True, "method": method}
    with pytest.raises(TOPDError, match=f"window_replay: {method} does not look ahead"):
        TOPDConfig(**args, window_replay=4)


def test_a_teacher_that_changes_has_no_windows_of_before(tmp_path):
    with pytest.raises(TOPDError, match="window_replay: keeps the states"):
        TOPDTrainer(
            student(),
            "self",
            TOPDConfig(
                output_dir=str(tmp_path),
                **{**SMALL, **FORK},
                window_replay=4,
                teacher_prompt="{{ prompt }} a",
            ),
            train_dataset=rows(),
            processing_class=tiny_tokenizer(),
        )


# Until when


def test_looking_ahead_ends_for_good_when_the_divergence_stops_falling():
    falling = [3.0 - 0.1 * i for i in range(25)]
    assert not stopped_falling(falling)
    assert stopped_falling([*falling, *[0.6] * 15, *falling])
    args = TOPDConfig(output_dir="unused", method="topd", look_ahead_until="auto", use_cpu=True)
    args.count_updates(100)
    assert args.looks_ahead(30, falling)
    assert not args.looks_ahead(30, [1.0] * 30)


def test_a_trainer_goes_by_what_it_has_logged(tmp_path, monkeypatch):
    """Ended after two updates, whatever was logged."""
    seen = []

    def after_two(values):
        seen.append(list(values))
        return len(values) >= 2

    monkeypatch.setattr("topd.config.stopped_falling", after_two)
    trainer = make(tmp_path, method="topd", max_steps=4, look_ahead_until="auto")
    trainer.train()
    logs = updates(lines(tmp_path, "metrics"))
    assert [log["topd/candidates"] > 0 for log in logs] == [True, True, False, False]
    assert seen[-1] == [log["reverse_kl"] for log in logs[:3]]


# Controls of the testbed


def ids_of(texts: list[str]) -> list[tuple[int, ...]]:
    tokenizer = tokenizer_of(FAMILIES["arithmetic"])
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def test_the_oracle_is_sure_of_the_labelled_fork_and_of_nothing_else():
    """A right answer has no fork; with one digit changed, that is the fork."""
    family, (text,) = FAMILIES["arithmetic"], problems("arithmetic", "validation", 1)
    words = write(family, text, AUTHORS["teacher"], random.Random(1)).split()
    while labels(family, text, words).count("fork"):
        words = write(family, text, AUTHORS["teacher"], random.Random(len(words))).split()
    place = max(t for t, word in enumerate(words) if word.isdigit())
    wrong = [*words]
    wrong[place] = str((int(words[place]) + 1) % 10)
    rows = torch.tensor(ids_of([" ".join(words), " ".join(wrong)]))
    zeros = torch.zeros(rows.shape)
    tokens = TokenScores(rows, rows >= 0, zeros, zeros, rows, prompts=tuple(ids_of([text] * 2)))
    found = true_fork(tokens, family="arithmetic")
    assert found.nonzero().tolist() == [[1, place]]
    assert float(found.max()) == SURE


def test_the_reward_is_what_a_rollout_has_above_the_others_of_its_prompt():
    """Right, wrong, wrong and wrong: 3/4 and three times -1/4; a lone rollout has no others."""
    family, texts = FAMILIES["arithmetic"], problems("arithmetic", "validation", 2)
    right = [value(text) for text in texts]
    wrong = str((int(right[0]) + 1) % 10)
    answers = [f"answer {x}" for x in (right[0], wrong, wrong, wrong, right[1])]
    prompts = [Prompt(i, ids, ids) for i, ids in enumerate(ids_of(list(texts)))]
    rollouts = tuple(
        Rollout(prompts[i // 4], ids, (-1.0,) * len(ids), True)
        for i, ids in enumerate(ids_of(answers))
    )
    assert family.check(texts[0], answers[0])
    seen = replace(no_windows(), rollouts=rollouts)
    guidance = _rl(seen, family="arithmetic")
    assert [guide.advantages[0] for guide in guidance] == [0.75, -0.25, -0.25, -0.25, 0.0]
    assert all(set(guide.weights) == {0.0} for guide in guidance)
    beside = _rl(seen, family="arithmetic", distil=1.0)
    assert [guide.advantages for guide in beside] == [guide.advantages for guide in guidance]
    assert all(set(guide.weights) == {1.0} for guide in beside)


@pytest.mark.parametrize(
    ("short", "long", "teacher", "enough"),
    [(0.6, 0.61, 0.9, False), (0.6, 0.7, 0.9, True), (0.8, 0.81, 0.9, True)],
)
def test_imitation_is_not_enough_only_at_a_plateau_far_under_the_teacher(
    short, long, teacher, enough
):
    greedy = {"100 at 0.001": short, "100 at 0.002": short - 0.1, "200 at 0.001": long}
    found = verdict(greedy, [100, 200], {"max_steps": 100}, teacher)
    assert (found["under"], found["adds"]) == pytest.approx((teacher - short, long - short))
    assert found["imitation_is_enough"] is enough
    last = verdict(greedy, [100, 200], {"max_steps": 200}, teacher)
    assert last["imitation_is_enough"] is None


def test_the_share_of_right_answers_of_a_teacher_that_is_told(tmp_path):
    """A third of them, each to the prompt in its place."""
    tokenizer, prompts = tokenizer_of(FAMILIES["guesses"]), problems("guesses", "train", 6000)
    texts = [f"; answer {answer(p) if n % 3 == 0 else 9}" for n, p in enumerate(prompts)]
    ids = [tokenizer(f"{text} </s>")["input_ids"] for text in texts]
    lines = "\n".join(json.dumps(line) for line in [{}, *ids])
    (tmp_path / "answers.jsonl").write_text(lines)
    lucky = sum(answer(p) == "9" for n, p in enumerate(prompts) if n % 3)
    found = right("guesses", tmp_path / "answers.jsonl")
    assert found == pytest.approx((2000 + lucky) / 6000)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    class Knows:
        device = "cpu"

        def __call__(self, input_ids):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    assert perplexity(Knows(), tokenizer_of(FAMILIES["arithmetic"])) == pytest.approx(50)
