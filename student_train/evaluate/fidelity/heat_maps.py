"""Attention relations of teacher and student on one sentence: what a relation loss compares, to look at.

In: a student's directory and a cache. Out: `RelationMaps`: the tokens of a sentence of a held-out row, and how each
relates to each in the queries, keys and values of both models, mean over the relation heads. The teacher's come from
the cache, the student's from one forward pass on the same row; both are computed over the whole row, of which the
sentence is a part. The teacher is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_train.evaluate.fidelity.fidelity import plan_for, run_student
from student_train.evaluate.fidelity.plan import FidelityPlan
from student_train.evaluate.load import check_fit, load_student
from student_train.kernels.reference import visible_pairs
from student_train.losses.relations import heads_of, one_relation_loss
from student_train.students.pretrained import load_teacher_tokenizer
from teacher_cache.contract.batch import AttentionRelations, AttentionVectors, TargetBatch, TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import TargetsError
from teacher_cache.models.attention import relation_matrices
from teacher_cache.models.attention_tap import enable_tap
from teacher_cache.read.pool import CacheSource, open_caches

_SENTENCE_ENDS = frozenset(".!?。！？؟।")
_SHORTEST, _LONGEST = 12, 24
_ROWS_TRIED = 8


@dataclass(frozen=True, kw_only=True)
class RelationMaps:
    """Both models on a sentence. `teacher` and `student` hold [t, t] by vector; `kl` the nats of the whole row."""

    tokens: tuple[str, ...]
    row: int
    held_out: bool
    view: str
    student_layer: int
    teacher_layer: int
    heads: int
    teacher: Mapping[str, NDArray[np.float32]]
    student: Mapping[str, NDArray[np.float32]]
    kl: Mapping[str, float]
    key_value_heads: int | None = None
    causal: bool = False


def relation_maps(student: str | Path, caches: Sequence[str]) -> RelationMaps:
    """Relations on the first held-out row of a cache that has a sentence of a length to look at.

    Raises:
        StudentError: the student cannot be loaded, or has another vocabulary.
        StoreError: the cache cannot be read.
        TargetsError: the cache holds no attention that the student can be compared with.
    """
    reader = open_caches(caches)
    loaded = load_student(student)
    check_fit(loaded, reader.manifest, reader.teacher_folder())
    plan = plan_for(reader, loaded)
    if not plan.relations:
        raise TargetsError(
            f"{reader.path!r} holds no attention that the student can be compared with ({'; '.join(plan.notes)}): "
            "there are no relations to show; add them with `kdcache build --targets attention`"
        )
    pair = plan.relations[-1]
    row, targets, window, tokens = _find_sentence(reader, plan, pair.teacher_layer)
    enable_tap(loaded.encoder)
    with torch.inference_mode():
        own = run_student(loaded, targets, {pair.student_layer}).attention[pair.student_layer]
        taught = targets.attention[pair.teacher_layer]
        heads = {name: heads_of(name, pair.heads, pair.key_value_heads) for name in VECTORS}
        length = int(targets.length_B.sum())
        return RelationMaps(
            tokens=tuple(tokens[window]),
            row=row,
            held_out=plan.held_out,
            view=pair.view,
            student_layer=pair.student_layer,
            teacher_layer=pair.teacher_layer,
            heads=pair.heads,
            key_value_heads=pair.key_value_heads,
            causal=pair.causal,
            teacher={name: _map(name, taught, heads[name], targets, window, pair.causal) for name in VECTORS},
            student={name: _map(name, own, heads[name], targets, window, pair.causal) for name in VECTORS},
            kl={
                name: float(
                    one_relation_loss(
                        name,
                        own,
                        taught,
                        targets.length_B,
                        heads=heads[name],
                        causal=pair.causal,
                        starts_BT=targets.starts_BT,
                    )
                )
                / length
                for name in VECTORS
            },
        )


def _find_sentence(reader: CacheSource, plan: FidelityPlan, layer: int) -> tuple[int, TargetBatch, slice, list[str]]:
    """A held-out row, its targets, a sentence in it and all its tokens; the beginning of the first row at worst."""
    request = TargetRequest(attention_layers=(layer,))
    tokenizer: Any = load_teacher_tokenizer(reader.teacher_folder())
    found = []
    for row in [row for rows in plan.rows for row in rows][:_ROWS_TRIED]:
        (targets,) = reader.read_rows(row, row + 1, request).values()
        ids = targets.input_ids_BT[0, : int(targets.length_B[0])].tolist()
        tokens = [str(tokenizer.decode([each])).strip() or str(tokenizer.convert_ids_to_tokens(each)) for each in ids]
        special = [each in tokenizer.all_special_ids and each != tokenizer.mask_token_id for each in ids]
        window = _sentence(tokens, special)
        found.append((row, targets, window or slice(0, _LONGEST), tokens))
        if window is not None:
            return found[-1]
    return found[0]


def _sentence(tokens: Sequence[str], special: Sequence[bool]) -> slice | None:
    """The first stretch between two ends of sentences, or special tokens, that is neither short nor long."""
    start = 0
    for place, token in enumerate(tokens):
        end = token in _SENTENCE_ENDS
        if end or special[place]:
            stop = place + 1 if end else place
            # what a row begins with may be the end of a sentence cut in two
            if start > 0 and _SHORTEST <= stop - start <= _LONGEST:
                return slice(start, stop)
            start = place + 1
    return None


def _map(
    name: str,
    attention: AttentionVectors | AttentionRelations,
    heads: int,
    targets: TargetBatch,
    window: slice,
    causal: bool,
) -> NDArray[np.float32]:
    """[t, t] within the window: how each position of the row relates to each, mean over heads."""
    visible_BTT = visible_pairs(targets.input_ids_BT, causal, targets.starts_BT)
    if isinstance(attention, AttentionRelations):
        matrices_ATT: Tensor = getattr(attention, f"{name}_BATT")[0].float()
        if visible_BTT is not None:
            matrices_ATT = matrices_ATT * visible_BTT
            matrices_ATT = matrices_ATT / matrices_ATT.sum(-1, keepdim=True).clamp_min(1e-30)
    else:
        vectors_BTD = getattr(attention, f"{name}_BTD")
        matrices_ATT = relation_matrices(vectors_BTD, heads, targets.real_BT(), visible_BTT)[0]
    mean: NDArray[np.float32] = matrices_ATT.mean(0)[window, window].numpy()
    return mean
