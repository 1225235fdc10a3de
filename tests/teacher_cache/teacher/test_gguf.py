"""Teachers in GGUF files give what the model that they were made from gives, and stores keep them as plain folders.

The files are written here as llama.cpp's converter writes them: its names, its order of rotary components, its
tokenizer of merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import TeacherError
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.gguf import files_in, is_gguf, locate
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.verify.deep.deep import deep_check
from tests.causal_models import WORDS, make_model

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}  # fmt: skip
SYLLABLES = sorted({part for word in WORDS for part in (word[:2], word[2:])})
MERGES = [
    *(f"{one[0]} {one[1]}" for one in SYLLABLES),
    *(f"Ġ {one}" for one in sorted({word[:2] for word in WORDS})),
    *(f"Ġ{word[:2]} {word[2:]}" for word in WORDS),
]
TOKENS = list(
    dict.fromkeys(["<|endoftext|>", "Ġ", *sorted(set("".join(WORDS))), *(one.replace(" ", "") for one in MERGES)])
)  # fmt: skip


def llama() -> PreTrainedModel:
    return make_model("llama", vocab_size=len(TOKENS))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    architecture: str = "llama",
    add: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """A model as llama.cpp keeps it; matrices in a number type of its own."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 1)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        values = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        if name in OUTER:
            theirs = OUTER[name]
        else:
            _, _, layer, inner, _ = re_split(name)
            theirs = f"blk.{layer}.{NAMES[inner]}.weight"
            if inner.endswith(("q_proj", "k_proj")):
                values = interleave(values, config.head_dim)
        if values.ndim == 2 and kind != "F32":
            number_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(theirs, gguf.quants.quantize(values, number_type), raw_dtype=number_type)
        else:
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def re_split(name: str) -> tuple[str, str, str, str, str]:
    """model.layers.3.self_attn.q_proj.weight in five parts."""
    model, layers, layer, rest = name.split(".", 3)
    inner, _, kind = rest.rpartition(".")
    return model, layers, layer, inner, kind


def interleave(weight: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of each head from (first half, second half), which rotate together, to pairs side by side."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", llama())


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None] % len(TOKENS)).logits[0]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_weights_are_those_of_the_model(tmp_path: Path, kind: str) -> None:
    model = llama()
    teacher = Teacher.load(str(write_gguf(tmp_path / "model.gguf", model, kind)), device="cpu")
    assert {weight.dtype for weight in teacher.model.parameters()} == {torch.float32}
    for name, weight in model.state_dict().items():
        # as the file's own number type has it, to the last bit
        values, number_type = weight.numpy(), gguf.GGMLQuantizationType[kind]
        if weight.ndim == 2 and kind != "F32":
            values = gguf.quants.dequantize(gguf.quants.quantize(values, number_type), number_type)
        assert np.array_equal(teacher.model.state_dict()[name].numpy(), values), name
    if kind == "F32":
        assert torch.equal(logits_of(teacher.model), logits_of(model))
    assert (teacher.record.kind, teacher.record.model_type, teacher.record.max_positions) == ("causal-lm", "llama", 64)
    assert teacher.record.has_mlm_head and teacher.record.vocab_size == len(TOKENS)
    text = " ".join(WORDS[5:9])
    ids = teacher.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    assert [TOKENS[each] for each in ids] == [f"Ġ{word}" for word in WORDS[5:9]]


def test_a_store_of_it_keeps_a_plain_folder(file: Path, causal_settings: Callable[..., Any], tmp_path: Path) -> None:
    settings: BuildSettings = causal_settings(
        tmp_path / "cache.zarr", teacher=str(file), targets="logits,hidden", max_rows=12, precision="float16"
    )
    build_cache(settings)
    folder = tmp_path / "cache.zarr" / "teacher"
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    reader = CacheReader.open(settings.out)
    assert reader.manifest.teacher.name == str(file)
    again = AutoModelForCausalLM.from_pretrained(reader.teacher_folder())
    assert torch.equal(logits_of(again), logits_of(llama()))
    assert reader.read_rows(0, 12, TargetRequest(logits=True))["plain"].places is not None
    # by the copy that it keeps, and by the file
    assert deep_check(LocalStorage(settings.out), 12).ok
    assert deep_check(LocalStorage(settings.out), 4, teacher=str(file)).ok
    assert build_cache(settings).computed_rows == 0


