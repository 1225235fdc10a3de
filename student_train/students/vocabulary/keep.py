"""From the ids that are used to those that stay: all that tokenizer, configuration and model need is added.

In: a tokenizer, a configuration, counts. Out: a `KeptIds`. Nothing is cut here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedConfig

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.needed import needed_ids
from student_train.students.vocabulary.tokenizer import description_of
from student_train.students.vocabulary.weights import ids_in
from teacher_cache.errors import SettingsError, StudentError

LEAST_USED = 16
"""Ids that a text has to use, special ones left out, before it is taken for one."""


def keep_ids(
    tokenizer: Any,
    counts_V: NDArray[np.int64],
    used: NDArray[np.int64],
    config: PreTrainedConfig,
    folder: Path,
    name: str,
) -> KeptIds:
    """The used ids and all that tokenizer, configuration and model need beside them.

    Args:
        tokenizer: of the model.
        counts_V: how often the text has each id.
        used: ids that are to stay.
        config: of the model.
        folder: of the model, where it may have settings for generation.
        name: of the model, for messages.

    Raises:
        SettingsError: next to nothing is used.
        StudentError: the tokenizer is of a kind that cannot be cut.
    """
    description, entries = description_of(tokenizer, name), len(counts_V)
    named = ids_in(config) | _ids_of_generation(folder)
    always = {token["id"] for token in description["added_tokens"]} | named | set(tokenizer.all_special_ids)
    found = set(used.tolist()) - always
    if len(found) < LEAST_USED:
        raise SettingsError(
            f"the text uses {len(found)} of the {entries:,} ids of {name!r}, special ones left out: a vocabulary of "
            f"these would know no language; give a text that uses {LEAST_USED} at least, or a larger share"
        )
    needed = needed_ids(description, counts_V, found | always, name)
    padding = getattr(config, "pad_token_id", None)
    if type(padding) is int and padding < LEAST_USED:
        # RoBERTa-like models count positions from the id of padding on, which must stay what it is
        needed |= set(range(padding))
    return KeptIds.of((each for each in needed if each < entries), entries, _stand_in(tokenizer, always, entries, name))


def _stand_in(tokenizer: Any, always: set[int], entries: int, name: str) -> int:
    """The unknown token; where there is none, the mask, the end of a text, or another special one."""
    ids = (tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id, *sorted(always))
    found = next((each for each in ids if type(each) is int and each < entries), None)
    if found is None:
        raise StudentError(
            f"the tokenizer of {name!r} has no special token: nothing could stand where a dropped id was read; leave "
            "the vocabulary whole"
        )
    return found


def _ids_of_generation(folder: Path) -> set[int]:
    try:
        return ids_in(GenerationConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError):
        return set()
