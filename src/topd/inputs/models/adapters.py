"""Students with adapters: what can be trained, and the model that an adapter makes of its base."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper, get_pattern_key
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from topd.errors import LIBRARY_FAULTS, TOPDError
from topd.inputs.models.fingerprints import BELOW, model_fingerprint

logger = logging.get_logger(__name__)

ADAPTER = "adapter_config.json"
_WITH_LOSS = ("MONTECLORA", "KASA")  # kinds of LoRA
Model = TypeVar("Model", bound=nn.Module)


def student_of_run(folder: Path) -> Path | None:
    """Where a run folder has its student; None for another folder."""
    student = folder / "student"
    is_run = not (folder / "config.json").exists() and (student / "config.json").exists()
    return student if is_run else None


def refuse_other_folder(path: str, place: str) -> None:
    """Refuse the folder of an adapter, or of a run, where a model is wanted. Raises TOPDError."""
    student = student_of_run(Path(place))
    if student is not None:
        raise TOPDError(f"model {path}: is a run folder. Give its student: {student}.")
    if (Path(place) / "run.json").is_file() and not (Path(place) / "config.json").exists():
        raise TOPDError(
            f"model {path}: is a run folder without a student: the run has not ended, or was one "
            "that makes none. Resume it, or give one of its checkpoints, if they are whole models."
        )
    stored = Path(place) / ADAPTER
    if stored.is_file():
        raise TOPDError(
            f"model {path}: is an adapter ({ADAPTER}), not a model. Merge it into its base and "
            "save that: PeftModel.from_pretrained(base, adapter).merge_and_unload()."
            "save_pretrained(...). Or give a PeftModel in Python, loaded with is_trainable=True."
        )


def try_adapter(config: PretrainedConfig, adapter: PeftConfig, student: object) -> None:
    """Wrap and merge a model without weights as training will. Raises TOPDError if it fails.

    ``student`` is its source; a PeftModel has an adapter already.
    """
    if not isinstance(adapter, LoraConfig) or adapter.peft_type != PeftType.LORA:
        kind = getattr(adapter, "peft_type", f"a {type(adapter).__name__}")
        raise TOPDError(f"peft_config: {kind} is not supported. Give a peft.LoraConfig.")
    _check_numbers(adapter)
    if adapter.init_lora_weights in ("eva", "lora_ga"):
        raise TOPDError(
            f"lora.init_lora_weights: {adapter.init_lora_weights} has no effect here: it needs "
            "texts. Wrap the model first (peft.initialize_lora_eva_weights, or preprocess_loraga "
            "and get_peft_model), and give that without peft_config."
        )
    if adapter.use_qalora:
        raise TOPDError(
            "lora.use_qalora: has no effect on weights that are not quantised, and others cannot "
            "learn here. Leave it out."
        )
    if isinstance(student, PeftModel):
        raise TOPDError(
            f"peft_config: the student is a PeftModel with the adapter {student.active_adapter!r} "
            "already. Leave peft_config out, or merge the adapter first (merge_and_unload)."
        )
    empty = copy.deepcopy(adapter)
    empty.init_lora_weights = True  # pissa and others read weights
    try:
        with torch.device("meta"):
            wrapped = get_peft_model(_without_weights(config, student), empty)
            _check_names(wrapped, adapter)
            _check_head(wrapped)
            check_savable(wrapped)
    except TOPDError:
        raise
    except LIBRARY_FAULTS as error:
        raise _refused(error) from error


def _without_weights(config: PretrainedConfig, student: object) -> PreTrainedModel:
    """A model like the student: of its class, where it is loaded; by code that its spec trusts."""
    own = copy.deepcopy(config)
    if isinstance(student, PreTrainedModel):
        return type(student)._from_config(own)
    trusted, revision = (getattr(student, key, None) for key in ("trust_remote_code", "revision"))
    code = (getattr(own, "auto_map", None) or {}).get("AutoModelForCausalLM")
    where = (
        {"code_revision": revision} if trusted and revision and code and "--" not in code else {}
    )
    return AutoModelForCausalLM.from_config(own, trust_remote_code=bool(trusted), **where)


def _check_numbers(adapter: LoraConfig) -> None:
    """What PEFT takes and could not learn by. Raises TOPDError."""
    if adapter.task_type not in (None, TaskType.CAUSAL_LM):
        raise TOPDError(f"lora.task_type: {adapter.task_type!r} is not CAUSAL_LM. Leave it out.")
    scales = [adapter.lora_alpha, *adapter.alpha_pattern.values()]
    if not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in scales):
        raise TOPDError("lora.lora_alpha: must be finite and above 0: it scales what is learned.")
    if not 0 <= adapter.lora_dropout < 1:
        raise TOPDError(f"lora.lora_dropout: {adapter.lora_dropout} must be in [0, 1).")


def _check_names(wrapped: PeftModel, adapter: LoraConfig) -> None:
    """Refuse names, patterns and tokens that the model does not have. Raises TOPDError."""
    listed = adapter.trainable_token_indices
    rows = wrapped.config.get_text_config().vocab_size
    for tokens in listed.values() if isinstance(listed, dict) else (listed,):
        if tokens == [] or not all(0 <= token < rows for token in tokens or ()):
            raise TOPDError(f"lora.trainable_token_indices: must be tokens from 0 to {rows - 1}.")
    every = [name for name, _ in wrapped.get_base_model().named_modules()]
    plain = [name.replace(".base_layer", "").replace(".modules_to_save.default", "")
             for name in every]  # fmt: skip
    modules = wrapped.base_model.targeted_module_names
    parameters = wrapped.base_model.targeted_parameter_names
    chosen = [*modules, *parameters]
    for key, names, what in (
        ("target_modules", modules, "module"), ("target_parameters", parameters, "parameter"),
        ("modules_to_save", plain, "module"), ("exclude_modules", plain, "module"),
    ):  # fmt: skip
        given = getattr(adapter, key)
        if key == "target_modules":  # without experts that are parameters now: PEFT has moved them
            given = wrapped.peft_config["default"].target_modules
        for end in sorted(given) if isinstance(given, list | set | tuple) else ():
            if not any(f".{name}".endswith(f".{end}") for name in names):
                raise TOPDError(f"lora.{key}: no {what} is named {end!r}. Correct it.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(adapter, key)
        used = {get_pattern_key(patterns, name) for name in chosen}
        unused = [pattern for pattern in patterns if pattern not in used]
        if unused:
            raise TOPDError(
                f"lora.{key}: {unused[0]!r} fits none of the adapted modules, such as {chosen[0]}. "
                "Correct it."
            )


def with_adapter(student: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """The student wrapped in a new adapter. Raises TOPDError."""
    start = getattr(adapter, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        logger.warning(
            f"lora.init_lora_weights: {start} takes from the base what it draws at random, so that "
            "peft does not load adapter/ as it was trained. Use student/, or give pissa."
        )
    below = model_fingerprint(student)["sha256"] if begins_with_base(adapter) else None
    try:
        wrapped = get_peft_model(student, copy.deepcopy(adapter))  # PEFT changes what it is given
    except LIBRARY_FAULTS as error:
        raise _refused(error) from error
    if below is not None:
        setattr(wrapped, BELOW, below)
    return wrapped


def begins_with_base(adapter: PeftConfig) -> bool:
    """Whether an adapter begins with parts of the weights below it, and takes them out there.

    Both are the same everywhere but for rounding, which depends on the machine and its threads.
    """
    return getattr(adapter, "init_lora_weights", None) in ("pissa", "olora")


def _refused(error: Exception) -> TOPDError:
    return TOPDError(f"peft_config (lora in a recipe): {type(error).__name__}: {error}")


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself; of one with an adapter a copy that has it in its weights.

    An adapter or trained tokens on one of two tied embeddings, or others on the other, part them:
    the copy has a head of its own then, and its configuration says so.
    """
    if not isinstance(model, PeftModel):
        return model
    whole = copy.deepcopy(model)
    base = whole.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    inputs, head = map(_below, ends)
    plain = inputs is ends[0] and head is ends[1]
    together = getattr(getattr(ends[1], "token_adapter", None), "tied_adapter", None)
    if head is not None and head.weight is inputs.weight and not (plain or together):
        head.weight = nn.Parameter(inputs.weight.detach().clone())
    alone = whole.merge_and_unload()
    _say_parted(alone)
    return alone


