"""What stands around text, for encoders and decoders."""

from __future__ import annotations

import pytest

from teacher_cache.corpus.frame import RowFrame
from teacher_cache.errors import TeacherError

BOS, EOS, PAD = 2, 3, 0


def test_an_encoder_ends_every_row_and_every_document_in_its_suffix(tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    frame = RowFrame.of(tokenizer)
    assert frame == RowFrame(prefix=(cls,), suffix=(sep,), separator=sep, ending=(sep,), padding=tokenizer.pad_token_id)


@pytest.mark.parametrize(
    "template, prefix",
    [("$A", ()), ("<bos> $A", (BOS,)), ("<bos> $A <eos>", (BOS,)), ("$A <eos>", ()), ("<bos> <bos> $A", (BOS, BOS))],
)
@pytest.mark.parametrize("pad", [True, False])
def test_only_whole_documents_of_a_decoder_end(template: str, prefix, pad: bool, causal_tokenizer) -> None:
    frame = RowFrame.of(causal_tokenizer(template, pad=pad), causal=True)
    assert frame == RowFrame(prefix=prefix, suffix=(), separator=EOS, ending=(EOS,), padding=PAD if pad else EOS)


def test_a_decoder_separates_by_the_end_of_text_whatever_else_it_has(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.sep_token = "<bos>"
    assert RowFrame.of(tokenizer, causal=True).separator == EOS
    assert RowFrame.of(tokenizer).separator == BOS
    tokenizer.eos_token = None
    assert RowFrame.of(tokenizer, causal=True).ending == (BOS,)


def test_what_is_lacking_is_named(causal_tokenizer) -> None:
    with pytest.raises(TeacherError, match="no padding token"):
        RowFrame.of(causal_tokenizer(pad=False))
    tokenizer = causal_tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(TeacherError, match=r"no separator \(sep_token or eos_token\) token"):
        RowFrame.of(tokenizer, causal=True)
