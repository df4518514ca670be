"""What a vLLM worker of ours can do besides: take new weights from a folder.

For ``--worker-extension-cls topd_worker.Weights``. Runs in vLLM's environment, which has no topd.
"""

from __future__ import annotations

from typing import Any


class Weights:
    """Mixed into vLLM's worker class, whose methods are at hand."""

    def take_weights(self: Any, folder: str) -> None:
        """Load the weights of a folder in the place of those that are served.

        vLLM's own reload forgets a head that is tied to the embeddings where its kernel has packed
        a copy of it, as on a CPU: the old head would stay.
        """
        self.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
