"""What a block can say: ids in planes of bytes against a plain look at each, and counts against their room. How whole
blocks are refused, with their array and block named, is in `tests/test_hostile_stores.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from teacher_cache.codecs.logits import TopkCodec, split_ids
from teacher_cache.read.values import ImpossibleError, _check_topk, check_entries


@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 300, 65536, 65537, 2**24 - 1])
def test_ids_in_planes_are_refused_from_the_vocabulary_on(vocabulary: int) -> None:
    codec = TopkCodec(entries=2, vocab_size=vocabulary, log_probs="root8")
    planes = len(split_ids(np.zeros(1, np.int64), vocabulary))
    draw = np.random.default_rng(vocabulary)
    near = vocabulary + draw.integers(-3, 3, size=20)
    for one in {0, vocabulary - 1, vocabulary, *near.tolist()}:
        if not 0 <= one < 256**planes:
            continue
        ids_KP = draw.integers(0, vocabulary, size=(2, 5))
        ids_KP[1, 3] = one
        coded = {f"logits/ids/{name}": plane for name, plane in split_ids(ids_KP, vocabulary).items()}
        arrays = {**coded, "logits/log_tail": np.zeros(5, np.float16)}
        if one < vocabulary:
            _check_topk(codec, arrays)
        else:
            with pytest.raises(ImpossibleError, match=f"holds {one}, which must be an id"):
                _check_topk(codec, arrays)


@pytest.mark.parametrize("tail", [0.0, -0.0, -1e-7, -3.5, -65504.0, -np.inf, 1e-4])
def test_logarithms_of_probabilities_are_taken(tail: float) -> None:
    codec = TopkCodec(entries=1, vocab_size=9, log_probs="float16")
    ids = {"logits/ids/low": np.zeros((1, 1), np.uint8), "logits/log_probs": np.full((1, 1), tail, np.float16)}
    _check_topk(codec, {**ids, "logits/log_tail": np.full(1, tail, np.float16)})
    for wrong in (np.nan, -np.nan, np.inf, 0.5):
        with pytest.raises(ImpossibleError, match="must be the logarithm of a probability"):
            _check_topk(codec, {**ids, "logits/log_tail": np.full(1, wrong, np.float16)})


def test_entries_are_within_their_room() -> None:
    check_entries("count", 0, 5)
    check_entries("count", 5, 5)
    for held in (-1, 6):
        with pytest.raises(ImpossibleError, match=f"counts {held} entries, where there is room for 5"):
            check_entries("count", held, 5)
