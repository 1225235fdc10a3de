"""What every masked-LM family of Transformers has to hold: it works, or it is refused by name; nothing in between.

In: a family's name. Out: an `Outcome`: which targets a build gives, which methods train students of which shapes, and
what was refused in which words. The families are those of Transformers' own mapping, so that a new release's are tried
by themselves; each is a tiny random model of 4 layers, 48 wide. One family costs about two seconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.settings import TrainSettings
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetBatch, TargetRequest, TopkLogits
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import DistillationError, first_line
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.models.families import encoder_of
from teacher_cache.read.reader import CacheReader
from tests.conftest import make_tokenizer

ALL = tuple(sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES))
SAMPLE = ("deberta-v2", "eurobert", "fnet", "longformer", "nomic_bert", "ultrabert")
"""Families that differ most in what they give."""
TARGETS = ("logits", "hidden", "attention")
METHODS = {"od": "logits", "hs": "hidden", "mha": "attention", "direct": "attention"}
SHAPES = ("2x48", "2x24:2")
SEQ_LEN, ATTENTION_LAYER = 24, 3

COMMON: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12,
    "intermediate_size": 96, "max_position_embeddings": 66, "initializer_range": 0.2,
}  # fmt: skip
"""Sizes by the names that most configurations have; each gets those that it knows."""
SPECIAL: dict[str, dict[str, Any]] = {
    # names of its own
    "distilbert": {"hidden_dim": 96},
    "perceiver": {"d_model": 48, "d_latents": 48, "num_latents": 8, "num_self_attends_per_block": 4},
    # layers in blocks
    "funnel": {"num_hidden_layers": None, "block_sizes": [2, 2], "d_head": 12, "d_inner": 96},
    # widths beside the hidden one
    "deberta": {"pooler_hidden_size": 48},
    "deberta-v2": {"pooler_hidden_size": 48},
    "electra": {"embedding_size": 24},
    "squeezebert": {"embedding_size": 48},
    "mobilebert": {"embedding_size": 24, "intra_bottleneck_size": 24},
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 24},
    "convbert": {"embedding_size": 48, "head_ratio": 2, "conv_kernel_size": 3},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "reformer": {"attn_layers": ["local"] * 4, "attention_head_size": 12, "feed_forward_size": 96, "is_decoder": False,
                 "axial_pos_embds": False, "local_attn_chunk_length": 8},
    # attention windows no longer than a row
    "longformer": {"attention_window": [8, 8, 16, 16]},
    # as in real ones, fewer landmarks than positions
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": SEQ_LEN},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 3},
    # rotary axes want heads of such a width
    "neomme": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
    # a language is needed, and this is the one
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""What some families need beside the common sizes, by the reason."""


@dataclass(kw_only=True)
class Outcome:
    """`refused` has what was refused in which words; `methods` those that trained, exported and were measured."""

    family: str
    targets: tuple[str, ...] = ()
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    random: set[str] = field(default_factory=set)
    """Shapes that start from random weights alone."""

    def row(self) -> str:
        """The outcome as a row of the table of families."""
        given = ", ".join(f"`{name}`" for name in self.targets) or "no"
        students = [self._methods_of(shape) for shape in SHAPES]
        return f"| {self.family} | {given} | {students[0]} | {students[1]} |"

    def _methods_of(self, shape: str) -> str:
        names = ", ".join(f"`{name}`" for name in self.methods.get(shape, ())) or "no"
        return f"{names} (`--init random`)" if shape in self.random else names


HEADING = "| family | targets | student `2x48` | student `2x24:2` |\n|---|---|---|---|"


def make_config(family: str) -> PreTrainedConfig:
    """A tiny configuration of the family."""
    known = AutoConfig.for_model(family)
    tokenizer = make_tokenizer(family)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    sizes = COMMON | ids | {"vocab_size": len(tokenizer)}
    settings = {name: value for name, value in sizes.items() if hasattr(known, name)} | SPECIAL.get(family, {})
    for name in known.sub_configs:
        part = getattr(known, name)
        if part is not None and hasattr(part, "vocab_size"):
            settings[name] = {key: value for key, value in sizes.items() if hasattr(part, key)}
    given = {known.attribute_map.get(name, name): value for name, value in settings.items() if value is not None}
    return AutoConfig.for_model(family, **given)


