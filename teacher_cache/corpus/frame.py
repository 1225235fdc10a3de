"""What stands around text: the special tokens of a row, what ends a document, and what fills a short row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from teacher_cache.corpus.tokens import encode
from teacher_cache.errors import SettingsError, TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"


@dataclass(frozen=True, kw_only=True)
class RowFrame:
    """What stands around the text of every row, between documents, and what fills a short row.

    `separator` stands between documents that see each other; `ending` ends one that stands alone, as its `prefix`
    begins it. A causal model learns where a text ends from the token there, so only whole documents end in it: its
    rows have no `suffix`.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int
    ending: tuple[int, ...]
    padding: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, causal: bool = False) -> RowFrame:
        """Find the special tokens by encoding something: families differ, and the tokenizer alone knows.

        Tokenizers of decoders often have no padding token. What fills a row is never seen by a causal model's real
        positions, and a row's length says where it begins, so the end-of-text token does.

        Raises:
            TeacherError: the tokenizer has no separator, or no padding token for an encoder.
        """
        plain = encode(tokenizer, [PROBE], special=False)[0]
        whole = encode(tokenizer, [PROBE], special=True)[0]
        starts = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
        if not starts:
            raise TeacherError(
                f"the tokenizer {tokenizer.name_or_path!r} reads {PROBE!r} as {plain} alone and as {whole} in a row: "
                "where text stands between special tokens cannot be told, so rows cannot be made; use the teacher's "
                "own tokenizer"
            )
        prefix, suffix = tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :])
        separators = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        separator = next((token for token in (separators[::-1] if causal else separators) if token is not None), None)
        padding = separator if causal and tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for name, token in (("separator (sep_token or eos_token)", separator), ("padding", padding)):
            if token is None:
                raise TeacherError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no {name} token: rows of text cannot be made "
                    "without it; set it in the teacher's tokenizer_config.json"
                )
        return cls(
            prefix=prefix,
            suffix=() if causal else suffix,
            separator=cast(int, separator),
            ending=suffix or (cast(int, separator),),
            padding=cast(int, padding),
        )

    def text_positions(self, seq_len: int) -> int:
        """Positions of a row that hold text.

        Raises:
            SettingsError: the special tokens alone fill the row.
        """
        around = len(self.prefix) + len(self.suffix)
        if seq_len <= around:
            raise SettingsError(
                f"--seq-len {seq_len!r} leaves no room for text: the tokenizer puts {around} special tokens around "
                f"each row; give at least {around + 1}, 128 is usual"
            )
        return seq_len - around
