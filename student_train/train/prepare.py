"""Everything that a training needs, checked, then made, before the first file is written.

In: the settings. Out: a `TrainingRun`: the open cache, of one store or several, the student in its distillation
wrapper, the objective, the rows to train and to validate on, the engine's configuration, and what has to be recorded of
them. A run that cannot work is refused here, with nothing left behind, and what settings and manifest can tell is told
before a row is read or a weight is made: `check_run` asks for that alone. Cost: the student's weights are made or read,
one pass over two rows, and over some thousand positions where maps are fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from student_train.data.first_rows import FirstRows
from student_train.data.loader import CacheLoader
from student_train.data.source import split_source
from student_train.data.split import RowRanges, count_rows
from student_train.engine.checkpoint import read_marker
from student_train.engine.config import (
    choose_dtype,
    choose_micro_batch,
    flatten_config,
    make_config,
)
from student_train.engine.engine import DeepSpeedConfig
from student_train.engine.ranks import Ranks
from student_train.layer_map import added_mappings
from student_train.methods.additions import reads_logits
from student_train.methods.model import DistillationModel, compile_student, freeze_unused
from student_train.methods.objective import Objective, make_objective, plan_objective
from student_train.recorded_settings import checkpoint_identity
from student_train.registry import ADDED_MAPPINGS, ADDED_METHODS
from student_train.settings import METHODS, TrainSettings
from student_train.students.student import BuiltStudent, StudentPlan, plan_student, with_vocabulary
from student_train.students.vocabulary.source import TrimmedSource
from student_train.students.vocabulary.weights import trim_config
from student_train.train.first_weights import build_from_rows, start_maps
from student_train.train.vocabulary import TrimmedVocabulary, choose_vocabulary
from student_train.vocabulary_choice import read_vocabulary
from teacher_cache.contract.batch import Batch
from teacher_cache.device import choose_device_type
from teacher_cache.errors import TrainingError
from teacher_cache.read.pool import CacheSource, open_caches

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What `prepare_run` made. `config` is the engine's configuration, `frozen` names parameters no loss reaches.

    `maps_fitted` says whether learned maps start at a regression. `stand_in` is some row or two, for a pass that has to
    be and has no rows. `source` is the cache as the student reads it: `reader`, or one in the ids of its `vocabulary`
    where that is not the teacher's. `additions` are what other packages have added and this run uses, by `method NAME`
    or `mapping NAME`: module, package, version.
    """

    settings: TrainSettings
    ranks: Ranks
    reader: CacheSource
    source: CacheSource
    vocabulary: TrimmedVocabulary | None
    built: BuiltStudent
    model: DistillationModel
    objective: Objective
    steps: int
    training_rows: RowRanges
    held_out_rows: RowRanges
    device: str
    micro_batch: int
    config: DeepSpeedConfig
    frozen: tuple[str, ...]
    maps_fitted: bool
    stand_in: Batch
    additions: Mapping[str, Mapping[str, str | None]]

    def training_batches(self, position: int) -> CacheLoader:
        """The endless stream of training batches from row `position` of the stream on."""
        settings = self.settings
        return CacheLoader(
            self.source,
            self.objective.request,
            rows=self.training_rows,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
            position=position,
            device=self.device,
            skip_damaged=self.skips_damaged,
        )

    def validation_batches(self) -> CacheLoader:
        """This process's share of the held-out rows once, in the order of the store."""
        return CacheLoader(
            self.source,
            self.objective.request,
            rows=self.held_out_rows,
            batch_size=self.micro_batch * self.ranks.count,
            seed=None,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
            stop=count_rows(self.held_out_rows),
            device=self.device,
            skip_damaged=self.skips_damaged,
        )

    @property
    def skips_damaged(self) -> bool:
        """Whether rows of damaged blocks are left out."""
        return self.settings.on_bad_block == "skip"

    @property
    def share_rows(self) -> int:
        """Rows of every batch that are this process's."""
        return self.settings.batch_size // self.ranks.count

    @property
    def valid_every(self) -> int:
        """Steps between validations."""
        return self.settings.valid_every or max(1, self.steps // 10)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it goes on with, by the name a user knows it under."""
        return {
            **self.settings.identity(),
            **self.additions,
            "cache contents": self.reader.identity_sha256,
            "number of steps": self.steps,
            **({} if self.vocabulary is None else {"kept ids": self.vocabulary.kept.sha256}),
            **{f"DeepSpeed's {name}": value for name, value in flatten_config(self.config).items()},
        }

    def check_same(self, checkpoint: Path) -> None:
        """Refuse to go on from the checkpoint of a run that had other settings.

        A flag that it says nothing of did not exist when it was written, and does by default what was done then.

        Raises:
            TrainingError: it had; the message names every one that differs.
        """
        before = checkpoint_identity(read_marker(checkpoint).identity, self.settings.method)
        now = self.identity()
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if differing:
            now["cache contents"] = f"{now['cache contents']} ({self.reader.path})"
            changes = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differing)
            raise TrainingError(
                f"checkpoint {str(checkpoint)!r} comes from a run with other settings ({changes}): what would go on is "
                "not that run; give the same settings, or start afresh in another --out"
            )


