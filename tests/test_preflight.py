"""What a run needs at its end is tried at its start; what is saved is what was trained."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from unittest.mock import create_autospec

import peft
import pytest
from huggingface_hub import HfApi, RepoUrl
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    FalconConfig,
    GPTBigCodeConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainingArguments,
    XGLMConfig,
)

from conftest import (
    DEVICE,
    TINY,
    USE_CPU,
    VOCAB,
    renamed_model,
    rows,
    tiny_model,
    tiny_tokenizer,
    write_pair,
)
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.inputs.models.adapters import merged
from topd.inputs.models.positions import exact_rope
from topd.report.kinds.training import training_charts
from topd.training.inherited import ELSEWHERE, REFUSED, WORKS, check_inherited
from topd.training.startup.preflight import (
    MOST_KL,
    check_forward,
    check_kept,
    check_saved,
    check_saving,
    kl,
    without_dropout,
)
from topd.training.startup.trials import check_settings
from topd.training.warmstart import WarmstartConfig

IDS = torch.arange(4, 20)[None]
LORA = {"r": 4, "lora_alpha": 64, "task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


def arguments(folder: Path, **options) -> TOPDConfig:
    small = {
        "method": "opd",
        "max_steps": 1,
        "max_completion_length": 8,
        "learning_rate": 3e-2,
        "warmup_steps": 0,
        "save_strategy": "no",
        "use_cpu": USE_CPU,
        "disable_tqdm": True,
    }
    return TOPDConfig(output_dir=str(folder), **{**small, **options})


def make(folder: Path, student=None, teacher=None, *, peft_config=None, **options) -> TOPDTrainer:
    return TOPDTrainer(
        tiny_model() if student is None else student,
        tiny_model(seed=1) if teacher is None else teacher,
        arguments(folder, **options),
        rows(4),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


@pytest.fixture
def unread(monkeypatch) -> None:
    """No weight may be read."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Settings


def test_an_adapter_passes_on_no_warning_about_names_of_libraries(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(tmp_path, peft_config=LoraConfig(**LORA))
    assert [str(one.message) for one in caught if "checkpointing" in str(one.message)] == []


def test_every_inherited_argument_is_known_to_work_or_is_refused():
    """Those of the installed transformers: an older one has fewer, and two that are no more."""
    names = {f.name for f in fields(TrainingArguments)} - {"warmup_ratio", "logging_dir"}
    assert names <= WORKS | ELSEWHERE | set(REFUSED)
    assert len(WORKS) + len(ELSEWHERE) + len(REFUSED) == len(WORKS | ELSEWHERE | set(REFUSED))


SET = {
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "average_tokens_across_devices": False,
    "data_seed": 7,
    "train_sampling_strategy": "sequential",
    "length_column_name": "tokens",
    "torch_compile": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
    "bf16_full_eval": True,
    "include_num_input_tokens_seen": "all",
    "eval_accumulation_steps": 1,
    "prediction_loss_only": True,
    "debug": "underflow_overflow",
    "do_predict": True,
}


@pytest.mark.parametrize("name", SET)
def test_an_inherited_argument_without_effect_is_refused(tmp_path, unread, folder, name):
    with pytest.raises(TOPDError, match=rf"{name}: .* has no effect here: .*\. Leave it out"):
        make(tmp_path / "run", str(folder), str(folder), **{name: SET[name]})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_best_model_at_end": True}, "has no effect without evaluations"),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss"},
            "save_strategy best: has no effect without evaluations",
        ),
        ({"metric_for_best_model": "accuracy"}, "gives eval_loss, not 'accuracy'"),
        ({"greater_is_better": True}, "the largest is the worst"),
    ],
)
def test_the_best_model_is_known_by_the_figure_that_there_is(tmp_path, options, said):
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, **options)


def test_defaults_are_accepted_and_a_warm_start_may_have_noise(tmp_path):
    check_inherited(arguments(tmp_path))
    noisy = WarmstartConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, neftune_noise_alpha=5.0)
    check_inherited(noisy)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("optim", {"optim": "adamw_8bit"}),
        ("lr_scheduler_type", {"lr_scheduler_type": "cosine_with_min_lr"}),
        ("lr_scheduler_type", {"lr_scheduler_type": "warmup_stable_decay"}),
        ("report_to", {"report_to": "comet_ml"}),
        ("report_to", {"report_to": "nonsense"}),
    ],
)
def test_what_transformers_cannot_make_is_said_before_models_load(
    tmp_path, unread, folder, place, options
):
    with pytest.raises(TOPDError, match=rf"{place} .*cannot be used: .*Choose another"):
        make(tmp_path / "run", str(folder), str(folder), **options)


