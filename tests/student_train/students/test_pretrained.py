"""Models from folders: loaded quietly, with an account of what the folder lacked, and refused where they are no use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, ViTConfig

from student_train.students.pretrained import (
    check_family,
    head_name,
    load_config,
    load_model,
    vocabulary_difference,
)
from teacher_cache.errors import StudentError
from teacher_cache.models.families import encoder_of
from tests.causal_models import VOCABULARY, make_model, save_teacher


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_a_whole_model_lacks_nothing(family: str, tiny_teacher: Any) -> None:
    folder = tiny_teacher(family)
    masked, base = (load_model(folder, with_mlm_head=with_head) for with_head in (True, False))
    assert masked.missing == base.missing == frozenset() == masked.unexpected
    assert masked.has_trained_head and not base.has_trained_head
    assert encoder_of(base.model) is base.model is not encoder_of(masked.model)
    stored = load_file(folder / "model.safetensors").values()
    encoder = encoder_of(masked.model).state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in base.model.state_dict().items())
    assert all(any(torch.equal(value, other) for other in stored) for value in encoder.values())


def test_the_head_that_a_base_model_has_not_got_is_named(tiny_teacher: Any) -> None:
    loaded = load_model(tiny_teacher("bert", head=False), with_mlm_head=True)
    assert loaded.missing and all(name.startswith("cls.predictions.") for name in loaded.missing)
    assert not loaded.has_trained_head


def test_half_precision_is_loaded_as_float32(tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    weights = load_file(folder / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_model(folder, with_mlm_head=True).model.state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(found[name], half[name].float())


def test_an_encoder_with_a_hole_is_refused(tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for with_head in (True, False):
        with pytest.raises(
            StudentError, match=r"lacks 1 weights of its base model, '.*layer\.1\.output\.dense\.weight'"
        ):
            load_model(folder, with_mlm_head=with_head)


def test_folders_that_cannot_be_read(tiny_teacher_copy: Any, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no Hugging Face model folder.*config.json and model.safetensors"):
        load_config(tmp_path)
    folder = tiny_teacher_copy("bert")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(StudentError, match="no Hugging Face model folder"):
        load_model(folder, with_mlm_head=False)
    config = json.loads((folder / "config.json").read_text())
    for broken in ("{", json.dumps(config | {"model_type": "nonsense"}), json.dumps(config | {"hidden_size": "wide"})):
        (folder / "config.json").write_text(broken)
        with pytest.raises(StudentError, match="no Hugging Face model folder"):
            load_model(folder, with_mlm_head=False)


def test_what_predicts_no_token_is_refused(tiny_teacher: Any, tmp_path: Path) -> None:
    assert check_family(tiny_teacher("xlm-roberta")) == "masked-lm"
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert check_family(tmp_path / "gpt2") == "causal-lm"
    T5Config().save_pretrained(tmp_path / "t5")
    ViTConfig().save_pretrained(tmp_path / "vit")
    for family, what in (("t5", "an encoder-decoder"), ("vit", "without a masked-LM or causal-LM class")):
        with pytest.raises(StudentError, match=f"family '{family}', {what}.*choose a family such as"):
            check_family(tmp_path / family)


def test_heads_are_called_by_what_they_predict(tiny_teacher: Any) -> None:
    assert head_name(load_config(tiny_teacher("bert"))) == "masked-LM head"
    for family in ("llama", "gpt2"):
        assert head_name(make_model(family).config) == "language-modelling head"


# ---- vocabularies ---------------------------------------------------------------------------------------------------


def test_the_same_words_at_the_same_ids(tiny_teacher: Any) -> None:
    assert vocabulary_difference(tiny_teacher("bert", seed=1), tiny_teacher("bert")) is None
    # another family with the same tokenizer
    assert vocabulary_difference(tiny_teacher("distilbert"), tiny_teacher("bert")) is None


def test_other_numbers_of_words_and_other_words(tiny_teacher: Any, tiny_teacher_copy: Any) -> None:
    teacher = tiny_teacher("bert")
    difference = vocabulary_difference(tiny_teacher("bert", vocab_size=210), teacher)
    assert difference == "210 vocabulary entries, the teacher 200"
    # the special tokens of RoBERTa stand in another order and have other names
    assert vocabulary_difference(tiny_teacher("roberta"), teacher) == "other ids for 10 tokens such as '</s>'"
    renamed = tiny_teacher_copy("bert")
    tokenizer = renamed / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"babo"', '"zzzz"'))
    assert vocabulary_difference(renamed, teacher) == "other ids for 2 tokens such as 'babo'"


def test_without_a_tokenizer_the_number_of_ids_has_to_do(tiny_teacher: Any, tiny_teacher_copy: Any) -> None:
    bare = tiny_teacher_copy("roberta")
    for file in bare.glob("*token*"):
        file.unlink()
    assert vocabulary_difference(bare, tiny_teacher("bert")) is None


def test_causal_vocabularies_are_compared_by_tokens(tiny_teacher_copy: Any, tmp_path: Path) -> None:
    """Each checkpoint pads its embeddings beyond the tokens that there are, to a size of its own."""
    tokens = len(VOCABULARY)
    teacher = save_teacher(tmp_path / "teacher", vocab_size=tokens + 7)
    for entries in (tokens, tokens + 4, tokens + 15):
        other = save_teacher(tmp_path / str(entries), "gpt2", vocab_size=entries)
        assert vocabulary_difference(other, teacher) is None
        assert vocabulary_difference(teacher, other) is None
    short = save_teacher(tmp_path / "short", vocab_size=tokens - 1)
    assert vocabulary_difference(short, teacher) == (
        f"{tokens - 1} vocabulary entries, the teacher {tokens + 7}, for ids up to {tokens - 1}"
    )
    for file in (tmp_path / str(tokens)).glob("*token*"):
        file.unlink()
    assert (
        vocabulary_difference(tmp_path / str(tokens), teacher)
        == f"{tokens} vocabulary entries, the teacher {tokens + 7}"
    )
    renamed = tmp_path / str(tokens + 4) / "tokenizer.json"
    renamed.write_text(renamed.read_text().replace("babo", "zzzz").replace("Ġbada", "Ġyyyy"))
    assert "other ids for" in str(vocabulary_difference(renamed.parent, teacher))


def test_a_broken_tokenizer_is_refused(tiny_teacher: Any, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(StudentError, match="tokenizer in '.*broken' cannot be read.*delete all of them"):
        vocabulary_difference(broken, tiny_teacher("bert"))
