"""What cannot teach is refused by name, and what was loaded has a fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, T5Config

from teacher_cache.errors import TeacherError
from teacher_cache.teacher.loading import check_loaded, check_tokenizer, hash_weights, load_teacher_config
from teacher_cache.teacher.teacher import Teacher
from tests.causal_models import save_teacher


def test_unknown_names_say_what_to_do() -> None:
    with pytest.raises(TeacherError, match="(?s)'no/such-teacher' cannot be loaded.*folder of a downloaded model"):
        Teacher.load("no/such-teacher")


def test_decoders_teach_and_encoder_decoders_are_refused_by_family(tmp_path: Path) -> None:
    record = Teacher.load(str(save_teacher(tmp_path / "gpt2", "gpt2", vocab_size=112)), device="cpu").record
    assert (record.kind, record.distribution_view, record.layers, record.max_positions) == ("causal-lm", "plain", 4, 64)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(TeacherError, match="family 't5', an encoder-decoder"):
        Teacher.load(str(tmp_path / "t5"))


def test_an_incomplete_checkpoint_is_refused(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layer.2.attention.self.query.weight" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="lacks 1 weights of the base model.*layer.2.attention.self.query.weight"):
        Teacher.load(str(folder))


def test_a_teacher_without_tokenizer_files_is_refused(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    for file in folder.glob("tok*"):
        file.unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        Teacher.load(str(folder))


@pytest.mark.parametrize(
    "change, why",
    [
        ({"normalizer": {"type": "OfTheFuture"}}, "did not match any variant"),
        ({"model": {"type": "OfTheFuture", "vocab": {}}}, "OfTheFuture|did not match any variant"),
        ({"version": "9.0"}, "9.0|version"),
        ({"added_tokens": 7}, "not iterable"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_read_are_a_message(
    tiny_teacher_copy: Callable[..., Path], change: dict[str, Any], why: str
) -> None:
    path = tiny_teacher_copy("bert") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TeacherError, match=f"(?s)tokenizer of teacher .* cannot be read .*({why}).*install"):
        Teacher.load(str(path.parent))


def test_a_tokenizer_without_its_package_is_a_message(tiny_teacher_copy: Callable[..., Path]) -> None:
    """Japanese BERT cuts words with a package that not everybody has."""
    path = tiny_teacher_copy("bert") / "tokenizer_config.json"
    changes = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(TeacherError, match="tokenizer of teacher .* cannot be read .*install"):
        Teacher.load(str(path.parent))


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_weights_are_a_message(tiny_teacher: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(range(256)) * 9)
    with pytest.raises(TeacherError, match="cannot be loaded.*not a readable model"):
        Teacher.load(str(folder))


@pytest.mark.parametrize("lost", ["pooler.dense.weight", "cls.predictions.bias"])
def test_what_is_outside_of_the_encoder_may_be_missing(tiny_teacher: Callable[..., Path], lost: str) -> None:
    """Then there is no head of the checkpoint's own, and that is said."""
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert"))
    assert check_loaded("teacher", model, []) is True
    assert check_loaded("teacher", model, [lost]) is False


def test_missing_encoder_weights_are_counted_and_one_is_named(tiny_teacher: Callable[..., Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert"))
    lost = [f"bert.encoder.layer.{layer}.output.dense.bias" for layer in (3, 1, 2)]
    with pytest.raises(
        TeacherError, match=r"lacks 3 weights of the base model \(first: 'bert.encoder.layer.1.output.dense.bias"
    ):
        check_loaded("teacher", model, [*lost, "cls.predictions.bias"])


def test_a_tokenizer_of_another_model_is_refused(tiny_tokenizer: Callable[..., Any]) -> None:
    tokenizer = tiny_tokenizer("bert")
    check_tokenizer("teacher", tokenizer, AutoConfig.for_model("bert", vocab_size=200), "masked-lm")
    with pytest.raises(
        TeacherError, match="has ids up to 199, its embeddings end at 198: .* files of different models"
    ):
        check_tokenizer("teacher", tokenizer, AutoConfig.for_model("bert", vocab_size=199), "masked-lm")
    tokenizer.pad_token = None
    with pytest.raises(TeacherError, match="no padding token: .* set pad_token in its tokenizer_config.json"):
        check_tokenizer("teacher", tokenizer, AutoConfig.for_model("bert", vocab_size=200), "masked-lm")
    check_tokenizer("teacher", tokenizer, AutoConfig.for_model("llama", vocab_size=200), "causal-lm")


def test_an_added_token_of_a_decoder_may_lack_an_embedding_unless_rows_need_it(
    tiny_tokenizer: Callable[..., Any],
) -> None:
    config, tokenizer = AutoConfig.for_model("llama", vocab_size=200), tiny_tokenizer("bert")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    check_tokenizer("teacher", tokenizer, config, "causal-lm")
    with pytest.raises(TeacherError, match="has ids up to 200, its embeddings end at 199"):
        check_tokenizer("teacher", tokenizer, config, "masked-lm")
    with pytest.raises(TeacherError, match="has ids up to 199, its embeddings end at 198"):
        check_tokenizer("teacher", tokenizer, AutoConfig.for_model("llama", vocab_size=199), "causal-lm")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(TeacherError, match="has ids up to 201, its embeddings end at 199"):
        check_tokenizer("teacher", tokenizer, config, "causal-lm")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model_type": "no-such-family"}', b"\xff\xfe"])
def test_a_configuration_that_cannot_be_read_is_a_message(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(TeacherError, match="cannot be loaded .it is there, but not a readable model"):
        load_teacher_config(str(tmp_path), None)


def small_model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3, bias=False))


CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "a value": lambda model: model[0].weight.data[2, 1].mul_(1 + 2**-20),
    "two values": lambda model: model[1].weight.data.copy_(model[1].weight.data.flip(0)),
    "a type": lambda model: model.bfloat16(),
    "a shape": lambda model: setattr(model[0].weight, "data", model[0].weight.data.view(3, 4)),
    "a name": lambda model: model.add_module("2", model._modules.pop("1")),
    "one more": lambda model: model.register_buffer("empty", torch.empty(0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_other_weight_is_another_fingerprint(name: str) -> None:
    model = small_model()
    CHANGES[name](model)
    assert hash_weights(model) != hash_weights(small_model())


def test_the_fingerprint_is_that_of_names_types_shapes_and_bytes() -> None:
    """Beside a plain computation; how weights lie in memory and in what order they come does not count."""
    model = small_model()
    digest = hashlib.sha256()
    for key in sorted(model.state_dict()):
        values = model.state_dict()[key].numpy()
        digest.update(f"{key} torch.float32 {values.shape}\n".encode() + values.tobytes())
    assert hash_weights(model) == digest.hexdigest()
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    assert not model[0].weight.is_contiguous() and hash_weights(model) == digest.hexdigest()