NESTED = [
    ({"gradient_checkpointing_kwargs": {"use_reentrnt": True}}, "unknown key 'use_reentrnt'"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": "yes"}}, "must be true or false"),
    pytest.param(
        {"gradient_checkpointing_kwargs": {"every_n_layers": 0}},
        "a whole number above 0",
        marks=pytest.mark.skipif(
            not hasattr(PreTrainedModel, "activation_checkpointing_enable"),
            reason="an older transformers",
        ),
    ),
    (
        {"gradient_checkpointing_kwargs": {"determinism_check": "no", "use_reentrant": False}},
        "determinism_check should be",
    ),
    (
        {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"debug": True}},
        "has no effect without",
    ),
    ({"lr_scheduler_kwargs": {"num_cycls": 2}}, "unknown key 'num_cycls'"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 2}}, "x: has no effect"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}}, "two"),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
        "learning rates that are not numbers of at least 0",
    ),
    ({"optim_args": "rank=3"}, "'rank' has no effect with optim adamw_torch"),
    ({"optim": "sgd", "optim_args": "momentm=0.9"}, "'momentm' has no effect with optim sgd"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1: has no effect with optim sgd"),
    ({"optim_target_modules": ["q_proj"]}, "optim_target_modules: has no effect"),
    ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler: has no eff"),
    (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "num_steps: has no effect",
    ),
    ({"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers"),
]


@pytest.mark.parametrize(("options", "said"), NESTED)
def test_settings_inside_settings_are_tried_before_models_load(
    tmp_path, unread, folder, options, said
):
    with pytest.raises(TOPDError, match=said):
        make(
            tmp_path / "run", str(folder), str(folder), **{"gradient_checkpointing": True} | options
        )


def test_settings_inside_settings_work_where_they_are_right(tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False, "determinism_check": "none"},
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 1.5},
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }
    trainer = make(tmp_path, **options)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_a_schedule_that_follows_evaluations_takes_its_own_options(tmp_path):
    def check(**options) -> None:
        given = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": options}
        check_settings(arguments(tmp_path, eval_strategy="epoch", **given), (None, None))

    check(patience=0, factor=0.5)  # all were called unknown
    with pytest.raises(TOPDError, match=r"reduce_lr_on_plateau: cannot be used: .*'patiense'"):
        check(patiense=0)


@pytest.mark.parametrize("value", [0.5, 0.25])
def test_no_value_of_an_option_is_taken_for_one_without_effect(tmp_path, value):
    """Those that the trial puts in its place were refused."""
    trainer = make(tmp_path, adam_beta1=value, adam_beta2=value, adam_epsilon=value)
    trainer.create_optimizer()
    assert trainer.optimizer.param_groups[0]["betas"] == (value, value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_pattern": {"no_such": 8}}, "rank_pattern: 'no_such' fits none"),
        ({"alpha_pattern": {"no_such": 8}}, "alpha_pattern: 'no_such' fits none"),
        ({"target_modules": ["q_proj", "no_such"]}, "target_modules: no module is named 'no_such'"),
        ({"modules_to_save": ["no_such"]}, "modules_to_save: no module is named 'no_such'"),
        ({"exclude_modules": ["no_such"]}, "exclude_modules: no module is named 'no_such'"),
        (
            {"target_parameters": ["q_proj.weight", "no_such"], "target_modules": []},
            "target_parameters: no parameter is named 'no_such'",
        ),
        ({"lora_alpha": 0}, "lora_alpha: must be finite and above 0"),
        ({"lora_dropout": float("nan")}, r"lora_dropout: nan must be in \[0, 1\)"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS' is not CAUSAL_LM"),
        ({"trainable_token_indices": [10**6]}, "must be tokens from 0 to 63"),
        ({"trainable_token_indices": []}, "must be tokens from 0 to 63"),
        ({"target_modules": ["lm_head"]}, "LoRA on the output head is not supported"),
    ],
)
def test_an_adapters_names_and_numbers_are_those_of_the_model(
    tmp_path, unread, folder, options, said
):
    config = LoraConfig(**{"r": 4, **options})
    with pytest.raises(TOPDError, match=said):
        make(tmp_path / "run", str(folder), str(folder), peft_config=config)


def test_patterns_that_fit_are_taken(tmp_path):
    config = LoraConfig(
        rank_pattern={"q_proj": 8, r"layers\.0\.self_attn\.v_proj": 2},
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens"],
        **LORA,
    )
    ranks = {w.shape[0] for n, w in make(tmp_path, peft_config=config).model.named_parameters()
             if "lora_A" in n}  # fmt: skip
    assert ranks == {2, 4, 8}


@pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None,
    reason="an older peft, which knows the names of parameters alone",
)
@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"target_modules": "all-linear"}, {"k_proj": 4, "gate_up_proj": 8, "down_proj": 4}),
        ({"target_modules": ["w1", "w2", "w3"]}, {"gate_up_proj": 8, "down_proj": 4}),
        (
            {"target_parameters": ["down_proj"], "rank_pattern": {"down_proj": 2}},
            {"down_proj": 2},
        ),
    ],
)
def test_experts_are_adapted_by_either_name_and_a_configuration_stays_as_it_is(
    tmp_path, options, ranks
):
    """w1 and w3 of a Mixtral are one parameter in memory, of twice the rank."""
    config = LoraConfig(**{"target_modules": [], **LORA, **options})
    before = config.to_dict()
    for name in ("one", "two"):  # students of one configuration
        trainer = make(tmp_path / name, renamed_model("Mixtral"), peft_config=config)
        assert config.to_dict() == before
        found = {
            getattr(module, "parameter_name", name.rpartition(".")[2]): module.r["default"]
            for name, module in trainer.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        assert ranks.items() <= found.items()


@pytest.mark.parametrize("options", [{"seed": -1}, {"max_steps": 0}, {"num_train_epochs": 0.0}])
def test_a_seed_below_0_and_runs_of_no_update_are_refused(tmp_path, options):
    with pytest.raises(TOPDError, match=next(iter(options))):
        arguments(tmp_path, **options)


def test_several_visible_gpus_without_a_launcher_are_one(tmp_path):
    args = arguments(tmp_path)
    assert args.device.type == DEVICE.type
    args._n_gpu = 2
    trainer = TOPDTrainer(
        tiny_model(), tiny_model(seed=1), args, rows(4), processing_class=tiny_tokenizer()
    )
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size
    trainer.train()
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({"": 1}, f"it on {DEVICE.type}:1, and"),
        ({"model": f"{DEVICE.type}:3", "lm_head": "disk"}, f"it on {DEVICE.type}:3, disk, and"),
        ({"": DEVICE.type}, None),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_model_on_another_device_is_refused(tmp_path, places, told, place):
    models = [tiny_model(), tiny_model(seed=1)]
    models[place].hf_device_map = places
    if told is None:
        make(tmp_path, *models)
        return
    with pytest.raises(TOPDError, match=f"{('student', 'teacher')[place]}: device_map.*{told}"):
        make(tmp_path, *models)


@pytest.mark.parametrize("place", [0, 1])
def test_a_model_on_the_meta_device_is_refused(tmp_path, place):
    models = [tiny_model(), tiny_model(seed=1)]
    models[place].to("meta")
    said = f"^{('student', 'teacher')[place]}: is on the meta device, .*from_pretrained"
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, *models)


# Saving


def test_sampling_settings_that_greedy_decoding_does_not_use_are_not_in_the_way(tmp_path, folder):
    stored = {"eos_token_id": 2, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    make(tmp_path / "run", str(folder), str(folder), save_strategy="steps", save_steps=1).train()
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] in (2, [2])  # as transformers' versions have it
    assert (saved.get("temperature"), saved.get("top_p")) == (None, None)


def test_a_generation_config_that_nobody_can_save_is_refused_before_models_load(
    tmp_path, unread, folder
):
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3, "num_beams": 2}')
    with pytest.raises(TOPDError, match=r"generation_config\.json cannot be used: .*Correct it"):
        make(tmp_path / "run", str(folder), str(folder))


def test_a_student_on_disk_that_differs_from_the_one_in_memory_ends_the_run(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    save = trainer.save_model

    def save_otherwise(output_dir=None, _internal_call=False):
        save(output_dir, _internal_call)
        path = Path(output_dir) / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"] *= 1.5
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(trainer, "save_model", save_otherwise)
    with pytest.raises(TOPDError, match=r"student: holds another model than the one that was tra"):
        trainer.train()
    assert (tmp_path / "student" / "model.safetensors").exists()


def test_a_saved_student_is_the_one_in_memory(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert check_saved(tmp_path, model) < (1e-12 if USE_CPU else 1e-9)  # it is read on a CPU
    model.lm_head.weight.data += 0.05 * torch.randn_like(model.lm_head.weight)
    with pytest.raises(TOPDError, match="differ by"):
        check_saved(tmp_path, model)
    broken = tiny_model()
    broken.model.norm.weight.data[0] = torch.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(TOPDError, match="differ by nan"):
        check_saved(tmp_path, model)


def test_a_tokenizer_that_is_another_once_it_is_saved_is_refused(tmp_path):
    """transformers makes Qwen2's own of any file beside a model of that type."""
    place, run = str(tmp_path / "qwen2"), str(tmp_path / "run")
    model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    model.save_pretrained(place)
    student = {"path": place, "tokenizer": "teacher"}
    path = write_pair(tmp_path, student=student, output_dir=run, max_completion_length=8)
    fault = r"\(TokenizersBackend\) .* \(Qwen2Tokenizer\).* type, qwen2"
    with pytest.raises(TOPDError, match=fault):
        run_recipe(path, quiet=True)
    args = TOPDConfig(output_dir=run, use_cpu=USE_CPU, max_completion_length=8)
    with pytest.raises(TOPDError, match=fault):
        TOPDTrainer(model, tiny_model(), args, rows(2), processing_class=tiny_tokenizer())
    assert not (tmp_path / "run" / "student").exists()


def test_a_tokenizer_that_groups_digits_otherwise_once_it_is_saved_is_refused():
    """As Llama 3's, three to a token, beside a model of type qwen2, whose own has one."""
    groups = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s?\p{L}+|\s+"
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(groups), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        ["12345 12345"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<e>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<e>")
    sizes = {**TINY, "vocab_size": len(tokenizer)}
    check_saving(tiny_model(vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(TOPDError, match=r"\(Qwen2Tokenizer\), and split text otherwise"):
        check_saving(Qwen2ForCausalLM(Qwen2Config(**sizes)), tokenizer)


def test_a_student_that_its_last_update_broke_is_not_given_out_as_trained(tmp_path):
    """An update before would have been noticed by the next one's rollouts."""
    student = tiny_model()
    far = torch.optim.SGD(student.parameters(), lr=1e38)
    args = TOPDConfig(
        output_dir=str(tmp_path), max_steps=1, max_completion_length=8, warmup_steps=0,
        use_cpu=USE_CPU,
    )  # fmt: skip
    trainer = TOPDTrainer(
        student, tiny_model(seed=1), args, rows(4),
        processing_class=tiny_tokenizer(), optimizers=(far, None),
    )  # fmt: skip
    with pytest.raises(TOPDError, match="NaN logits since its last update"):
        trainer.train()


def test_rounding_of_a_narrow_adapter_is_no_other_model(tmp_path):
    """bfloat16 alone makes two forwards differ by more than another model may."""
    base = tiny_model(hidden_size=64, initializer_range=0.8, num_hidden_layers=4).bfloat16()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    merged(model).save_pretrained(tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert check_saved(tmp_path, model) < MOST_KL
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    ids, narrow = torch.arange(16)[None], type(base).from_pretrained(tmp_path).to(DEVICE)
    assert kl(model(ids).logits, narrow(ids).logits) > MOST_KL
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(TOPDError, match="differ by"):
        check_saved(tmp_path, model)


# Adapters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "on",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 9]},
        {"trainable_token_indices": {"lm_head": [5, 9]}},
        {"trainable_token_indices": {"lm_head": [5, 9], "embed_tokens": [7]}},
        {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [5, 9]}},
    ],
)
def test_an_adapter_on_tied_embeddings_is_saved_as_it_was_trained(tmp_path, tied, on):
    """Tokens that one of the two had learned were merged into both: a run failed at its end."""
    base = tiny_model(tie_word_embeddings=tied)
    before = copy.deepcopy(base)(input_ids=IDS).logits
    config = LoraConfig(**{"target_modules": ["q_proj"], **LORA, **on})
    trainer = make(tmp_path, base, max_steps=3, peft_config=config)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "student").to(DEVICE)
        saved = read(input_ids=IDS).logits
        assert (trained - before).abs().max() > 1
        torch.testing.assert_close(saved, trained, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(model)(input_ids=IDS).logits, trained)
    assert model.get_base_model().config.tie_word_embeddings == tied  # that in memory is as it was


def adapted(**options) -> PeftModel:
    return get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], **LORA), **options)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_folder_of_an_adapter_is_called_one(tmp_path, role):
    adapted().save_pretrained(tmp_path / "adapter")
    pair = {role: str(tmp_path / "adapter")}
    with pytest.raises(TOPDError, match=r"model .*adapter: is an adapter .*merge_and_unload"):
        make(tmp_path / "run", **pair)


