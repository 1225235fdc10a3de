"""The parts of an encoder by their role: found in every family that is built like BERT, and in no other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from student_train.students.narrowing.parts import LayerParts, find_parts

FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_layer_has_a_role(family: str, tiny_teacher: Any) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family))
    parts = find_parts(model)
    assert parts is not None and parts.head is not None
    assert (parts.width, parts.units, parts.heads, len(parts.layers)) == (32, 64, 4, 4)
    for layer in parts.layers:
        modules = [getattr(layer, field.name) for field in fields(LayerParts) if field.name != "module"]
        found = {id(parameter) for module in modules for parameter in module.parameters()}
        assert found == {id(parameter) for parameter in layer.module.parameters()}
    named = {name: table.num_embeddings for name, table in parts.tables.items()}
    assert named["word_embeddings"] == 200 and "position_embeddings" in named


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layer_is_computed_by_its_parts(family: str, tiny_teacher: Any) -> None:
    """The feed-forward half of the last layer, from what its attention norm gives, and the head above it."""
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher(family)).eval()
    parts = find_parts(model)
    assert parts is not None and parts.head is not None
    last, attended = parts.layers[-1], []
    last.attention_norm.register_forward_hook(lambda _, __, output: attended.append(output))
    output = model(torch.arange(5, 25)[None], output_hidden_states=True)
    inner = torch.nn.functional.gelu(last.inner(attended[0]))
    hidden = last.output_norm(last.outer(inner) + attended[0])
    torch.testing.assert_close(hidden, output.hidden_states[-1])
    logits = parts.head.decoder(parts.head.norm(parts.head.activation(parts.head.transform(hidden))))
    torch.testing.assert_close(logits, output.logits)


def test_embeddings_of_a_width_of_their_own(tiny_teacher: Any) -> None:
    electra, bert = (find_parts(AutoModel.from_pretrained(tiny_teacher(family))) for family in ("electra", "bert"))
    assert electra is not None and bert is not None
    assert electra.projection is not None
    assert (electra.projection.in_features, electra.projection.out_features) == (16, 32)
    assert electra.embedding_norm.normalized_shape == (16,)
    assert bert.projection is None and bert.head is None


@pytest.mark.parametrize("family", ["modernbert", "roberta-prelayernorm", "xlm-roberta-xl"])
def test_families_that_are_built_otherwise_have_none(family: str, tiny_teacher: Any) -> None:
    assert find_parts(AutoModel.from_pretrained(tiny_teacher(family))) is None
