"""What ``topd repair`` does: its settings, and what of them is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from topd.commands.session import AnalysisConfig
from topd.config import _field
from topd.config.rules import check_learns
from topd.errors import TOPDError
from topd.methods import METHODS, Method
from topd.named import row_named

TRIED = ("opd", "topd", "window_sft", "window_kd", "first_fork")  # unless others are asked for
OF_FALSE_ALARMS = ("downweight", "downweight_matched")
LOSS = ("beta", "trajectory_weight", "trajectory_reduction")  # settings that the loss reads


@dataclass
class RepairConfig(AnalysisConfig):
    """What a repair does: TOPDConfig's rollouts, windows, transport and optimiser, and these."""

    samples: int = _field(200, "Prefixes, each with one real divergent point.")
    updates: int = _field(5, "M, updates with each method on a prefix.")
    methods: tuple[str, ...] | str | None = _field(
        None, f"What is tried: methods, my_module:function too; none: {', '.join(TRIED)}."
    )

    def _check(self) -> None:
        super()._check()
        self._at_least_1("samples", "updates")
        if self.fp16:
            raise TOPDError(
                "fp16: a repair does not scale its loss, so small gradients would be lost. Set "
                "bf16: true, or leave it out (--fp16 false)."
            )
        for k, name in enumerate(self.method_names):
            row_named("methods", name, METHODS, Method)
            if name in self.method_names[:k]:
                raise TOPDError(f"methods: {name} is there twice. Name it once.")
            self._check_method(name)

    def _check_method(self, name: str) -> None:
        """What would leave a method's student as it was, or treat it as another's."""
        if name in OF_FALSE_ALARMS:
            raise TOPDError(
                f"methods: {name} holds down the loss of false alarms, and a fork of a repair is "
                "real: it would be opd. Leave it out."
            )
        try:
            check_learns(name, self.token_loss, self.loss_of(name).trajectory_weight)
        except TOPDError as error:
            raise TOPDError(
                f"methods: {error} Those to try are named in methods, e.g. [topd, window_sft]."
            ) from error

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods to try, in order."""
        return (self.methods,) if isinstance(self.methods, str) else tuple(self.methods or TRIED)

    @property
    def ahead(self) -> int:
        """With what the student writes after a window for a method."""
        tried = (self.method_of(name).beyond(self.length) for name in self.method_names)
        return max(self.length, *tried)

    def method_of(self, name: str) -> Method:
        """A method by its name; with ``method_options`` if it is ``method`` itself."""
        if name == self.method:
            return self.guidance_method()
        return row_named("methods", name, METHODS, Method)

    def loss_of(self, name: str) -> RepairConfig:
        """These arguments with the loss that training with a method has by default.

        Its own settings, or those of the class, hold where nothing was given; the rollout is the
        student's own, so no importance is weighed.
        """
        own, settings = copy.copy(self), self.method_of(name).settings
        for key in LOSS:
            if key not in self._given:
                setattr(own, key, settings.get(key, getattr(RepairConfig, key)))
        own.overlap = False
        return own
