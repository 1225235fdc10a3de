"""Everything that a training needs, made and checked before the first file is written.

In: the settings. Out: a `TrainingRun`: the open cache, of one store or several, the student in its distillation
wrapper, the objective, the rows to train and to validate on, the engine's configuration, and what has to be recorded of
them. A run that cannot work is refused here, with nothing left behind. Cost: the student's weights are made or read,
one pass over two rows, and over some thousand positions where maps are fitted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from student_train.data.first_rows import FirstRows
from student_train.data.loader import CacheLoader
from student_train.data.split import Rows, count_rows, held_out_rows, share_out, split_rows
from student_train.engine.checkpoint import read_marker
from student_train.engine.config import (
    HALF_SECTIONS,
    choose_device,
    choose_dtype,
    choose_micro_batch,
    flatten_config,
    make_config,
)
from student_train.engine.engine import DeepSpeedConfig
from student_train.engine.ranks import Ranks
from student_train.methods.map_starts import fit_maps, rows_to_fit
from student_train.methods.model import DistillationModel, compile_student, freeze_unused
from student_train.methods.objective import Objective, make_objective
from student_train.run_files import run_provenance
from student_train.settings import TrainSettings
from student_train.students.narrowing.sample import read_sample
from student_train.students.student import BuiltStudent, build_student
from teacher_cache.contract.batch import Batch
from teacher_cache.errors import TrainingError
from teacher_cache.read.pool import CacheSource, open_caches, parts_of
from teacher_cache.storage.local_cache import open_copies


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What `prepare_run` made. `config` is the engine's configuration, `frozen` names parameters no loss reaches.

    `maps_fitted` says whether learned maps start at a regression. `stand_in` is some row or two, for a pass that has to
    be and has no rows.
    """

    settings: TrainSettings
    ranks: Ranks
    reader: CacheSource
    built: BuiltStudent
    model: DistillationModel
    objective: Objective
    steps: int
    training_rows: Rows
    held_out_rows: Rows
    device: str
    micro_batch: int
    config: DeepSpeedConfig
    frozen: tuple[str, ...]
    maps_fitted: bool
    stand_in: Batch

    def training_batches(self, position: int) -> CacheLoader:
        """The endless stream of training batches from row `position` of the stream on."""
        settings = self.settings
        return CacheLoader(
            self.reader,
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
            self.reader,
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
            "cache contents": self.reader.identity_sha256,
            "number of steps": self.steps,
            **{f"DeepSpeed's {name}": value for name, value in flatten_config(self.config).items()},
        }

    def check_same(self, checkpoint: Path) -> None:
        """Refuse to go on from the checkpoint of a run that had other settings.

        Raises:
            TrainingError: it had; the message names every one that differs.
        """
        before, now = read_marker(checkpoint).identity, self.identity()
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if differing:
            changes = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differing)
            raise TrainingError(
                f"checkpoint {str(checkpoint)!r} comes from a run with other settings ({changes}): what would go on is "
                "not that run; give the same settings, or start afresh in another --out"
            )

    def describe(self) -> list[str]:
        """What is about to happen, in lines for a user to read."""
        settings, manifest = self.settings, self.reader.manifest
        teacher = manifest.teacher
        source = f"{manifest.rows:,} rows of {manifest.seq_len} tokens from {teacher.name}"
        held_out = f"the last {count_rows(self.held_out_rows):,} held out"
        if len(parts_of(self.reader)) > 1:
            held_out += ", of each store its share"
        lines = [
            f"cache    {self.reader.path}: {source} ({teacher.layers}x{teacher.hidden_size})",
            f"rows     {count_rows(self.training_rows):,} to train on, {held_out}",
            f"student  {self.built.description}",
        ]
        weights = self.objective.weights
        for name, description in self.objective.describe().items():
            details = ", ".join(f"{key.replace('_', ' ')} {_in_words(value)}" for key, value in description.items())
            lines.append(f"{name:8} weight {weights[name]:g}: {details}")
        if self.maps_fitted:
            lines.append("maps     start at the linear regression of the teacher's vectors on the student's")
        half = next((str(dtype)[6:] for dtype, name in HALF_SECTIONS.items() if self.config[name].get("enabled")), None)
        lines.append(
            f"training {self.steps:,} steps of {settings.batch_size} rows ({self.micro_batch} at a time"
            f"{self._shared()}) on {self.device} in {half or 'float32'}, {self._learning_rate()}"
        )
        if self.frozen:
            lines.append(f"frozen   {len(self.frozen)} parameters that no loss reaches, such as {self.frozen[0]}")
        return lines

    def _shared(self) -> str:
        return f" in each of {self.ranks.count} processes" if self.ranks.count > 1 else ""

    def _learning_rate(self) -> str:
        if "scheduler" in self.config:
            return f"learning rate by the scheduler in {self.settings.deepspeed!r}"
        return f"learning rate up to {self.config['optimizer']['params']['lr']:g}"

    def provenance(self) -> dict[str, Any]:
        """What the exported student carries about where it comes from."""
        manifest = self.reader.manifest
        return {
            **run_provenance(),
            "cache": {
                "path": self.reader.path,
                "identity_sha256": self.reader.identity_sha256,
                "rows": manifest.rows,
                "teacher": asdict(manifest.teacher),
                **self._stores(),
            },
            "held_out_rows": {"first": self.held_out_rows[0].start, "count": count_rows(self.held_out_rows)},
            "student": {"description": self.built.description, "copied": list(self.built.copied)},
            "objective": self.objective.describe(),
            "adapted": self.objective.adapted(),
            "weights": self.objective.weights,
            "steps": self.steps,
            "settings": asdict(self.settings),
            "deepspeed": self.config,
        }

    def _stores(self) -> dict[str, Any]:
        """Where the cache is made of several stores: each of them, and how many of its rows, the last, are held out."""
        parts = parts_of(self.reader)
        if len(parts) == 1:
            return {}
        held_out = share_out(count_rows(self.held_out_rows), [part.rows for part in parts])
        stores = [
            {"path": part.path, "identity_sha256": part.identity_sha256, "rows": part.rows, "held_out": count}
            for part, count in zip(parts, held_out, strict=True)
        ]
        return {"stores": stores}


