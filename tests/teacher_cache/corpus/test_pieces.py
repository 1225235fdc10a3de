"""Long documents in pieces: the ids of the whole, for every kind of tokenizer, or the whole."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teacher_cache.corpus import pieces
from teacher_cache.corpus.pieces import cut
from teacher_cache.errors import CorpusError

PROSE = " ".join(
    f'The {number}th word, isn\'t it? "Łódź" (e\u0301) <mask> x\u3000y 東京は {number:,}.\nNext  line\t— and so on…'
    for number in range(400)
)
SPLIT = {
    "bert": (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a prefix": (normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "metaspace": (normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "metaspace after white space": (None, pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
}  # fmt: skip
WHOLE = {
    "no words": (None, None),
    "metaspace without words": (None, pre_tokenizers.Metaspace(split=False)),
    "stripped": (normalizers.Strip(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prepended": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizers.Split("\n", "isolated"),
    ),
}


def trained(normalizer, pre_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    # merges across spaces, where nothing splits at them
    tokenizer.train_from_iterator(
        [PROSE[:4000]], trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<mask>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>")


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1 << 10)


def check(document: str, tokenizer) -> list[str]:
    found = list(cut(document, tokenizer))
    assert "".join(found) == document

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert [token for piece in found for token in ids(piece)] == ids(document)
    return found


@pytest.mark.parametrize("name", SPLIT)
def test_pieces_have_the_ids_of_the_whole(name: str) -> None:
    found = check(PROSE, trained(*SPLIT[name]))
    assert max(map(len, found)) <= 1 << 10
    assert len(found) > len(PROSE) >> 10


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_shown_stays_whole_up_to_a_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(PROSE, trained(*WHOLE[name])) == [PROSE]
    monkeypatch.setattr(pieces, "MOST_UNCUT", 5000)
    with pytest.raises(CorpusError, match=r"begins 'The 0th .* from character 0 on there is no place"):
        check(PROSE, trained(*WHOLE[name]))


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 4096, 100_000])
def test_a_stretch_without_white_space_is_never_torn(length: int, tiny_tokenizer) -> None:
    found = check("babo " * 400 + "x" * length + " debo" * 400, tiny_tokenizer())
    assert any(re.search(f"(?<!x)x{{{length}}}(?!x)", piece) for piece in found)


def test_characters_that_are_words_are_cut_after_punctuation() -> None:
    assert max(map(len, check("東京は大きい。" * 1000, trained(*SPLIT["bert"])))) <= 1 << 10


def test_real_text_and_tokenizer(shared_xlm_tokenizer: Path, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_xlm_tokenizer)
    for language in ("de-novels", "zh-wikipedia", "ko-wikipedia"):
        with gzip.open(shared_data / "corpus" / f"{language}.txt.gz", "rt") as file:
            text = file.read(100_000)
        assert len(check(text, tokenizer)) > 75


def test_memory_does_not_grow_with_a_document(tiny_tokenizer, tmp_path: Path) -> None:
    """The tokenizer of a document ten times as long takes no more memory beside the text and its ids."""
    tiny_tokenizer().save_pretrained(tmp_path)
    program = """
import resource, sys
from transformers import AutoTokenizer
from teacher_cache.corpus.tokens import tokenise
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for _ in tokenise(["babo debo " * 100_000], tokenizer): pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in tokenise(["babo debo " * 1_000_000], tokenizer): pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300_000  # kB; as a whole it takes 2 GB