def _below(layer: Any) -> Any:
    """The layer that an adapter is on, or that has trained tokens; another as it is."""
    if isinstance(layer, BaseTunerLayer):
        return layer.get_base_layer()
    return layer.original_module if isinstance(layer, TrainableTokensWrapper) else layer


def _say_parted(model: PreTrainedModel) -> None:
    """Where the head is not the embeddings have the configuration say so: others tie by it."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not inputs.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def check_savable(student: PreTrainedModel | PeftModel) -> None:
    """Refuse a student that would be saved as another model, or not at all. Raises TOPDError.

    Its adapter is merged, and what comes of it is held against a model of its class and
    configuration, without weights: the same parameters, shared by the same layers.
    """
    whole = _merged_on_trial(student) if isinstance(student, PeftModel) else student
    try:
        with torch.device("meta"):
            fresh = type(whole)._from_config(copy.deepcopy(whole.config))
    except LIBRARY_FAULTS as error:
        raise TOPDError(
            f"student: its configuration makes no {type(whole).__name__}, so it could not be "
            f"loaded once it is saved: {error}"
        ) from error
    ours, saved = parts(whole), parts(fresh)
    if ours == saved:
        return
    names = sorted(min(ours.items() ^ saved.items(), key=lambda part: sorted(part[0]))[0])
    raise TOPDError(
        f"student: saved and loaded again it would be another model: {', '.join(names[:2])} is not "
        f"as in a {type(whole).__name__} of its configuration (other parts, shapes or shared "
        "weights). Give the model as transformers makes it; with an adapter "
        "as a PeftModel (peft.get_peft_model), without layer_replication."
    )


def _merged_on_trial(student: PeftModel) -> PreTrainedModel:
    """The model that will be saved; without weights, where its adapter is merged so."""
    _check_kind(student)
    try:
        with torch.device("meta"):
            return merged(hollow(student))
    except LIBRARY_FAULTS:  # VB-LoRA, SHiRA and others need the weights
        try:
            return merged(student)
        except LIBRARY_FAULTS as error:
            raise _refused(error) from error


def _check_kind(student: PeftModel) -> None:
    """Refuse adapters that are more than layers: the layers alone are called here."""
    tuner, config = student.base_model, student.active_peft_config
    own = [name for name in _WITH_LOSS if getattr(config, f"{name.lower()}_config", None)]
    if own or not isinstance(tuner, BaseTuner) or type(tuner).forward is not BaseTuner.forward:
        kind = own[0] if own else config.peft_type.value
        raise TOPDError(
            f"student: adapters of the kind {kind} are not supported: they do more than their "
            "layers do (a loss, virtual tokens, a choice of experts). Give one of LoRA."
        )


def hollow(model: Model) -> Model:
    """The same model without weights: on the meta device, where copies cost nothing."""
    known: dict[int, torch.Tensor] = {}
    for weight in model.parameters():
        empty = weight.detach().to("meta")
        known[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    known.update((id(buffer), buffer.to("meta")) for buffer in model.buffers())
    return copy.deepcopy(model, known)


def parts(model: nn.Module) -> dict[frozenset[str], torch.Size]:
    """The shape of every parameter, by all of its names."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    shapes = {id(weight): weight.shape for weight in model.parameters()}
    return {frozenset(own): shapes[key] for key, own in names.items()}