def test_names(tmp_path: Path) -> None:
    assert (
        is_gguf("a/b/model.Q4_K_M.gguf")
        and not is_gguf("gguf")
        and not is_gguf("model.GGUF")
        and not is_gguf("owner/model-gguf")
    )
    assert locate("owner/name") == ("owner/name", {})
    assert locate("owner/name/model.gguf") == ("owner/name", {"gguf_file": "model.gguf"})
    assert locate("owner/name/Q8/model.gguf") == ("owner/name", {"gguf_file": "Q8/model.gguf"})
    assert locate("model.gguf") == (".", {"gguf_file": "model.gguf"})
    assert locate(f"{tmp_path}/model.gguf") == (str(tmp_path), {"gguf_file": "model.gguf"})
    assert locate("/not/there/model.gguf") == ("/not/there", {"gguf_file": "model.gguf"})


def test_a_folder_of_gguf_files_says_which_to_give(file: Path, causal_teacher: Path) -> None:
    assert files_in(str(file.parent)) == [str(file)] and files_in(str(causal_teacher)) == [] == files_in("")
    with pytest.raises(TeacherError, match=f"folder of GGUF files .* such as --teacher {file}"):
        Teacher.load(str(file.parent))


def test_what_cannot_be_unpacked_is_refused_by_name(file: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", llama(), architecture="rwkv7")
    with pytest.raises(
        TeacherError, match=r"(?s)other.gguf' cannot be unpacked from GGUF \(the file is there\).*rwkv7"
    ):
        Teacher.load(str(other))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(TeacherError, match=r"broken.gguf' cannot be unpacked from GGUF \(the file is there\)"):
        Teacher.load(str(tmp_path / "broken.gguf"))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(TeacherError, match=r"cut.gguf' cannot be unpacked from GGUF"):
        Teacher.load(str(tmp_path / "cut.gguf"))
    for name in (f"{tmp_path}/none.gguf", "owner/name/none.gguf"):
        with pytest.raises(TeacherError, match=r"none.gguf' cannot be unpacked from GGUF \(no such file"):
            Teacher.load(name)


def linear_scaling(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


SCALINGS: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "as Llama 3.1": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.full(4, 2.0, dtype=np.float32)),
        r"\(rope_freqs.weight\)",
    ),
    "linear": (linear_scaling, r"\(llama.rope.scaling.factor = 4.0\)"),
    "a factor alone": (lambda writer: writer.add_rope_scaling_factor(4.0), r"\(llama.rope.scaling.factor = 4.0\)"),
    "another": (
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        r"\(llama.rope.scaling.type = yarn\)",
    ),
}


def scaling_by_one(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(1.0)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_that_transformers_does_not_read_are_refused(name: str, tmp_path: Path) -> None:
    add, said = SCALINGS[name]
    file = write_gguf(tmp_path / "model.gguf", llama(), add=add)
    with pytest.raises(TeacherError, match=f"scales its rotary positions {said}.* would be another model"):
        Teacher.load(str(file))


@pytest.mark.parametrize(
    "add", [lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), scaling_by_one]
)
def test_positions_that_are_said_not_to_be_scaled_are_fine(
    add: Callable[[gguf.GGUFWriter], None], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama(), add=add)
    assert Teacher.load(str(file)).record.model_type == "llama"


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr("teacher_cache.teacher.gguf.find_spec", lambda name: None if name == package else object())
    with pytest.raises(TeacherError, match=rf"takes the package '{package}'.*pip install 'kdcache\[gguf\]'"):
        Teacher.load(str(file))
