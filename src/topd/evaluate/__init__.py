"""Evaluation: verified answers, greedy and sampled, with intervals over problems."""

from topd.evaluate.answers import AnswerVerifier, Verify
from topd.evaluate.callback import EvaluationCallback
from topd.evaluate.evaluation import Evaluation, Evaluator, Response, summarise
from topd.statistics import Interval, bootstrap, paired_bootstrap, pass_at_k, seed_problem_interval

__all__ = [
    "AnswerVerifier",
    "Evaluation",
    "EvaluationCallback",
    "Evaluator",
    "Interval",
    "Response",
    "Verify",
    "bootstrap",
    "paired_bootstrap",
    "pass_at_k",
    "seed_problem_interval",
    "summarise",
]