def test_a_student_that_cannot_learn_is_refused(tmp_path):
    frozen = adapted()
    frozen.requires_grad_(False)
    with pytest.raises(TOPDError, match=r"adapter 'default' is frozen.*is_trainable=True"):
        make(tmp_path, frozen)
    for apart in ("merge_adapter", "disable_adapter_layers"):  # as for another's generation
        student = adapted()
        getattr(student, apart)()
        with pytest.raises(TOPDError, match=r"its adapter is merged .* Call unmerge_adapter\(\)"):
            make(tmp_path, student)
    with pytest.raises(TOPDError, match=r"all its weights are frozen.*requires_grad_"):
        make(tmp_path, tiny_model().requires_grad_(False))


def test_a_second_adapter_and_one_that_cannot_be_merged_are_refused(tmp_path):
    config = LoraConfig(target_modules=["v_proj"], **LORA)
    with pytest.raises(TOPDError, match="a PeftModel with the adapter 'default' already"):
        make(tmp_path, adapted(), peft_config=config)
    missing = LoraConfig(target_modules=["no_such_proj"], **LORA)
    with pytest.raises(TOPDError, match=r"peft_config .*no_such_proj"):
        make(tmp_path, peft_config=missing)


@pytest.mark.parametrize("unfrozen", ["norm.weight", "layers.1.mlp.up_proj.weight"])
def test_trainable_weights_below_an_adapter_are_refused(tmp_path, unfrozen):
    """No checkpoint had them, which was found out when a run was resumed."""
    student = adapted()
    student.get_parameter(f"base_model.model.model.{unfrozen}").requires_grad_(True)
    with pytest.raises(TOPDError, match=rf"1 weights below its adapter .*{unfrozen}.*modules_to_"):
        make(tmp_path, student)
    config = LoraConfig(**LORA, target_modules=["q_proj"], bias="all", modules_to_save=["norm"])
    make(tmp_path, get_peft_model(tiny_model(attention_bias=True), config))


def test_an_adapter_that_peft_does_not_load_as_it_was_is_said(tmp_path, caplog):
    for start in ("pissa", "pissa_niter_2"):
        config = LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights=start)
        make(tmp_path, peft_config=config)
        assert ("does not load adapter/ as it was trained" in caplog.text) == (start != "pissa")


def test_a_teacher_inside_the_students_adapter_is_refused(tmp_path):
    student = adapted()
    with pytest.raises(TOPDError, match="the base inside the student's adapter"):
        make(tmp_path, student, student.get_base_model())
    assert any(p.requires_grad for p in student.parameters())


def shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def tied(model):
    model.model.embed_tokens.weight = model.lm_head.weight
    return model


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda m: get_peft_model(m, AdaLoraConfig(total_step=9)), "kind ADALORA"),
        pytest.param(
            lambda m: get_peft_model(m, LoraConfig(kasa_config=peft.KasaConfig())),
            "kind KASA",
            marks=pytest.mark.skipif(not hasattr(peft, "KasaConfig"), reason="an older peft"),
        ),
        (lambda m: get_peft_model(m, PromptTuningConfig(**VIRTUAL)), "kind PROMPT_TUNING"),
        (lambda m: get_peft_model(m, LoraConfig(alora_invocation_tokens=[5])), "aLoRA"),
        (lambda m: inject_adapter_in_model(LoraConfig(), m), "as a PeftModel"),
        (shared, "down_proj.weight is not as in a"),
        (lambda m: tied(tiny_model()), "lm_head.weight is not as in a"),
        (lambda m: setattr(m, "generation_config", None) or m, "generation_config is None"),
    ],
)  # fmt: skip
def test_a_student_that_would_be_lost_at_the_end_is_refused(tmp_path, wrap, said):
    student = wrap(tiny_model(tie_word_embeddings=True))
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, student)
    assert not any(weight.is_meta for weight in student.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_replication": [(0, 2), (1, 2)]}, r"layers\.1\.\S+ is not as in a"),
        ({"init_lora_weights": "eva"}, "eva has no effect .*initialize_lora_eva_weights"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga has no effect"),
        ({"use_qalora": True}, "use_qalora: has no effect"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_merged_or_not_made_as_it_says_is_refused(tmp_path, options, said):
    config = LoraConfig(**LORA, target_modules=["q_proj"], **options)
    with pytest.raises(TOPDError, match=said):
        make(tmp_path, tiny_model("llama"), peft_config=config)


@pytest.mark.parametrize(
    "kind",  # SHiRA is merged with its weights only
    ["IA3Config", "LoHaConfig", "VeraConfig", "LoraConfig", "ShiraConfig"],
)
def test_other_adapters_of_layers_are_saved_as_they_are_trained(tmp_path, kind):
    more = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 4}
    config = getattr(peft, kind)(target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    trainer = make(tmp_path, get_peft_model(tiny_model(), config))
    before = trainer.model(input_ids=IDS).logits
    trainer.train()
    assert not torch.equal(trainer.model(input_ids=IDS).logits, before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student").to(DEVICE)
    torch.testing.assert_close(
        saved(input_ids=IDS).logits, trainer.model.eval()(input_ids=IDS).logits, rtol=0, atol=1e-3
    )


def test_a_whole_student_need_not_be_copied(tmp_path):
    student = tiny_model()
    student.lock, student.last = Lock(), student(input_ids=IDS).logits
    make(tmp_path, student).train()


@pytest.mark.parametrize("lora", [True, False])
def test_a_head_that_is_not_the_embeddings_is_not_called_tied(tmp_path, lora):
    """Other programs than transformers would tie it again, and have another student."""
    student, adapter = tiny_model(tie_word_embeddings=True), None
    if lora:
        apart = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        adapter = LoraConfig(**LORA, **apart)
    else:
        student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    make(tmp_path, student, peft_config=adapter).train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert not json.loads((tmp_path / "student/config.json").read_text())["tie_word_embeddings"]
    assert not plain.lm_head.weight.equal(plain.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_16_bits_reads_as_it_does_once_it_is_loaded_again(tmp_path, dtype):
    """.to() casts the frequencies of RoPE too, and from_pretrained does not."""
    student, teacher = tiny_model().to(dtype), tiny_model(seed=1).to(dtype)
    assert student.model.rotary_emb.inv_freq.dtype == dtype
    trainer = make(tmp_path, student, teacher, optim="sgd")  # AdamW's epsilon is 0 in float16
    for name in ("inv_freq", "original_inv_freq"):
        for model in (student, teacher):
            expected = getattr(tiny_model().model.rotary_emb, name)
            assert torch.equal(getattr(model.model.rotary_emb, name), expected)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student").to(DEVICE)
    ours = trainer.model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(saved(input_ids=IDS).logits, ours, rtol=0, atol=0)


class Rope(torch.nn.Module):
    """Of a model's own code: frequencies that .to() does not make others, or that have no maker."""

    def __init__(self, config: PreTrainedConfig, size: int = 4, *, saved: bool = False) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(size) / size), persistent=saved)


class Wide(Rope):
    def __init__(self, config: PreTrainedConfig, size: int) -> None:
        super().__init__(config, size)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (lambda config: Rope(config, saved=True), []),
        (Rope, []),
        (lambda config: Wide(config, 4), ["student: the frequencies of its RoPE are in 16 bits"]),
    ],
)
def test_frequencies_that_are_loaded_as_they_are_stay(monkeypatch, rope, said):
    student, told = tiny_model(), []
    monkeypatch.setattr("topd.inputs.models.positions.logger.warning", told.append)
    student.own = rope(student.config).to(torch.bfloat16)
    before = student.own.inv_freq
    exact_rope("student", student)
    assert student.own.inv_freq is before
    assert [text.split(". ")[0] for text in told] == said


# Noise


NOISY = {
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.3, layerdrop=0.3,
    ),
    "bigcode": GPTBigCodeConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.3, resid_pdrop=0.3
    ),
    "xglm": XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.3,
        attention_dropout=0.3, layerdrop=0.3,
    ),
    "biogpt": BioGptConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
        layerdrop=0.3,
    ),
    "falcon": FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.3, hidden_dropout=0.3,
    ),
    "mixtral": MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
def test_no_noise_is_left_whatever_it_is_called(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(NOISY[kind])).to(DEVICE)
    expected = model.eval()(input_ids=IDS).logits
    assert not torch.allclose(model.train()(input_ids=IDS).logits, expected)
    without_dropout(model)
    check_forward(model)
    for _ in range(3):
        torch.testing.assert_close(model.train()(input_ids=IDS).logits, expected)


