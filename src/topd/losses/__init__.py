"""Token divergences and the trajectory loss: pure functions of tensors, in nats.

Notation: p_S is the student's next-token distribution, p_T the teacher's, both of
softmax(logits / temperature). Gradients flow to whatever requires them.
"""

from topd.losses.dense import (
    sampled_divergence,
    soft_target_kl,
    token_divergence,
    topk_divergence,
    trajectory_loss,
)
from topd.losses.linear import (
    linear_logprobs,
    linear_token_divergence,
    linear_token_statistics,
    linear_token_terms,
)
from topd.losses.terms import Kind, TokenTerms, Upstream, importance

__all__ = [
    "Kind",
    "TokenTerms",
    "Upstream",
    "importance",
    "linear_logprobs",
    "linear_token_divergence",
    "linear_token_statistics",
    "linear_token_terms",
    "sampled_divergence",
    "soft_target_kl",
    "token_divergence",
    "topk_divergence",
    "trajectory_loss",
]