def prepare_run(settings: TrainSettings, ranks: Ranks | None = None, *, fresh: bool = True) -> TrainingRun:
    """Open the cache, build the student and the objective, and find out what no loss reaches.

    Args:
        settings: what is asked for.
        ranks: this process among those that train together; alone if left out.
        fresh: whether training starts here, so that learned maps have to start somewhere; not from a checkpoint.

    Raises:
        DistillationError: something asked for cannot be; nothing has been written.
    """
    reader, ranks = open_cache(settings), ranks or Ranks()
    plan = _plan(settings, reader, ranks)
    vocabulary = choose_vocabulary(
        read_vocabulary(settings.vocabulary),
        reader,
        plan.training_rows,
        logits="od" in settings.methods() and reader.manifest.targets.logits is not None,
        skip_damaged=settings.on_bad_block == "skip",
    )
    source = reader if vocabulary is None else TrimmedSource(reader, vocabulary.kept)
    torch.manual_seed(settings.seed)
    objective = make_objective(
        settings.method_weights(),
        source=source,
        student=plan.student.config if vocabulary is None else trim_config(plan.student.config, vocabulary.kept),
        seed=settings.seed,
        trimmed=vocabulary is not None,
        skip_damaged=settings.on_bad_block == "skip",
        **_objective_settings(settings),
    )
    # the student is made with all of the teacher's ids, as its weights are, and cut down afterwards
    first_rows = FirstRows(
        source=reader, rows=plan.training_rows, device=plan.device, skip_damaged=settings.on_bad_block == "skip"
    )
    built = build_from_rows(plan.student, first_rows, seed=settings.seed)
    if vocabulary is not None:
        built = with_vocabulary(built, vocabulary.kept)
        first_rows = replace(first_rows, source=source)
    model = DistillationModel(
        built.model,
        objective,
        dropout=settings.dropout,
        checkpointing=settings.activation_checkpointing,
    ).to(plan.device)
    stand_in = first_rows.read(objective.request, 2)
    frozen = freeze_unused(model, stand_in)
    _log.info("made the student on %s and tried it on two rows", plan.device)
    steps = settings.total_steps(count_rows(plan.training_rows))
    fitted = fresh and steps > 0 and start_maps(model, built, first_rows)
    if settings.compile:
        compile_student(model)
    return TrainingRun(
        settings=settings,
        ranks=ranks,
        reader=reader,
        source=source,
        vocabulary=vocabulary,
        built=built,
        model=model,
        objective=objective,
        steps=steps,
        training_rows=plan.training_rows,
        held_out_rows=plan.held_out_rows,
        device=plan.device,
        micro_batch=plan.micro_batch,
        config=plan.config,
        frozen=frozen,
        maps_fitted=fitted,
        stand_in=stand_in,
        additions=_additions(settings),
    )


def open_cache(settings: TrainSettings) -> CacheSource:
    """The cache to train from.

    Raises:
        StoreError: it cannot be opened.
    """
    return open_caches(settings.cache, local_cache=settings.local_cache, local_cache_gib=settings.local_cache_gib)


def check_run(settings: TrainSettings, reader: CacheSource) -> None:
    """Refuse what settings and cache rule out, as `prepare_run` would. Reads no row and makes no weight.

    Raises:
        DistillationError: something asked for cannot be.
    """
    student = _plan(settings, reader, Ranks()).student.config
    plan_objective(settings.method_weights(), source=reader, student=student, **_objective_settings(settings))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is known of a run before anything is made."""

    training_rows: RowRanges
    held_out_rows: RowRanges
    device: str
    micro_batch: int
    config: DeepSpeedConfig
    student: StudentPlan


def _plan(settings: TrainSettings, reader: CacheSource, ranks: Ranks) -> _Plan:
    manifest = reader.manifest
    training_rows, held_out = split_source(reader, settings.valid_share)
    device = choose_device_type(settings.device)
    dtype = choose_dtype(settings, device)
    micro_batch = choose_micro_batch(settings, device=device, seq_len=manifest.seq_len, processes=ranks.count)
    return _Plan(
        training_rows=training_rows,
        held_out_rows=held_out,
        device=device,
        micro_batch=micro_batch,
        config=make_config(settings, dtype=dtype, micro_batch=micro_batch, processes=ranks.count),
        student=plan_student(
            settings.student,
            teacher_folder=reader.teacher_folder(),
            init=settings.init,
            # a causal LM is nothing without its head, whether a loss reaches that or not
            with_mlm_head=manifest.teacher.causal or any(map(reads_logits, settings.methods())),
            seq_len=manifest.seq_len,
            isolated=manifest.segments == "isolated",
            has_distribution=manifest.targets.logits is not None,
        ),
    )


def _objective_settings(settings: TrainSettings) -> dict[str, Any]:
    return {
        "mapping": settings.mapping,
        "attention_layer": settings.attention_layer,
        "relation_heads": settings.relation_heads,
        "relation_heads_kv": settings.relation_heads_kv,
        "relation_mask": settings.relation_mask,
        "relation_weights": settings.relation_weight_values(),
        "topk_loss": settings.topk_loss,
    }


def _additions(settings: TrainSettings) -> dict[str, dict[str, str | None]]:
    methods = [name for name in settings.methods() if name not in METHODS]
    # a method that another package adds may read the mapping as hs does
    mappings = added_mappings(settings.mapping) if methods or "hs" in settings.methods() else ()
    return {
        **{f"method {name}": ADDED_METHODS.origin(name) for name in methods},
        **{f"mapping {name}": ADDED_MAPPINGS.origin(name) for name in mappings},
    }
