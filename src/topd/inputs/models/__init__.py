"""Loading models and tokenizers, each from where its spec says."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from pydantic import ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from topd.errors import TOPDError
from topd.inputs.models.adapters import refuse_other_folder
from topd.inputs.models.bare import named_faults
from topd.inputs.models.gguf_files import parsed_once, unchanged
from topd.inputs.models.positions import rope_switch
from topd.inputs.models.saved import check_complete, remake_buffers
from topd.inputs.models.vocabulary import check_vocabulary
from topd.inputs.served import ByText, ServedSpec
from topd.testbed import SCHEME, weights_of

PACKAGE = "package://"
_UNREADABLE = (  # how libraries say that what is in a folder is not a model, or not a tokenizer
    *(OSError, ValueError, ImportError, LookupError, RuntimeError, SafetensorError),
    *(AttributeError, TypeError, AssertionError, ArithmeticError, StrictDataclassError),
)
_CONFIGS: dict[tuple[Any, ...], PretrainedConfig] = {}  # of GGUF files, which are slow to parse


class ModelSpec(ByText):
    """Where a model comes from.

    ``path`` is a folder, a hub name, ``package://NAME`` for the folder of an installed Python
    package, or ``testbed://FAMILY/ROLE``. ``gguf_file`` names a GGUF file in it, whose weights are
    dequantised. ``tokenizer`` says where its tokenizer and chat template are, if not with it: a
    path, or ``teacher`` in a student's spec. ``chat_template`` is a Jinja template, or a file that
    ends in ``.jinja``. ``eos_token`` replaces the tokenizer's end-of-sequence token; of several,
    the first does, and all end a response. Weights are read from safetensors or GGUF, never from a
    pickle; code of a model repository runs only with ``trust_remote_code``. ``served`` says where
    vLLM serves it. For ``text`` and ``as_text`` see :class:`~topd.inputs.served.ByText`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    tokenizer: str | ModelSpec | None = None
    chat_template: str | None = None
    eos_token: str | tuple[str, ...] | None = None
    trust_remote_code: bool = False
    served: ServedSpec | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _named_dtype(cls, dtype: Any) -> Any:
        """That of torch too, as transformers takes it."""
        return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype

    @property
    def place(self) -> str:
        """The path, with ``package://`` resolved; the package is not imported."""
        if self.path.startswith(SCHEME):
            return str(weights_of(self.path))
        if not self.path.startswith(PACKAGE):
            return str(Path(self.path).expanduser()) if self.path.startswith("~") else self.path
        name = self.path.removeprefix(PACKAGE)
        try:
            # a dotted name would import the package above it
            found = None if "." in name else importlib.util.find_spec(name)
        except (ImportError, ValueError):  # no name
            found = None
        if found is None or not found.submodule_search_locations:
            raise TOPDError(
                f"model {self.path}: no Python package {name!r} is installed. "
                f"pip install {name.replace('_', '-')}."
            )
        return found.submodule_search_locations[0]

    def _load(self, auto: Any, what: str, **options: Any) -> Any:
        place = self.place
        refuse_other_folder(self.path, place)
        given = {"gguf_file": self.gguf_file, "revision": self.revision}
        options |= {name: value for name, value in given.items() if value}
        options["trust_remote_code"] = self.trust_remote_code  # None would ask
        try:
            with parsed_once() if self.gguf_file else nullcontext(), named_faults():
                return auto.from_pretrained(place, **options)
        except _UNREADABLE as error:
            raise TOPDError(
                f"model {self.path}: its {what} cannot be loaded. Check the path, or the network "
                f"for a hub name. {type(error).__name__}: {error}"
            ) from error

    def load_config(self) -> PretrainedConfig:
        """The configuration alone. Raises TOPDError if it cannot be found."""
        if not self.gguf_file:
            config = self._load(AutoConfig, "configuration")
            self._check_causal(config)
            return config
        key = (self.model_dump_json(), *unchanged(Path(self.place) / self.gguf_file))
        if key not in _CONFIGS:
            _CONFIGS[key] = self._load(AutoConfig, "configuration")
        return copy.deepcopy(_CONFIGS[key])

    def _check_causal(self, config: PretrainedConfig) -> None:
        """Refuse what transformers has no causal language model for. Raises TOPDError."""
        known = type(config) in AutoModelForCausalLM._model_mapping
        if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
            raise TOPDError(
                f"model {self.path}: transformers has no causal language model of text for "
                f"{config.model_type!r}. Choose a checkpoint that has one: the text-only model of "
                "the family, if this one reads images or sound."
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a padding token. Raises TOPDError if it cannot be found."""
        tokenizer = self._own_tokenizer() if self.tokenizer is None else self._lent_tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = self._template()
        ends = self._ends(tokenizer)
        if ends:
            tokenizer.eos_token = ends[0]
        if tokenizer.eos_token is None:
            raise TOPDError(f"model {self.path}: no end-of-sequence token. Set eos_token.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up for want of files
            raise TOPDError(f"model {self.path}: its tokenizer cannot be loaded: no files there.")
        try:
            with named_faults():
                tokenizer("")
        except _UNREADABLE as error:
            raise TOPDError(
                f"model {self.path}: its tokenizer cannot be used ({type(error).__name__}: "
                f"{error}). Correct its tokenizer_config.json."
            ) from error
        return tokenizer

    def _lent_tokenizer(self) -> PreTrainedTokenizerBase:
        """That of another model, after a look at the model's own, if there is one."""
        if self.tokenizer == "teacher":
            raise TOPDError(
                f"model {self.path}: tokenizer: teacher is for a student whose teacher is a path. "
                "Give the path of a tokenizer."
            )
        assert self.tokenizer is not None
        lent = as_spec(self.tokenizer).load_tokenizer()
        try:
            own = self._own_tokenizer()
        except TOPDError:
            return lent
        check_vocabulary(own, lent)
        return lent

    def with_tokenizer_of(self, teacher: ModelSpec) -> ModelSpec:
        """The same, where it says ``tokenizer: teacher`` with that teacher named there."""
        if self.tokenizer != "teacher":
            return self
        return self.model_copy(update={"tokenizer": teacher})

    def _template(self) -> str:
        assert self.chat_template is not None
        if not self.chat_template.endswith(".jinja"):
            return self.chat_template
        try:
            return Path(self.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TOPDError(
                f"model {self.path}: chat_template {self.chat_template} cannot be read: {error}."
            ) from error

    def _ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The tokens that ``eos_token`` names. Raises TOPDError if one is not in the vocabulary."""
        named = (self.eos_token,) if isinstance(self.eos_token, str) else self.eos_token or ()
        vocabulary = tokenizer.get_vocab()
        for end in named:
            if end not in vocabulary:
                raise TOPDError(f"model {self.path}: eos_token {end!r} is not in its vocabulary.")
        return named

    def load_model(self) -> PreTrainedModel:
        """The causal language model. Raises TOPDError if it cannot be loaded."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "output_loading_info": True}
        if not self.gguf_file:
            options["use_safetensors"] = True  # no pickle
        if self.attn_implementation:
            options["attn_implementation"] = self.attn_implementation
        model, report = self._load(AutoModelForCausalLM, "weights", **options)
        check_complete(self.path, model, report)
        model = remake_buffers(model)
        model = _without_quantisation(model) if self.gguf_file else model
        if isinstance(self.eos_token, tuple):
            tokenizer = self.load_tokenizer()
            ends = tokenizer.convert_tokens_to_ids(list(self._ends(tokenizer)))
            model.generation_config.eos_token_id = ends
        return model

    def load_frame(self) -> PreTrainedModel:
        """What is around the decoder of the model: embeddings, last norm, head; no layer is read.

        Raises TOPDError if they cannot be loaded.
        """
        config = self.load_config()
        text = config.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None):
            text.layer_types = []
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # of the layers that are there and not wanted
        try:
            model, report = self._load(
                AutoModelForCausalLM,
                "head",
                config=config,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                output_loading_info=True,
            )
        finally:
            logging.set_verbosity(verbosity)
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise TOPDError(f"model {self.path}: its weights lack {missing}.")
        return model


LOADED = (PreTrainedModel, PeftModel)
ModelSource: TypeAlias = str | Path | ModelSpec | PreTrainedModel | PeftModel
_SOURCES = 'a path, a transformers model, or a mapping such as {"path": ..., "dtype": "bfloat16"}'


def source_of(name: str, model: ModelSource | Mapping[str, Any]) -> ModelSource:
    """A mapping such as ``{"path": ..., "dtype": "bfloat16"}`` as a ModelSpec; others as they are.

    Raises TOPDError: it is not a source, or the mapping is not a ModelSpec.
    """
    if isinstance(model, (str, Path, ModelSpec, *LOADED)):
        return model
    if not isinstance(model, Mapping):
        kind = type(model).__name__
        raise TOPDError(
            f"{name}: {kind} is no source. Give {_SOURCES}; a model before torch.compile."
        )
    try:
        return ModelSpec.model_validate(dict(model))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TOPDError(f"{name}: {place}: {first['msg']}. Give {_SOURCES}.") from error


def eos_ids(model: ModelSource, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a model's responses, known without its weights, sorted.

    The tokenizer's, which must have one, and those of a spec's ``eos_token``, or else of the
    generation config. Raises TOPDError where there are none, or others than tokens.
    """
    if tokenizer.eos_token_id is None:
        raise TOPDError("processing_class: has no end-of-sequence token. Set its eos_token.")
    named = None if isinstance(model, LOADED) else as_spec(model).eos_token
    if isinstance(named, tuple):  # as in load_model
        listed = tokenizer.convert_tokens_to_ids(list(named))
    else:
        listed = getattr(generation_config_of(model), "eos_token_id", None)
    ends = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    if not all(type(end) is int and end >= 0 for end in ends):
        place = "" if isinstance(model, LOADED) else f" {as_spec(model).path}"
        raise TOPDError(
            f"model{place}: eos_token_id of its generation config must be a token's number, or a "
            f"list of them, not {listed!r}. Correct it."
        )
    return tuple(sorted({tokenizer.eos_token_id, *ends}))


def generation_config_of(model: ModelSource) -> GenerationConfig | None:
    """A model's generation config as it is once loaded, read without its weights.

    Without a file of its own it is made of the configuration, as it always is of GGUF.
    """
    if isinstance(model, LOADED):
        return getattr(model, "generation_config", None)
    if (spec := as_spec(model)).gguf_file:
        return GenerationConfig.from_model_config(spec.load_config())
    read = partial(GenerationConfig.from_pretrained, spec.place, revision=spec.revision or "main")
    try:
        for more in ({}, {"config_file_name": "config.json", "_from_model_config": True}):
            with suppress(OSError):  # as transformers looks for it
                return read(**more)
    except (ValueError, TypeError) as error:
        raise TOPDError(
            f"model {spec.path}: its generation_config.json cannot be used: {error} Correct it."
        ) from error
    return None


def check_context(name: str, model: ModelSource, tokens: int, window: int = 0) -> None:
    """Refuse sequences longer than the model's positions. Raises TOPDError.

    Or than RoPE that depends on the longest row of a batch can tell apart from its mates. Counted
    are the ``tokens`` of prompt and response, and those of a ``window`` after them.
    """
    config = config_of(model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    total = tokens + window
    asked = f"{name}: {counted(window)} make {total} tokens"
    lower = ", max_prompt_length or window_length" if window else " or max_prompt_length"
    remedy = f"Lower max_completion_length{lower}."
    if limit is not None and total > limit:
        raise TOPDError(f"{asked}, the model has {limit} positions. {remedy}")
    switch = rope_switch(config)
    if switch is not None and total > switch:
        raise TOPDError(
            f"{asked}, and behind {switch} the model's RoPE ({config.model_type}, longrope or "
            "dynamic) has other frequencies, for all rows of a batch: what was written before it "
            f"would be scored otherwise after it. {remedy}"
        )


def counted(window: int) -> str:
    """Of what the longest sequence consists, with or without a window after it.

    >>> counted(0)
    'the longest prompt and max_completion_length'
    """
    more = ", max_completion_length and window_length" if window else " and max_completion_length"
    return f"the longest prompt{more}"


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be trained and saved: GGUF models refuse both."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    fresh = type(model).from_pretrained(  # no weight is drawn at random first
        None, config=config, state_dict=model.state_dict(), dtype=model.dtype
    )
    fresh.config._name_or_path = fresh.name_or_path = model.name_or_path
    fresh.generation_config = model.generation_config
    return fresh


def as_spec(model: str | Path | ModelSpec) -> ModelSpec:
    """A path as a spec."""
    return model if isinstance(model, ModelSpec) else ModelSpec(path=str(model))


def tokenizer_of(
    model: ModelSource, *, otherwise: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase:
    """A model's own tokenizer; ``otherwise`` for a model in memory that has none beside it."""
    if not isinstance(model, LOADED):
        return as_spec(model).load_tokenizer()
    path = model.config._name_or_path
    try:
        if path:
            return as_spec(path).load_tokenizer()
    except TOPDError:
        if otherwise is None:
            raise
    if otherwise is None:
        raise TOPDError("processing_class: the model does not say where its tokenizer is. Give it.")
    return otherwise


def config_of(model: ModelSource) -> PretrainedConfig:
    """A model's configuration, read without its weights. Raises TOPDError."""
    if not isinstance(model, LOADED):
        return as_spec(model).load_config()
    quantisation = model.config.to_dict().get("quantization_config") or {}
    if quantisation.get("quant_method") == "gguf":
        raise TOPDError(
            "model: a GGUF model can be neither trained nor saved as it is. Give "
            "topd.inputs.models.ModelSpec(path=..., gguf_file=...) instead."
        )
    return model.config
