"""The flags of `kdtrain`, checked when a record of them is made. Standard library only, so that `--help` is instant.

Each value is checked alone and together with the others. A text such as --mapping is checked by the same function that
reads it later, so that there is one grammar for it. What only the cache, the teacher or the device can tell (whether
the teacher has a layer, how many steps an epoch has) is checked where they are known.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from student_train.attention_layers import read_attention_layers
from student_train.init_plan import read_init
from student_train.layer_map import read_mapping
from student_train.registry import ADDED_METHODS
from student_train.student_shape import read_student
from student_train.vocabulary_choice import read_vocabulary
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

METHODS = ("mha", "direct", "hs", "od", "mlm", "lm")
"""The methods of this package; others may be added to `student_train.registry.ADDED_METHODS`."""
READING_ATTENTION = ("mha", "direct")
"""The methods that `--attention-layer` is for."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Train a student from a teacher cache and write it as a Hugging Face directory."""

    method: str
    """What to learn: mha (attention relations), direct (the queries, keys and values themselves), hs (hidden states),
    od (output distribution), mlm (the masked tokens themselves, without the teacher), lm (the next tokens themselves,
    without the teacher), a method that an installed package adds, or a sum such as mha+hs."""

    cache: tuple[str, ...] = ("cache.zarr",)
    """Store that `kdcache build` wrote, or several to read as one: paths, or a pattern in quotes such as
    'parts/*.zarr'."""

    local_cache: str | None = None
    """Folder of this machine that keeps what is read of stores in object storage, for the next epoch and other runs;
    any number of processes may share it."""

    local_cache_gib: float = 50.0
    """Most that --local-cache may hold, in GiB: what was read longest ago is deleted for what is new."""

    weights: str | None = None
    """Weight of each method, in the order of --method, such as 1,0.1 (default: 1 for each)."""

    mapping: str = "uniform+last"
    """For hs, which teacher layers teach which student layers: last1, last, uniform, uniform-cons or a sum of them such
    as uniform+last, pairs student:teacher such as 1:4,2:8,3:12, skip (the first token only), emd or alp, which weigh
    all teacher layers (cached with --layers all) while training, or a mapping that an installed package adds."""

    attention_layer: str | None = None
    """For mha and direct, the teacher layer that the student's last layer learns (default: the last but one, or the
    only one cached), or pairs student:teacher such as 2:4,3:5."""

    relation_heads: int | None = None
    """For mha, heads into which both models' attention vectors are re-split (default: the largest number that divides
    both widths and is at most a sixteenth of the teacher's)."""

    relation_heads_kv: int | None = None
    """For mha, those of keys and values, where these are narrower than queries (default: as of --relation-heads, by
    their own widths; where all are equally wide, as many as of queries)."""

    relation_mask: Literal["causal", "full"] | None = None
    """For mha of causal models, what a position is related to: causal, itself and those before it, as the model sees
    them, or full, all of its document (default: causal; of masked LMs, full)."""

    relation_weights: str = "1,1,1"
    """For mha and direct, weights of queries, keys and values."""

    topk_loss: Literal["tail", "renormalise"] = "tail"
    """For od on the most probable ids: tail pools all other ids into one, renormalise leaves them out and makes both
    models' probabilities of the kept ids sum to 1."""

    student: str | None = None
    """Layers x width[:heads[:feed-forward[:key/value heads]]] such as 6x768:12:3072 or 6x384:6:1024:2, or a Hugging
    Face directory (default: 6 layers if the teacher has 12 or more, else half of them, and the teacher's width up to
    768)."""

    init: str = "auto"
    """Where the first weights come from: auto (the teacher's embeddings and layers, copied where the sizes match and
    else sliced; those that teacher:importance names for decoders, uniformly chosen ones for encoders), random,
    embeddings, teacher:LAYERS such as teacher:2,4,6, teacher:last, teacher:uniform or teacher:importance (the layers
    without which the cached distribution suffers most), or a Hugging Face directory."""

    vocabulary: str = "all"
    """Which of the teacher's ids the student gets: all, coverage:SHARE such as coverage:0.9999 (the most frequent ids
    of the rows to train on, which make up this share of their tokens) or trim:FILE,... (those that text files use,
    such as trim:de.txt,en.txt with one for each language, or the kept_ids.json of another student); what tokenizer and
    model cannot do without always stays."""

    steps: int | None = None
    """Updates in total; 0 writes the untrained student (default: as many as --epochs has)."""

    epochs: float | None = None
    """Passes over the training rows (default: 3, unless --steps is given)."""

    batch_size: int = 32
    """Rows per update, over all devices."""

    micro_batch_size: int | None = None
    """Rows per forward pass of one device, a divisor of its share of the batch; changes memory, not the result
    (default: the most that keeps a pass within 8,192 tokens on a CPU and 65,536 on a GPU)."""

    lr: float = 1e-3
    """Highest learning rate: reached at the end of a linear warm-up, then falling linearly towards 0 after the last
    step.
    """

    warmup: float = 0.05
    """Length of the warm-up: a share of all steps if below 1, else a number of steps."""

    weight_decay: float = 0.01
    """AdamW's decoupled decay of weight matrices; biases and normalisation layers are left alone."""

    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""

    dropout: float = 0.0
    """Dropout of the student during distillation. The exported config keeps the family's own value."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the student's passes; the weights that are updated are float32. bfloat16 and float16, whose losses
    are scaled, take a GPU (auto: bfloat16 on a GPU that computes in it, else float32)."""

    activation_checkpointing: bool = False
    """Keep only the student's layer inputs and compute the rest again in the backward pass: less memory, about a third
    more time, the same result."""

    compile: bool = False
    """Run the student's encoder through torch.compile: a slow first step, then mostly faster ones on a GPU."""

    valid_share: float = 0.02
    """Share of the rows, the last ones of each store, that is held out to validate on."""

    valid_every: int | None = None
    """Steps between validations; there is always one before the first step and one after the last (default: a tenth of
    all steps)."""

    on_bad_block: Literal["stop", "skip"] = "stop"
    """When a block of the cache turns out to be damaged: stop with a checkpoint, or skip its rows and count them."""

    save_every: int = 500
    """Steps between checkpoints; there is always one after the last step and one on SIGTERM or Ctrl-C."""

    deepspeed: str | None = None
    """JSON file with DeepSpeed settings that override those derived from these flags."""

    out: str = "student"
    """Directory to write: the student, metrics.jsonl, provenance.json, tensorboard/ and checkpoints/."""

    resume: str = "never"
    """never refuses an OUT that holds something; auto goes on from its newest complete checkpoint, or starts afresh
    where there is none; anything else is the path of a checkpoint such as student/checkpoints/step-00000500."""

    trust_checkpoint: bool = False
    """Resume also from a checkpoint that others own or may write: loading one can run whatever code is in it."""

    seed: int = 0
    """Decides the order of the rows and every random weight."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    dry_run: bool = False
    """Say what would be trained, run three steps to see what it would take, and write nothing."""

    wandb: str | None = None
    """Also send the metrics to this Weights & Biases project (needs the package's extra of that name)."""

    json: bool = False
    """Print the result as one JSON record on standard output."""

    def __post_init__(self) -> None:
        self._check_methods()
        self.method_weights()
        self.relation_weight_values()
        self._check_numbers()
        self._check_student()
        if "://" in self.out:
            raise SettingsError(
                f"--out {self.out!r} is an address: only stores may lie in object storage, a student is written to a "
                "folder; give one, and copy it once it is done"
            )

    def _check_methods(self) -> None:
        methods = self.methods()
        unknown = [name for name in methods if name not in METHODS and ADDED_METHODS.find(name) is None]
        if unknown or len(set(methods)) < len(methods):
            wrong, known = (unknown or methods)[-1], (*METHODS, *ADDED_METHODS.names())
            raise SettingsError(
                f"--method {self.method!r} cannot be read at {wrong!r}: "
                f"{did_you_mean(wrong, known) if unknown else 'give'} each of {', '.join(known)} at most once, "
                "several joined by + such as mha+hs"
            )

    def _check_numbers(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise SettingsError(
                f"--steps {self.steps!r} and --epochs {self.epochs!r} both say how long to train: give one of them"
            )
        for name, lowest in LOWEST.items():
            value = getattr(self, name)
            # written so that NaN fails too
            if value is not None and not lowest <= value < float("inf"):
                raise SettingsError(f"{_flag(name)} {value!r} cannot be: give a number of at least {lowest}")
        if self.seed >= 2**63:
            raise SettingsError(
                f"--seed {self.seed!r} cannot be: the random generators take no such number; give one from 0 to below "
                "2**63"
            )
        for name in ("valid_share", "dropout"):
            if not getattr(self, name) < 1:
                raise SettingsError(
                    f"{_flag(name)} {getattr(self, name)!r} is a share: give a number from 0 to below 1"
                )

    def _check_student(self) -> None:
        """Everything that names layers: each text by itself, and beside the student's depth where that is given."""
        student = read_student(self.student)
        init = read_init(self.init, from_folder=student if isinstance(student, Path) else None)
        mapping = read_mapping(self.mapping)
        read_vocabulary(self.vocabulary)
        attention = None if self.attention_layer is None else read_attention_layers(self.attention_layer)
        if student is None or isinstance(student, Path):
            return
        init.check_student(student.layers)
        # a sweep may give all its runs a mapping that only some of them read
        if "hs" in self.methods():
            mapping.check_student(student.layers)
        if attention is not None and not set(READING_ATTENTION).isdisjoint(self.methods()):
            attention.check_student(student.layers)

    def methods(self) -> tuple[str, ...]:
        """The methods by name, in the order given."""
        return tuple(self.method.replace(" ", "").split("+"))

    def method_weights(self) -> dict[str, float]:
        """Weight of each method, in order."""
        methods = self.methods()
        if self.weights is None:
            return dict.fromkeys(methods, 1.0)
        weights = dict(zip(methods, _read_weights("--weights", self.weights, len(methods)), strict=True))
        if not all(weights.values()):
            raise SettingsError(
                f"--weights {self.weights!r} gives a method of --method {self.method!r} the weight 0: it would be "
                "computed for nothing; leave it out of --method"
            )
        return weights

    def relation_weight_values(self) -> tuple[float, float, float]:
        """Weights of the query, key and value relations."""
        query, key, value = _read_weights("--relation-weights", self.relation_weights, 3)
        return query, key, value

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up in a training of `steps` steps, at least 1."""
        return max(1, round(self.warmup * steps if self.warmup < 1 else self.warmup))

    def total_steps(self, training_rows: int) -> int:
        """Updates in total, given how many rows are there to train on."""
        if self.steps is not None:
            return self.steps
        epochs = 3 if self.epochs is None else self.epochs
        # the number as it is written: as a float, 1.1 times 100 is a little more than 110, and a step more
        return math.ceil(Fraction(str(epochs)) * training_rows / self.batch_size)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues, by flag.

        Left out is what may change without changing what is computed: where things are, how often to look, and how a
        batch is cut into passes.
        """
        return {_flag(name): value for name, value in asdict(self).items() if name not in _FREE}


_FREE = frozenset({
    "activation_checkpointing", "cache", "compile", "deepspeed", "device", "dry_run", "json", "local_cache",
    "local_cache_gib", "micro_batch_size", "on_bad_block", "out", "resume", "save_every", "trust_checkpoint",
    "valid_every", "wandb",
})  # fmt: skip
LOWEST = {
    "steps": 0,
    "epochs": 0,
    "batch_size": 1,
    "micro_batch_size": 1,
    "lr": 0,
    "warmup": 0,
    "weight_decay": 0,
    "clip": 0,
    "dropout": 0,
    "valid_share": 0,
    "valid_every": 1,
    "save_every": 1,
    "seed": 0,
    "local_cache_gib": 0,
    "relation_heads": 1,
    "relation_heads_kv": 1,
}
"""The least value of each flag that is a number."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_weights(flag: str, text: str, count: int) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != count or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise SettingsError(
            f"{flag} {text!r} cannot be used: give {count} non-negative numbers joined by commas, not all zero, such "
            f"as {','.join(['1'] * count)}"
        )
    return weights