def _in_words(value: Any) -> str:
    """A description's value for a line of text; pairs of layers as student<-teacher."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " ".join(f"{student}<-{teacher}" for student, teacher in value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def prepare_run(settings: TrainSettings, ranks: Ranks | None = None, *, fresh: bool = True) -> TrainingRun:
    """Open the cache, build the student and the objective, and find out what no loss reaches.

    Args:
        settings: what is asked for.
        ranks: this process among those that train together; alone if left out.
        fresh: whether training starts here, so that learned maps have to start somewhere; not from a checkpoint.

    Raises:
        DistillationError: something asked for cannot be; nothing has been written.
    """
    reader, training_rows, held_out = _open_rows(settings)
    manifest = reader.manifest
    device = choose_device(settings)
    dtype = choose_dtype(settings, device)
    ranks = ranks or Ranks()
    micro_batch = choose_micro_batch(settings, device=device, seq_len=manifest.seq_len, processes=ranks.count)
    config = make_config(settings, dtype=dtype, micro_batch=micro_batch, processes=ranks.count)
    torch.manual_seed(settings.seed)
    first_rows = FirstRows(
        source=reader, rows=training_rows, device=device, skip_damaged=settings.on_bad_block == "skip"
    )
    with_mlm_head = not {"od", "mlm"}.isdisjoint(settings.methods())
    built = build_student(
        settings.student,
        teacher_folder=reader.teacher_folder(),
        init=settings.init,
        with_mlm_head=with_mlm_head,
        seed=settings.seed,
        seq_len=manifest.seq_len,
        read_sample=partial(read_sample, first_rows, with_mlm_head=with_mlm_head),
    )
    objective = make_objective(
        settings.method_weights(),
        source=reader,
        student=built.model.config,
        mapping=settings.mapping,
        attention_layer=settings.attention_layer,
        relation_heads=settings.relation_heads,
        relation_weights=settings.relation_weight_values(),
        topk_loss=settings.topk_loss,
        seed=settings.seed,
    )
    model = DistillationModel(
        built.model,
        objective,
        dropout=settings.dropout,
        checkpointing=settings.activation_checkpointing,
    ).to(device)
    stand_in = first_rows.read(objective.request, 2)
    frozen = freeze_unused(model, stand_in)
    steps = settings.total_steps(count_rows(training_rows))
    fitted = fresh and steps > 0 and _start_maps(model, built, first_rows)
    if settings.compile:
        compile_student(model)
    return TrainingRun(
        settings=settings,
        ranks=ranks,
        reader=reader,
        built=built,
        model=model,
        objective=objective,
        steps=steps,
        training_rows=training_rows,
        held_out_rows=held_out,
        device=device,
        micro_batch=micro_batch,
        config=config,
        frozen=frozen,
        maps_fitted=fitted,
        stand_in=stand_in,
    )


def _open_rows(settings: TrainSettings) -> tuple[CacheSource, Rows, Rows]:
    """The cache, its rows to train on and those held out."""
    copies = open_copies(settings.local_cache, gib=settings.local_cache_gib)
    reader = open_caches(settings.cache, copies=copies)
    part_rows = [part.rows for part in parts_of(reader)]
    held_out_count = held_out_rows(reader.manifest.rows, settings.valid_share)
    return reader, *split_rows(part_rows, share_out(held_out_count, part_rows))


def _start_maps(model: DistillationModel, built: BuiltStudent, first_rows: FirstRows) -> bool:
    """Fit learned maps, unless they lead to copied layers; whether any was."""
    if built.whole_layers:
        # maps start at the identity there: the student shall stay in the teacher's coordinates
        return False
    rows, at_a_time = rows_to_fit(count_rows(first_rows.rows), first_rows.seq_len)
    return fit_maps(model, first_rows.batches(model.objective.request, rows, at_a_time))
