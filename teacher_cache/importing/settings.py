"""What `kdcache import` is asked for, checked when it is made. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.contract.targets import parse_precision
from teacher_cache.errors import SettingsError

Shape = Literal["auto", "vllm", "openai", "columns", "distillkit", "hidden"]
LongRows = Literal["refuse", "cut"]
EntriesAre = Literal["this", "next"]


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Write targets that something else computed, such as an inference engine, into a store like any other."""

    source: tuple[str, ...]
    """Files, globs or folders: .jsonl or .parquet with log-probabilities, or .safetensors with hidden states."""
    tokenizer: str
    """Folder of the teacher's tokenizer. Its ids are what the files must name."""
    teacher_config: str | None = None
    """Folder with the teacher's config.json, for its vocabulary and sizes; no weights are read. Default: --tokenizer,
    if it is there too.
    """
    teacher: str | None = None
    """The teacher's name, as the store records it. Default: the name of the folder with its configuration."""
    shape: Shape = "auto"
    """What the files hold. vllm: prompt_logprobs. openai: logprobs of completions, with echo. columns: input_ids,
    top_ids, top_logprobs. distillkit: compressed_logprobs and bytepacked_indices, as --packing says. hidden:
    .safetensors files, one a row, with input_ids and hidden_states. auto: told by the names in the first record.
    """
    entries: EntriesAre | None = None
    """Of columns with an entry for every token: whether entry t is the distribution of token t itself (this) or of the
    token that follows it (next). Only where the files do not show it.
    """
    packing: str | None = None
    """Of DistillKit's files: its compression_config.yaml, which lies beside them, or a training's configuration with
    logprob_compressor.
    """
    layers: str | None = None
    """Of hidden states: which layers the files hold, in their order, such as 2,16,30."""
    out: str = "cache.zarr"
    """Folder of the store. An unfinished import of the same files and settings is continued."""
    seq_len: int | None = None
    """Tokens per row. Default: those of the longest row."""
    long_rows: LongRows = "refuse"
    """What becomes of rows longer than --seq-len: refuse them all, or cut what is beyond."""
    max_rows: int | None = None
    """Rows to keep: a prefix of the shuffle of all of them. Default: all."""
    k: int | None = None
    """Ids kept at each place. Default: as many as most places list."""
    precision: str = "nmse:1e-2"
    """Hidden states as in a build: float16, int8, int4 or nmse:X. Log-probabilities are kept in two bytes with float16,
    else in one.
    """
    block_rows: int | None = None
    """Rows per block: the unit of writing, commit, reading and shuffling. Default: those of the store that is there;
    else 64, or from 262,144 rows on as many as make 4,096 blocks, up to 1024 and 2 GiB of codes.
    """
    force: bool = False
    """Import even if the disk seems too small."""
    seed: int = 0
    """Seed of the order of the rows."""

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("max_rows", 1), ("k", 1), ("block_rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name.replace('_', '-')} {value!r} is too small: it must be at least {least}")
        if not self.source:
            raise SettingsError("no SOURCE is given, so there is nothing to import; give at least one file")
        if self.long_rows == "cut" and self.seq_len is None:
            raise SettingsError(
                "--long-rows cut would change nothing: without --seq-len rows are as long as the longest; give the "
                "length to cut to"
            )
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed!r} is negative: give a whole number from 0")
        parse_precision(self.precision)