def _check_head(student: PreTrainedModel | PeftModel) -> None:
    """Refuse an adapter on the head, whose weight is read here. Raises TOPDError."""
    if isinstance(student.get_output_embeddings(), BaseTunerLayer):
        raise TOPDError("peft_config: LoRA on the output head is not supported. Leave it out.")


def check_trainable(student: PreTrainedModel | PeftModel) -> None:
    """Refuse a student that nothing would be learned by. Raises TOPDError."""
    _check_head(student)
    layers = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise TOPDError(
            "student: its adapter is merged into its weights, or disabled, so it would not learn. "
            "Call unmerge_adapter() or enable_adapter_layers(), or train the merged model: "
            "merge_and_unload(), then requires_grad_(True)."
        )
    if any(parameter.requires_grad for parameter in student.parameters()):
        if isinstance(student, PeftModel):
            _check_all_kept(student)
        else:
            _say_parted(student)
        check_savable(student)
        return
    if isinstance(student, PeftModel):
        raise TOPDError(
            f"student: its adapter {student.active_adapter!r} is frozen, as PEFT loads it. Load it "
            "with PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    raise TOPDError("student: all its weights are frozen. Call model.requires_grad_(True) first.")


def _check_all_kept(student: PeftModel) -> None:
    """Refuse trainable weights below an adapter: checkpoints have those of it. Raises TOPDError."""
    biases = any(
        getattr(config, "bias", "none") != "none" for config in student.peft_config.values()
    )
    below = [
        name
        for name, weight in student.named_parameters()
        if weight.requires_grad
        and student.peft_config.keys().isdisjoint(name.split("."))
        and not (biases and name.endswith(".bias"))
    ]
    if below:
        raise TOPDError(
            f"student: {len(below)} weights below its adapter are trainable, such as {below[0]}, "
            "and peft saves those of the adapter alone, so that a run could not be resumed. Name "
            "their modules in modules_to_save, or freeze them."
        )


def adapted(student: PeftModel) -> str:
    """Which layers an adapter is on: names such as all-linear leave experts or others out."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = {
        getattr(module, "parameter_name", name.rpartition(".")[2])
        for name, module in student.named_modules()
        if isinstance(module, kinds)
    }
    trained, every = student.get_nb_trainable_parameters()
    return f"adapter on {', '.join(sorted(layers))}: {trained:,} of {every:,} weights are trained"


def plain_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The decoder's linear layers that multiply with their weight as it is, and in their own way.

    Not one whose weight has the adapter (``target_parameters``): it is another in every call.
    """
    modules = [*model.get_decoder().modules()]
    adapted = {
        id(module.get_base_layer()) for module in modules if isinstance(module, ParamWrapper)
    }
    linear = [module for module in modules if type(module) is nn.Linear]
    return [one for one in linear if "forward" not in vars(one) and id(one) not in adapted]


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that has weights in common with the student. Raises TOPDError."""
    ours = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in ours]
    if shared:
        inside = "the base inside the student's adapter" if isinstance(student, PeftModel) else ""
        raise TOPDError(
            f"teacher_model: is the student itself, or has its weights ({inside or shared[0]}). "
            "Use copy.deepcopy(model), made before the adapter."
        )