def save_teacher(folder: Path, family: str) -> None:
    """A random masked language model of the family with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_config(make_config(family))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)


def try_family(family: str, corpus: Path, folder: Path) -> Outcome:
    """Everything with one family. Whatever is no `DistillationError` is a defect and comes out."""
    outcome = Outcome(family=family)
    save_teacher(folder / "teacher", family)
    outcome.targets = _build(outcome, folder, corpus)
    if outcome.targets:
        check_against_live_model(folder / "teacher", folder / "cache.zarr", outcome.targets)
        for shape in SHAPES:
            outcome.methods[shape] = _train(outcome, shape, folder)
    return outcome


def _build(outcome: Outcome, folder: Path, corpus: Path) -> tuple[str, ...]:
    def build(targets: Iterable[str]) -> None:
        shutil.rmtree(folder / "cache.zarr", ignore_errors=True)
        settings = BuildSettings(
            teacher=str(folder / "teacher"), corpus=(str(corpus),), out=str(folder / "cache.zarr"), seq_len=SEQ_LEN,
            max_rows=24, block_rows=12, batch_size=6, k=8, layers="2,4", attention_layer=ATTENTION_LAYER,
            precision="float16", targets=",".join(targets), device="cpu",
        )  # fmt: skip
        build_cache(settings)

    return _what_works(TARGETS, build, outcome.refused, "targets")


def _train(outcome: Outcome, shape: str, folder: Path) -> tuple[str, ...]:
    def run(methods: Iterable[str], init: str = "auto") -> None:
        out = folder / f"student-{shape}-{'+'.join(methods)}"
        settings = TrainSettings(
            method="+".join(methods), cache=(str(folder / "cache.zarr"),), out=str(out), student=shape, steps=2,
            init=init, batch_size=8, valid_share=0.2, valid_every=2, relation_heads=2, device="cpu",
            mapping="2:4" if "hs" in methods else "uniform+last",
        )  # fmt: skip
        train(settings)
        sizes = AutoModel.from_pretrained(out).eval()(torch.arange(5, 5 + SEQ_LEN)[None]).last_hidden_state.shape
        assert sizes == (1, SEQ_LEN, int(shape.split(":")[0].split("x")[1])), "the exported student has another width"
        measure_fidelity(out, [str(folder / "cache.zarr")], device="cpu")

    names = tuple(name for name, target in METHODS.items() if target in outcome.targets)
    works = _what_works(names, run, outcome.refused, shape)
    if not works and "--init random" in outcome.refused[f"{shape} {names[0]}"]:
        outcome.random.add(shape)
        works = _what_works(names, lambda methods: run(methods, init="random"), outcome.refused, f"random {shape}")
    return works


def _what_works(
    names: tuple[str, ...], run: Callable[[tuple[str, ...]], None], refused: dict[str, str], what: str
) -> tuple[str, ...]:
    """All of them together, or else those of them that work alone, together."""
    try:
        run(names)
    except DistillationError as error:
        if len(names) == 1:
            refused[f"{what} {names[0]}"] = first_line(error)
            return ()
        good = tuple(name for name in names if _what_works((name,), run, refused, what))
        if good:
            run(good)
        return good
    return names


def check_against_live_model(teacher: Path, store: Path, targets: tuple[str, ...]) -> None:
    """What is cached is what the model computes, row by row without padding."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    if "attention" in targets:
        enable_tap(model)
    request = TargetRequest(
        hidden_layers=(2, 4) if "hidden" in targets else (),
        attention_layers=(ATTENTION_LAYER,) if "attention" in targets else (),
        logits="logits" in targets,
    )
    for batch in CacheReader.open(store).read_rows(6, 12, request).values():
        for row in range(len(batch.input_ids_BT)):
            _check_row(model, batch, row)


@torch.no_grad()
def _check_row(model: PreTrainedModel, batch: TargetBatch, row: int) -> None:
    ids_BT, mask_BT = batch.input_ids_BT[row : row + 1], batch.real_BT()[row : row + 1]
    with record_attention(encoder_of(model), batch.attention) as recorded:
        live = model(ids_BT, attention_mask=mask_BT.long(), output_hidden_states=True)
    for layer, values_BTD in batch.hidden.items():
        _check_close(values_BTD[row][mask_BT[0]], live.hidden_states[layer][0][mask_BT[0]])
    for layer, vectors in batch.attention.items():
        for name in VECTORS:
            want_TD = getattr(recorded.vectors[layer], f"{name}_BTD")[0][mask_BT[0]]
            _check_close(getattr(vectors, f"{name}_BTD")[row][mask_BT[0]], want_TD)
    if isinstance(batch.logits, TopkLogits) and batch.places is not None:
        real_M = batch.places.real_BM()[row]
        want_MV = live.logits[0, batch.places.positions_BM[row][real_M]].log_softmax(-1)
        ids_MK = batch.logits.ids_BMK[row][real_M].long()
        _check_close(batch.logits.log_probs_BMK[row][real_M], want_MV.gather(1, ids_MK))
        assert torch.allclose(want_MV.topk(ids_MK.shape[1]).values.sum(1), want_MV.gather(1, ids_MK).sum(1), atol=1e-3)


def _check_close(have: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 0, "equal values would agree with anything"
    assert (have - want).abs().max() <= 4e-3 * want.abs().max(), "what is cached is not what the model computes"