def test_noise_that_is_part_of_the_model_is_refused():
    """PhiMoE's experts weigh otherwise without jitter, in evaluation too."""
    config = PhimoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(TOPDError, match=r"PhimoeForCausalLM is another model once its router noi"):
        without_dropout(AutoModelForCausalLM.from_config(config))


def test_noise_that_cannot_be_turned_off_is_refused():
    model = tiny_model()
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) * (1 + 0.5 * layer.training)
    with pytest.raises(TOPDError, match=r"Qwen3ForCausalLM computes otherwise in training"):
        check_forward(model)


@pytest.mark.parametrize(
    ("options", "ahead"),
    [
        ({"method": "opd"}, 0),
        ({"method": "topd"}, 0),  # its targets are in the rollout
        ({"method": "eopd"}, 0),
        ({"method": "window_sft"}, 6),
        ({"method": "window_kd"}, 6),
        ({"method": "olive"}, 6),
        ({"method": "first_fork", "window_length": 0.5}, 4),
        ({"method": "relay"}, 6 + 24),
        ({"method": "relay", "method_options": {"tokens": 3}}, 6 + 3),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_is_learned_after_a_rollout_has_to_fit_too(tmp_path, options, ahead, role):
    """A window from the last token on, and what the student writes after it, as positions."""
    longest = max(len(p.student) for p in make(tmp_path / "0").train_dataset) + 8
    if role == "teacher" and options["method"] == "topd":
        ahead = 6
    options = {"window_length": 6, **options}
    sizes = {longest + ahead: True, longest + ahead - 1: False}
    for positions, fits in sizes.items():
        pair = {role: tiny_model(max_position_embeddings=positions)}
        if fits:
            make(tmp_path / "1", **pair, **options)
        else:
            with pytest.raises(TOPDError, match=f"{role}: .* the model has {positions} positions"):
                make(tmp_path / "1", **pair, **options)


# What a trainer is asked for besides


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("name", ["student", "adapter"])
def test_a_run_does_not_save_its_student_over_one_of_its_models(tmp_path, unread, role, name):
    """Nor over one in memory that was read from there."""
    models = [tiny_model(), tiny_model(seed=1)]
    models[role].config._name_or_path = str(tmp_path / name)
    for source in (models[role], tmp_path / "x" / ".." / name):
        models[role] = source
        with pytest.raises(TOPDError, match=rf"would save its student over .*{name}.*Choose anoth"):
            make(tmp_path, *models)


def test_a_name_that_begins_like_a_home_is_no_folder_of_the_run(tmp_path):
    check_kept(["~nobody-of-this-name/student"], tmp_path)


def test_only_the_student_is_uploaded(tmp_path, monkeypatch):
    """With Trainer's arguments; a name without a namespace is in the user's."""
    made, sent = [], []

    def create(_, name, **options):
        made.append(options)
        return RepoUrl(f"https://huggingface.co/somebody/{name.rpartition('/')[2]}")

    monkeypatch.setattr("topd.runs.hub.HfApi.create_repo", create)
    # the signature is the real one's
    upload = create_autospec(HfApi.upload_folder, side_effect=lambda _, **what: sent.append(what))
    monkeypatch.setattr("topd.runs.hub.HfApi.upload_folder", upload)
    trainer = make(tmp_path, hub_model_id="student", hub_private_repo=True)
    with pytest.raises(TOPDError, match="Train first"):
        trainer.push_to_hub()
    trainer.train()
    with pytest.raises(TOPDError, match="push_to_hub: dataset_name: is not an argument"):
        trainer.push_to_hub(dataset_name="sums")
    assert made == []
    trainer.push_to_hub("done")
    trainer.push_to_hub(commit_message="done", blocking=False, private=False, create_pr=True)
    assert [options["private"] for options in made] == [True, False]
    same = {
        **{"repo_id": "somebody/student", "folder_path": tmp_path / "student", "revision": None},
        "commit_message": "done",
    }
    assert sent == [
        {**same, "run_as_future": False},
        {**same, "run_as_future": True, "create_pr": True},
    ]


def test_no_data_to_evaluate_and_no_batch_to_learn_are_said(tmp_path):
    with pytest.raises(TOPDError, match="eval_dataset: none was given"):
        make(tmp_path).evaluate()
    with pytest.raises(TOPDError, match="no prompt is left"):
        make(tmp_path).evaluate([])
    with pytest.raises(TOPDError, match="eval_dataset: is a mapping of columns"):
        make(tmp_path).evaluate({"prompt": ["what is 1 + 2 ?"], "answer": ["3"]})
    with pytest.raises(TOPDError, match="eval_dataset: 'sums' is not the name of a set"):
        make(tmp_path).evaluate("sums")
    little = make(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=16)
    with pytest.raises(TOPDError, match="dataloader_drop_last: leaves no batch"):
        little.train()


def test_an_optimiser_without_the_weights_to_be_trained_is_refused(tmp_path, folder):
    """It was made before the adapter, or the model is loaded here: nothing would be learned."""

    def trainer(name, model, held, **options):
        optimizer = torch.optim.SGD(held.parameters(), lr=3e-2)
        return TOPDTrainer(
            model, tiny_model(seed=1), arguments(tmp_path / name), rows(4),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, None), **options,
        )  # fmt: skip

    student = tiny_model()
    with pytest.raises(TOPDError, match=r"optimizers: .* before the student is loaded .* Load it"):
        trainer("path", str(folder), student)
    with pytest.raises(TOPDError, match=r"optimizers: .* before the adapter .*get_peft_model"):
        trainer("lora", student, student, peft_config=LoraConfig(**LORA))
    with pytest.raises(
        TOPDError, match=r"optimizers: \d of the student's 25 .* model\.embed_tokens"
    ):
        trainer("part", student, student.model.layers)
    before = [p.detach().clone() for p in student.parameters()]
    trainer("own", student, student).train()
    assert any(not p.equal(was) for p, was in zip(student.parameters(), before, strict=True))
    adapted = get_peft_model(tiny_model(), LoraConfig(**LORA))
    trainer("adapted", adapted, adapted).train()


def test_what_an_optimiser_that_was_given_does_not_take_is_refused(tmp_path):
    """The card of a run told the rate of the settings, and it had learned at the optimiser's."""

    def trainer(optimizer, **options):
        options = {"max_steps": 1, "max_completion_length": 8, "use_cpu": USE_CPU, **options}
        args = TOPDConfig(output_dir=str(tmp_path / "run"), save_strategy="no", **options)
        return TOPDTrainer(
            student, tiny_model(seed=1), args, rows(4),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, None),
        )  # fmt: skip

    student = tiny_model()
    with pytest.raises(TOPDError, match="LBFGS asks for the loss several times"):
        trainer(torch.optim.LBFGS(student.parameters()))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25)
    for name, value in (("learning_rate", 1e-3), ("weight_decay", 0.1), ("optim", "adafactor")):
        with pytest.raises(TOPDError, match=f"^{name}: {value} has no effect: an optimiser was"):
            trainer(optimizer, **{name: value})
    trainer(optimizer, learning_rate=0.25)
    trainer(optimizer).train()
    assert "| learning rate | 0.25 |" in (tmp_path / "run/student/README.md").read_text()


