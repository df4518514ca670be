"""A student in training whose rollouts vLLM servers write, with the current weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from safetensors import SafetensorError
from transformers import PreTrainedModel

from topd.engines import Tick, no_tick
from topd.engines.base import Options, check_seeds
from topd.engines.hf import HFEngine
from topd.engines.servers import Servers
from topd.engines.servers.checks import agree, whole_logprobs
from topd.engines.servers.vllm import Completions
from topd.errors import DISK, StoppedError, TOPDError
from topd.inputs.models.adapters import merged
from topd.inputs.models.fingerprints import trained_digest
from topd.inputs.served import ServedSpec
from topd.types import Generation, Ids, Sampling, Texts


class ServedStudent(HFEngine):
    """A model in training, whose responses its vLLM servers write with the current weights.

    The weights go into the folder ``served.weights`` whenever they have changed; the servers pause,
    load them, forget what they have cached, and are asked for the log-probs of a probe, which must
    be those of this process. All else is done here.

    Args:
        model: the student.
        served: where its servers are; started by ``topd serve-student``.
        probe: token ids of a text.
        unshared: ids of tokens that not all models have: its servers do not sample them.
        eos_ids, vocab_size, allowed, name, autocast: as in BaseEngine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        served: ServedSpec,
        probe: Ids,
        unshared: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, **options)
        servers = Servers(f"{self.name} (rollouts)", served.completions, served)
        self.completions = Completions(servers, self, unshared)
        self.probe, self._served_digest = probe, ""
        self.held = False  # write with the weights that the servers have

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`.

        Raises TOPDError if a server has not the current weights, StoppedError if none is left.
        """
        check_seeds(seeds, prompts)
        if not self.held:
            self.sync()
        return self.completions.write_each(prompts, sampling, seeds)

    def sync(self) -> None:
        """Give the servers the current weights, if they have others. Raises as ``generate``."""
        digest = trained_digest(self.model)
        if digest != self._served_digest:
            self._send(digest)
            self._served_digest = digest

    def _send(self, digest: str) -> None:
        """Give the servers the current weights. On an error they stay paused: nobody is misled."""
        servers = self.completions.servers
        assert isinstance(servers.served, ServedSpec)
        place = Path(servers.served.weights or "").absolute() / digest[:16]
        whole = merged(self.model)
        if _ties(whole) != _ties(self.model):  # at first they are equal: the probe sees nothing
            raise TOPDError(
                "student.served: the adapter changes one of two tied embeddings, so the model has "
                "a head of its own, and servers would tie it again. Leave embeddings and head out "
                "of lora.target_modules and lora.modules_to_save, or leave student.served out."
            )
        try:
            whole.save_pretrained(place)
        except (OSError, SafetensorError) as error:
            raise StoppedError(
                f"student.served.weights: {place} cannot be written ({error}). Choose a folder "
                "with room for the weights; a run that was under way continues with "
                "resume_from_checkpoint: last.",
                DISK,
            ) from error
        try:
            servers.post_to_each("/pause?mode=wait")
            servers.post_to_each(
                "/collective_rpc", {"method": "take_weights", "args": [str(place)]}
            )
            servers.post_to_each("/reset_prefix_cache")
            servers.post_to_each("/resume")
        finally:
            shutil.rmtree(place)
        self._check_weights()

    def _check_weights(self) -> None:
        (states,) = self.score([self.probe[:1]], [self.probe[1:]]).hidden
        ours = whole_logprobs(self, states, self.probe[1:])
        for completions in self.completions.alone():
            (theirs,) = completions.read([self.probe])
            agree(
                completions.servers,
                f"{completions.servers.urls[0]} with the weights that it was given",
                theirs,
                "the student in training",
                ours,
                "The servers must load what they are told: start them with topd serve-student, of "
                "this version, and share the folder student.served.weights.",
            )


def _ties(model: PreTrainedModel) -> bool:
    """Whether a model's configuration says that its head is its embeddings."""
    return bool(model.config.get_text_config().tie_word_embeddings)
