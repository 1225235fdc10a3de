"""The flags of `kdeval perplexity`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.errors import SettingsError

DEFAULT_SEQ_LEN = 1024


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Measure the perplexity of a causal student on text, and bits per byte, which compare over tokenizers.

    Each document is read by itself, in overlapping windows where it is long. Every token of it is predicted once: the
    first one after the tokenizer's beginning of text, or where it has none, after its end of text. The end of a
    document is not predicted. A teacher reads the same text in its own tokens.
    """

    text: tuple[str, ...]
    """Text that the models have not seen: files, globs, folders or hub names, as kdcache build --corpus takes them."""

    student: str = "student"
    """Directory of the student: what kdtrain wrote, or any Hugging Face causal language model."""

    teacher: str | None = None
    """Directory or hub name of the model to compare with (default: none)."""

    seq_len: int | None = None
    """Tokens of a window, its beginning of text among them (default: 1024, or what the models can read)."""

    stride: int | None = None
    """Tokens from one window of a document to the next: all but the first window predict so many, after seq-len minus
    stride tokens of context (default: half of seq-len)."""

    max_tokens: int | None = None
    """End the text after so many tokens of the student's (default: read all)."""

    batch_size: int = 8
    """Windows per forward pass."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the models (auto: float32 on the CPU, bfloat16 on a GPU); probabilities are float32 in any case."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure (auto: on the GPU if there is one)."""

    json: bool = False
    """Print one JSON record on standard output instead of a table."""

    def __post_init__(self) -> None:
        if not self.text:
            raise SettingsError("--text names nothing, so there is nothing to predict: give a file or more")
        if self.seq_len is not None and self.seq_len < 2:
            raise SettingsError(
                f"--seq-len {self.seq_len!r} leaves no token that has another one before it: give 2 or more"
            )
        if self.batch_size < 1:
            raise SettingsError(f"--batch-size {self.batch_size!r} leaves nothing to run: give 1 or more")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise SettingsError(f"--max-tokens {self.max_tokens!r} leaves no text to measure on: give 2 or more")
        if self.stride is not None:
            check_stride(self.stride, self.seq_len)


def check_stride(stride: int, seq_len: int | None) -> None:
    """Refuse a stride that windows of `seq_len` tokens cannot have.

    Raises:
        SettingsError: some tokens would be predicted by none of the windows, or nothing would be new in the next one.
    """
    if stride < 1:
        raise SettingsError(f"--stride {stride!r} never comes to the next window: give 1 or more")
    if seq_len is not None and stride >= seq_len:
        raise SettingsError(
            f"--stride {stride!r} goes past windows of {seq_len} tokens, the first of which only gives context: tokens "
            f"between them would be left out; give at most {seq_len - 1}"
        )