def test_settings_that_an_optimiser_was_made_with_are_its_own(tmp_path):
    """And a configuration that is used again has its own learning rate."""

    def trainer(options, **made):
        student = tiny_model()
        optimizer = torch.optim.AdamW(student.parameters(), **made)
        args = TOPDConfig(str(tmp_path), max_completion_length=8, use_cpu=USE_CPU, **options)
        rate = args.learning_rate
        trainer = TOPDTrainer(
            student, tiny_model(seed=1), args, rows(4),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, None),
        )  # fmt: skip
        assert args.learning_rate == rate
        return trainer

    own = {"learning_rate": 3e-5, "weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    made = {"lr": torch.tensor(3e-5), "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}
    trainer(own, **made)
    with pytest.raises(TOPDError, match=r"^adam_epsilon: 1e-06 has no effect"):
        trainer(own, **{**made, "eps": 1e-8})
    assert trainer({}, lr=0.25).args.learning_rate == 0.25


def test_what_a_schedule_that_was_given_does_not_take_is_refused(tmp_path):
    """run.json named an optimiser and a schedule that the run did not have."""

    def trainer(schedule, **options):
        options = {"max_steps": 2, "max_completion_length": 8, "use_cpu": USE_CPU, **options}
        args = TOPDConfig(output_dir=str(tmp_path / "run"), **options)
        return TOPDTrainer(
            student, tiny_model(seed=1), args, rows(4),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, schedule),
        )  # fmt: skip

    student = tiny_model()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for name, value in (("lr_scheduler_type", "cosine"), ("warmup_steps", 3)):
        with pytest.raises(TOPDError, match=f"^{name}: {value}.* has no effect: a schedule was"):
            trainer(schedule, **{name: value})
    with pytest.raises(TOPDError, match=r"^lr_scheduler_kwargs: unknown key 'cycles'"):
        trainer(None, lr_scheduler_type="cosine", lr_scheduler_kwargs={"cycles": 3})
    trainer(schedule, warmup_steps=0).train()
    stored = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert [stored[n] for n in ("optim", "lr_scheduler_type")] == ["SGD", "ConstantLR"]
    student = tiny_model()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(TOPDError, match="optim was 'SGD' and is 'AdamW'"):
        trainer(schedule, max_steps=3).train(resume_from_checkpoint=True)


def test_a_schedule_without_its_optimiser_is_refused(tmp_path):
    """Its rates were logged, and another optimiser learned at a constant one."""

    def trainer(student, optimizer, held, name="run"):
        schedule = torch.optim.lr_scheduler.ConstantLR(held)
        return TOPDTrainer(
            student, tiny_model(seed=1), arguments(tmp_path / name), rows(4),
            processing_class=tiny_tokenizer(), optimizers=(optimizer, schedule),
        )  # fmt: skip

    student = tiny_model()
    one, other = (torch.optim.SGD(student.parameters(), lr=3e-2) for _ in range(2))
    for optimizer in (None, one):
        with pytest.raises(TOPDError, match="optimizers: the schedule is not one of the optimiser"):
            trainer(student, optimizer, other)
    trainer(student, one, one).train()

    class Joined(torch.optim.SGD):
        """With groups of several optimisers, which it puts together whenever it is asked."""

        param_groups = property(
            lambda self: [*self.__dict__["param_groups"]],
            lambda self, groups: self.__dict__.update(param_groups=groups),
        )

    joined = torch.optim.SGD(student.parameters(), lr=3e-2)
    joined.__class__ = Joined
    trainer(student, joined, joined, "joined").train()


