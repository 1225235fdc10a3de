"""What a user may ask of `kdcache build`. Standard library only, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from teacher_cache.contract.layers import read_layers
from teacher_cache.contract.manifest import RowMode, Segments
from teacher_cache.contract.memory_limits import check_placing, refuse_one_device
from teacher_cache.contract.positions import parse_positions
from teacher_cache.contract.targets import MOST_DRAWS, LogitsForm, RelationMode, View, parse_precision, target_names_of
from teacher_cache.errors import SettingsError

DEFAULT_CORPUS = "Salesforce/wikitext:wikitext-103-raw-v1:train"
_DEFAULT_ENTRIES = {"topk": 64, "sample": 50}
_CAUSAL_DRAWS = 24
"""Draws at each position of a causal teacher. Of SmolLM2-135M they take 20 bytes, and their gradient is 1.5 degrees
from that of the whole distribution for a student that lacks four of its 30 layers, 6.1 for one that lacks two; 8 draws
take 9.4 bytes and give 3.1 and 11.9 (`benchmarks/causal_codes.py`)."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Run the teacher once over a corpus and write what students learn from."""

    teacher: str
    """Hugging Face id or folder of a masked LM (BERT, XLM-R, ModernBERT) or a causal LM (Llama, Qwen, GPT-2), or a GGUF
    file of one: its path, or hub id and file as OWNER/NAME/model.gguf.
    """
    revision: str | None = None
    """Revision of the teacher on the hub."""
    corpus: tuple[str, ...] = (DEFAULT_CORPUS,)
    """Files, globs or folders, or hub names NAME[:CONFIG[:SPLIT]]; several may each end in @WEIGHT, their share of the
    rows. Files: text (a document a line), jsonl, json, csv, tsv (also .gz) and parquet, with the documents in a column
    text, content, document, sentence or article, or in their only column of strings; or a folder that
    datasets.save_to_disk wrote. A folder gives its txt, jsonl, json, csv and parquet files.
    """
    mix_alpha: float | None = None
    """Take rows of several --corpus in proportion to their tokens to this power, as XLM-R does with 0.3 (default: all
    rows alike).
    """
    out: str = "cache.zarr"
    """Folder of the store. An unfinished store of the same settings is continued."""
    seq_len: int | None = None
    """Tokens per row, special tokens included. Default: 512, or what the teacher can read if that is less."""
    max_rows: int = 20_000
    """Rows to keep: a prefix of the shuffle of the whole corpus."""
    shuffle_buffer: int | None = None
    """Read no more of the corpus than --max-rows and so many further rows take, and draw the rows from these alone; hub
    datasets are streamed. Default: read, and draw from, all of it.
    """
    part: str | None = None
    """Part i of n such as 2/8: build a store of these rows alone; several stores are read as one corpus."""
    rows: RowMode = "packed"
    """packed: rows are cut from joined documents. document: one truncated document a row."""
    segments: Segments | None = None
    """isolated: documents that share a row do not see each other, and each has positions of its own. joined: a row is
    read as one text. Default: isolated for causal teachers, joined for masked LMs.
    """
    chat: bool = False
    """Insist on conversations in the corpus (a column messages, or prompt and completion), written by the tokenizer's
    chat template; distributions are kept in the assistant's turns alone. They are read so wherever such a column is
    there and the teacher is causal; with this flag a corpus without one is refused.
    """
    targets: str | None = None
    """Comma-separated: logits, hidden, attention. Default: all that the checkpoint can give; of causal LMs, logits."""
    layers: str = "uniform+last"
    """Hidden states to keep: 2,4,6, all, uniform:6, last:6 or uniform:6+last; uniform+last: those of the default
    student."""
    attention_layer: int | None = None
    """Layer whose queries, keys and values are kept. Default: the last but one."""
    relations: RelationMode | None = None
    """hidden: keep the layer's input and its projections once; replay: keep what its projections read behind a norm,
    and turn queries and keys by their rotary positions on load; qkv: keep the vectors; matrix: keep the relations
    themselves in float16, 3 * 2 * HEADS * SEQ_LEN bytes a token, to compare with. Default: hidden where it is exact;
    of causal teachers replay where it can be done, in half the bytes of qkv.
    """
    relation_heads: int | None = None
    """With --relations matrix: relation heads, fixed in the store. Default: the largest divisor of the teacher's width
    up to a sixteenth of it.
    """
    logits: LogitsForm | None = None
    """topk: the most probable ids at each place, and the mass outside them as one number. sample: ids drawn from the
    whole distribution, one in each of K equal shares of its mass, with their counts: unbiased. Default: topk at masked
    positions, sample for causal teachers.
    """
    k: int | None = None
    """Ids kept at each place (default: 64, or all where there are fewer), or drawn with --logits sample (default: 50,
    for causal teachers 24; at most 255)."""
    positions: str | None = None
    """Of causal teachers: after which positions of a row the distribution is kept: all, every:N (each N-th) or share:X
    (a random share X). Default: all.
    """
    precision: str = "nmse:1e-2"
    """float16, int8, int4, or nmse:X: hidden states and attention in as few bits as keep all but a share X of the
    variance.
    """
    views: int = 1
    """Masked views of each row; training cycles through them by epoch."""
    mlm_probability: float = 0.15
    """Share of a row's tokens that a masked view hides."""
    hs_view: View = "plain"
    """View that hidden states and attention are taken from."""
    temperature: float = 1.0
    """Softmax temperature of the cached distribution; fixed in the store."""
    batch_size: int | None = None
    """Rows per teacher forward. Default: by device and row length."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the teacher. auto: float32 on CPU, bfloat16 on GPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: the first GPU if there is one."""
    device_map: Literal["auto"] | None = None
    """auto: spread a teacher that is larger than one device over all GPUs, the CPU's memory and the disk (GPUs are left
    out with --device cpu). Its targets are the same; batches are larger, since weights are brought for each anew.
    """
    max_memory: str | None = None
    """With --device-map: what weights may take of each device, such as 0:70GB,1:70GB,cpu:200GB (GPUs by number).
    Default: nine tenths of what is free. The rest stays on the disk.
    """
    tensor_parallel: bool = False
    """Under torchrun or deepspeed: all processes hold one teacher together, each its share of every layer, by the plan
    that Transformers has for the family; one writes. Without it each process has a teacher of its own, and they share
    the blocks of the store.
    """
    block_rows: int | None = None
    """Rows per block: the unit of writing, commit, reading and shuffling. Default: those of the store that is there;
    else 64, or from 262,144 rows on as many as make 4,096 blocks, up to 1024 and 2 GiB of codes.
    """
    force: bool = False
    """Build even if the disk seems too small."""
    seed: int = 0
    """Seed of row order and masks."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_rows", 1),
            ("k", 1),
            ("views", 1),
            ("relation_heads", 1),
            ("block_rows", 1),
            ("shuffle_buffer", 0),
            ("batch_size", 1),
            ("seq_len", 3),
            ("attention_layer", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name.replace('_', '-')} {value!r} is too small: it must be at least {least}")
        self.entries(causal=False)
        if self.relation_heads is not None and self.relations != "matrix":
            raise SettingsError(
                f"--relation-heads {self.relation_heads!r} would change nothing: only --relations matrix fixes the "
                "heads in the store; leave it out, and choose heads in training"
            )
        if not 0 < self.mlm_probability < 1:
            raise SettingsError(
                f"--mlm-probability {self.mlm_probability!r} is not between 0 and 1: it is the share of tokens "
                "hidden; try 0.15"
            )
        if self.mix_alpha is not None and not 0 <= self.mix_alpha <= 1:
            raise SettingsError(
                f"--mix-alpha {self.mix_alpha!r} would favour what there is most of, or least: give a power from 0 "
                "(all --corpus alike) to 1 (by their sizes), such as 0.3"
            )
        if not 0 < self.temperature < float("inf"):
            raise SettingsError(
                f"--temperature {self.temperature!r} cannot divide logits: give a positive number, usually 1"
            )
        if self.seed < 0:
            raise SettingsError(f"--seed {self.seed!r} is negative: give a whole number from 0")
        parse_precision(self.precision)
        read_layers(self.layers)
        self.target_names()
        self.part_numbers()
        if self.positions is not None:
            parse_positions(self.positions)
        self._check_placement()

    def _check_placement(self) -> None:
        check_placing(self.device, self.device_map, self.max_memory)
        if self.tensor_parallel:
            refuse_one_device(self.device, "--tensor-parallel")
        if self.device_map is not None and self.tensor_parallel:
            raise SettingsError(
                "--device-map auto and --tensor-parallel are two ways to run a teacher that is larger than one device: "
                "in the first every process spreads a whole one, in the second they share one; leave one out"
            )

    def logits_form(self, *, causal: bool) -> LogitsForm:
        """What is kept of a distribution of such a teacher."""
        return self.logits or ("sample" if causal else "topk")

    def entries(self, *, causal: bool) -> int:
        """Ids kept or drawn at each place; all ids, where the vocabulary has fewer than the default.

        Raises:
            SettingsError: there are more draws than can be counted.
        """
        form = self.logits_form(causal=causal)
        if form == "sample" and self.k is not None and self.k > MOST_DRAWS:
            raise SettingsError(
                f"--k {self.k!r} draws a position cannot be kept: a count has one byte; ask for 1 to {MOST_DRAWS}, or "
                "for --logits topk"
            )
        if self.k is not None:
            return self.k
        return _CAUSAL_DRAWS if causal and form == "sample" else _DEFAULT_ENTRIES[form]

    def part_numbers(self) -> tuple[int, int] | None:
        """Which part of how many, the first being 1.

        Raises:
            SettingsError: there is no such part.
        """
        if self.part is None:
            return None
        number, slash, parts = self.part.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise SettingsError(
                f"--part {self.part!r} names no part: rows would be left out or counted twice; give i/n with i from 1 "
                "to n, such as 2/8"
            )
        return int(number), int(parts)

    def target_names(self) -> tuple[str, ...] | None:
        """The targets asked for, or None for all that the teacher can give.

        Raises:
            SettingsError: a name is unknown.
        """
        return None if self.targets is None else target_names_of(self.targets)
