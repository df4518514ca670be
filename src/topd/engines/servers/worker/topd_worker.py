"""What a vLLM worker of ours can do besides: take new weights from a folder.

For ``--worker-extension-cls topd_worker.Weights``. Runs in vLLM's environment, which has no topd.
"""

from __future__ import annotations

from typing import Any


class Weights:
    """Mixed into vLLM's worker class, whose methods are at hand."""

    def take_weights(self: Any, folder: str) -> None:
        """Load the weights of a folder in the place of those that are served.

        vLLM's own reload forgets what a CPU's kernels have packed: of a head that is tied to the
        embeddings the old copy would stay, and experts would be read as if they were packed.
        """
        self.reload_weights(weights_path=folder)
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
            experts = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if experts is not None and module.w13_weight.device.type == "cpu":
                experts.fused_experts.process_weights_after_loading(module)
