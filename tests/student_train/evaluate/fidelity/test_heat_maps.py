"""Relations of teacher and student on a sentence, against the models themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

from student_train.evaluate.fidelity import heat_maps
from student_train.evaluate.fidelity.heat_maps import relation_maps
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import relation_matrices
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.pool import open_caches


def test_relations_are_those_of_the_models(trained_run: Path, tiny_store: Path, tiny_teacher: Any) -> None:
    """The teacher's against the teacher itself, the student's against the student, both on the row from the store."""
    maps = relation_maps(trained_run, [str(tiny_store)])
    batch = open_caches([str(tiny_store)]).read_rows(
        maps.row, maps.row + 1, TargetRequest(attention_layers=(maps.teacher_layer,))
    )[maps.view]  # fmt: skip
    assert maps.held_out and maps.row >= 91 and maps.heads == 2
    for folder, layer, found in (
        (tiny_teacher("bert"), maps.teacher_layer, maps.teacher),
        (trained_run, maps.student_layer, maps.student),
    ):
        model = AutoModelForMaskedLM.from_pretrained(folder).eval().base_model
        enable_tap(model)
        with torch.no_grad(), record_attention(model, {layer}) as recorded:
            model(input_ids=batch.input_ids_BT.long(), attention_mask=batch.real_BT().long())
        for name in VECTORS:
            vectors = getattr(recorded.vectors[layer], f"{name}_BTD")
            mean = relation_matrices(vectors, maps.heads, batch.real_BT())[0].mean(0).numpy()
            size = len(maps.tokens)
            windows = np.lib.stride_tricks.sliding_window_view(mean, (size, size))
            assert np.abs(windows - found[name]).max((-1, -2)).min() < 2e-3
    assert all(kl > 0 for kl in maps.kl.values())


def windows_of(*sentences: int, special: tuple[int, ...] = ()) -> slice | None:
    """Of sentences with so many tokens each, the last of them a full stop."""
    tokens = [token for length in sentences for token in (*["word"] * (length - 1), ".")]
    return heat_maps._sentence(tokens, [place in special for place in range(len(tokens))])


def test_the_first_sentence_of_a_length_to_look_at() -> None:
    assert windows_of(5, 14, 13) == slice(5, 19)
    assert windows_of(5, 11, 24) == slice(16, 40), "11 are too few, 24 just few enough"
    assert windows_of(5, 25, 8) is None
    # what a row begins with may be the rest of a sentence
    assert windows_of(14, 14) == slice(14, 28)
    # special tokens end a sentence and do not belong to it
    assert windows_of(30, special=(0, 13)) == slice(1, 13)