def test_no_row_is_dropped_in_evaluation(tmp_path):
    def loss(name, count, **options):
        trainer = make(tmp_path / name, per_device_eval_batch_size=4, **options)
        found = trainer.evaluate(rows(count))["eval_loss"]
        assert trainer.args.dataloader_drop_last == options.get("dataloader_drop_last", False)
        return found

    for count in (3, 6):
        dropped = loss("dropped", count, dataloader_drop_last=True)
        assert dropped == loss("kept", count)


def test_a_processor_and_a_quantised_teacher_are_refused(tmp_path):
    with pytest.raises(TOPDError, match=r"processing_class: a object is not a tokenizer"):
        TOPDTrainer(
            tiny_model(),
            tiny_model(seed=1),
            arguments(tmp_path),
            rows(4),
            processing_class=object(),
        )
    teacher = tiny_model(seed=1)
    teacher.model.register_module("packed", torch.ao.nn.quantized.dynamic.Linear(2, 2))
    with pytest.raises(TOPDError, match=r"teacher: is quantised, .* not quantised"):
        make(tmp_path, teacher=teacher)
    marked = tiny_model(seed=1)
    marked.is_quantized, marked.quantization_method = True, "bitsandbytes"
    with pytest.raises(TOPDError, match=r"student: is quantised .*cannot learn\. Give the same"):
        make(tmp_path, marked)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "hqq", "nonsense"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_quantised_folder_is_refused_before_weights_are_read(
    tmp_path, unread, folder, method, role
):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    stored = json.loads((other / "config.json").read_text())
    asked = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps({**stored, "quantization_config": asked}))
    pair = {"student": str(folder), "teacher": str(folder), role: str(other)}
    with pytest.raises(TOPDError, match=rf"{role}: is quantised \({method}\).*in bfloat16"):
        make(tmp_path / "run", **pair)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "t5"])
def test_what_is_no_causal_model_of_text_is_refused_in_a_sentence(tmp_path, unread, folder, kind):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "model_type": kind}))
    with pytest.raises(TOPDError) as caught:
        make(tmp_path / "run", str(folder), str(folder))
    assert kind in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(folder))


def test_predict_names_what_to_use(tmp_path):
    with pytest.raises(TOPDError, match=r"predict: .*evaluate\(\).*topd eval"):
        make(tmp_path).predict(rows(2))


def test_data_that_is_no_rows_is_refused_and_a_frame_is_taken(tmp_path):
    pandas = pytest.importorskip("pandas")
    pair = tiny_model(), tiny_model(seed=1)
    args, tokenizer = arguments(tmp_path), tiny_tokenizer()
    for data, said in (([*rows(1), "what is 1 + 2 ?"], "must be texts"), ("x.jsonl", "is a path")):
        with pytest.raises(TOPDError, match=f"train_dataset: .*{said}"):
            TOPDTrainer(*pair, args, data, processing_class=tokenizer)
    frame = pandas.DataFrame(rows(4))
    trainer = TOPDTrainer(*pair, args, frame, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 4


def test_a_dataset_of_torch_has_as_many_rows_as_it_says(tmp_path):
    """Python iterates over one until an IndexError, which most never raise: that had no end."""

    class Endless(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, str]:
            if index > 9:
                raise AssertionError("without end")
            return rows(4)[index % 3]

    pair = tiny_model(), tiny_model(seed=1)
    trainer = TOPDTrainer(*pair, arguments(tmp_path), Endless(), processing_class=tiny_tokenizer())
    expected = [prompt.student for prompt in trainer.encoder.encode(rows(3))]
    assert [prompt.student for prompt in trainer.train_dataset] == expected


def test_texts_are_prompts_and_an_evaluation_may_have_several_sets(tmp_path):
    """The same prompts as rows, and each set's figure is that of the set alone."""
    texts, pair = [row["prompt"] for row in rows(4)], (tiny_model(), tiny_model(seed=1))
    options = {"max_completion_length": 6, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, method="opd", max_steps=1, **options)
    sets = {"easy": texts[:2], "hard": rows(4)[2:]}
    trainer = TOPDTrainer(*pair, args, texts, sets, processing_class=tiny_tokenizer())
    alone = {name: trainer.evaluate(data)["eval_loss"] for name, data in sets.items()}
    found = trainer.evaluate()
    assert {name: found[f"eval_{name}_loss"] for name in sets} == pytest.approx(alone)
    assert [p.student for p in trainer.train_dataset] == [
        p.student for p in trainer.encoder.encode(rows(4))
    ]
    trainer.train()
    charts = {chart.name: chart for chart in training_charts(tmp_path)}
    assert {"held out, easy", "held out, hard"} <= set(charts["divergence"].columns)
    for wanted in (
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ):
        best = arguments(tmp_path / "best", **wanted, **options)
        with pytest.raises(TOPDError, match="several evaluation sets there is no one figure"):
            TOPDTrainer(*pair, best, texts, sets, processing_class=tiny_tokenizer())
