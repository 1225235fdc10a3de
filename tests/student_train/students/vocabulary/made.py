"""Small tokenizers of every kind, trained on text of made-up words, and what the tests do with them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.needed import needed_ids
from student_train.students.vocabulary.tokenizer import trimmed_description

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
KINDS = ("byte-bpe", "suffix-bpe", "prefix-bpe", "fallback-bpe", "whole-bpe", "wordpiece", "unigram", "wordlevel")
_ENTRIES = 340
_LETTERS = "abcdeéfgßhijklmnopжqдrstuvwxyz中国語日本"


@cache
def documents(seed: int = 0, count: int = 300) -> tuple[str, ...]:
    """Lines of words, of which some are frequent: letters follow each other with a liking."""
    draw = random.Random(seed)
    words = []
    for _ in range(250):
        place, letters = draw.randrange(len(_LETTERS)), []
        for _ in range(draw.randint(1, 9)):
            letters.append(_LETTERS[place])
            place = (3 * place + draw.choice((0, 1, 1, 2, draw.randrange(30)))) % len(_LETTERS)
        words.append("".join(letters))
    weights = [1 / (1 + place) for place in range(len(words))]
    return tuple(" ".join(draw.choices(words, weights, k=draw.randint(3, 12))) for _ in range(count))


@cache
def description(kind: str) -> dict[str, Any]:
    """`tokenizer.json` of such a tokenizer."""
    return json.loads(_trained(kind).to_str())


def _trained(kind: str) -> Tokenizer:
    common: dict[str, Any] = {"vocab_size": _ENTRIES, "special_tokens": SPECIAL, "show_progress": False}
    trainer: Any
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(**common, unk_token="<unk>")
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        trainer = trainers.WordPieceTrainer(**common)
    elif kind == "wordlevel":
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(**common)
    elif kind == "prefix-bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        trainer = trainers.BpeTrainer(**common, continuing_subword_prefix="##")
    elif kind == "suffix-bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        trainer = trainers.BpeTrainer(**common, end_of_word_suffix="</w>")
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-bpe" else []
        trainer = trainers.BpeTrainer(**{**common, "vocab_size": 500}, initial_alphabet=alphabet)
    made.pre_tokenizer = {
        "byte-bpe": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "unigram": pre_tokenizers.Metaspace(),
        "fallback-bpe": pre_tokenizers.Metaspace(),
    }.get(kind, pre_tokenizers.WhitespaceSplit())
    made.train_from_iterator(documents(), trainer)
    if kind in ("fallback-bpe", "whole-bpe"):
        made = _converted(made, bytes_stand_in=kind == "fallback-bpe")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return made


def _converted(made: Tokenizer, *, bytes_stand_in: bool) -> Tokenizer:
    """As those that are converted from SentencePiece: bytes beside the pieces, and every way of making a piece a merge.

    Without bytes: whole words are looked up before anything is merged.
    """
    fields = json.loads(made.to_str())
    model = fields["model"]
    pieces = model["vocab"]
    if bytes_stand_in:
        for byte in range(256):
            pieces[f"<0x{byte:02X}>"] = len(pieces)
        ways = [
            [piece[:cut], piece[cut:]]
            for piece, _ in sorted(pieces.items(), key=lambda item: item[1])
            for cut in range(1, len(piece))
            if piece not in SPECIAL and not piece.startswith("<0x") and piece[:cut] in pieces and piece[cut:] in pieces
        ]
        model |= {"byte_fallback": True, "merges": ways}
    else:
        model |= {"ignore_merges": True}
        # a word that no merge leads to
        pieces["zzqq"] = len(pieces)
    made = Tokenizer.from_str(json.dumps(fields))
    if bytes_stand_in:
        made.decoder = decoders.ByteFallback()
    return made


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The same as Transformers has it."""
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description(kind))),
        **{f"{name}_token": token for name, token in names.items()},
    )


def whole(kind: str) -> Tokenizer:
    """The same of the tokenizers library."""
    return Tokenizer.from_str(json.dumps(description(kind)))


def entries(kind: str) -> int:
    """How many ids it has."""
    return whole(kind).get_vocab_size()


def ids_of(made: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """The ids of each text, none put around it."""
    return [made.encode(text, add_special_tokens=False).ids for text in texts]


def cut(kind: str, texts: Sequence[str], drop: Iterable[int] = ()) -> tuple[Tokenizer, KeptIds]:
    """The tokenizer with what these texts use alone, without some of it."""
    fields, size = description(kind), entries(kind)
    counts = np.bincount([each for ids in ids_of(whole(kind), texts) for each in ids], minlength=size)
    used = set(counts.nonzero()[0].tolist()) - set(drop)
    unknown = whole(kind).token_to_id("<unk>")
    kept = KeptIds.of(needed_ids(fields, counts, used, kind), size, unknown)
    return Tokenizer.from_str(json.dumps(trimmed_description(fields, kept))), kept
