"""Batches of text that a causal teacher and students made of its layers have read. For `causal_codes.py`.

`Texts` packs rows as a build does and lets the teacher read them, `Batch` has its distribution after each token of some
of them, `store_form` writes that distribution to a store and reads it back, and `Student` takes the gradient of final
hidden states to the weights of its last layer.

Shapes: B rows, T positions, P of them with a next token, V vocabulary, E width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from student_train.losses.distributions import Targets
from student_train.methods.od import flat_targets
from teacher_cache.build.block import compute_block
from teacher_cache.build.resolve import make_manifest
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import LogitsSpec, TargetSpecs
from teacher_cache.corpus.corpus import RowBlock, Rows, pack_corpus
from teacher_cache.corpus.next_tokens import next_token_places
from teacher_cache.format.protocol import shard_key
from teacher_cache.format.resume import groups_to_build
from teacher_cache.models.families import encoder_of, quiet_transformers, with_head
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.outputs import TeacherOutputs
from teacher_cache.teacher.teacher import Teacher

AT_ONCE = 256
"""Positions whose probabilities over the whole vocabulary exist at a time, beside the logits."""


class Texts:
    """The teacher, the rows that it reads, and its final hidden states, kept in a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.work)
        self.folder.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.teacher = Teacher.load(options.teacher, device="cpu")
        self.teacher.start()
        self.rows_each = max(1, round(options.positions / options.seq_len))
        self.settings = BuildSettings(
            teacher=options.teacher,
            corpus=tuple(options.corpus),
            seq_len=options.seq_len,
            max_rows=self.rows_each * options.batches,
            block_rows=self.rows_each,
            targets="logits",
        )
        self.rows = self._pack()
        projection = self.teacher.head().projection
        if projection is None or projection.bias is not None:
            raise SystemExit(
                f"{options.teacher}: the head is no plain linear map without bias, which this script needs"
            )
        self.weight_VE = projection.weight.detach()

    def _pack(self) -> Rows:
        return pack_corpus(
            self.settings.corpus,
            self.teacher.tokenizer,
            seq_len=self.options.seq_len,
            row_mode=self.settings.rows,
            segments="isolated",
            causal=True,
            seed=self.settings.seed,
            max_rows=self.settings.max_rows,
        )

    def manifest(self, spec: LogitsSpec) -> Manifest:
        return make_manifest(self.settings, self.teacher, TargetSpecs(logits=spec), self.rows, self.options.seq_len)

    def batch(self, number: int) -> Batch:
        rows = self.rows.read(number * self.rows_each, (number + 1) * self.rows_each)
        kept_BT = next_token_places(rows, positions="all", seed=self.settings.seed)
        places_P = torch.from_numpy(np.flatnonzero(kept_BT))
        return Batch(number, rows, places_P, self.weight_VE, self._final(number, rows)[places_P])

    def _final(self, number: int, rows: RowBlock) -> Tensor:
        """The teacher's final states [N, E] at all positions of the rows."""
        read = self.teacher.record.weights_sha256[:8], self.rows.record.fingerprint[:8]
        path = self.folder / f"final-{'-'.join(read)}-{self.rows_each}x{self.options.seq_len}-{number}.npy"
        if not path.exists():
            ids_BT, length_B = torch.from_numpy(rows.input_ids_BT).long(), torch.from_numpy(rows.length_B)
            starts_BT = None if rows.starts_BT is None else torch.from_numpy(rows.starts_BT)
            final_BTD = self.teacher.run(ids_BT, length_B, starts_BT=starts_BT).final_BTD
            np.save(path, final_BTD.flatten(0, 1).numpy())
        return torch.from_numpy(np.load(path))


@dataclass(frozen=True)
class Batch:
    """Rows, their positions that have a next token, and what the teacher gave there."""

    number: int
    rows: RowBlock
    places_P: Tensor
    weight_VE: Tensor
    final_PE: Tensor

    @cached_property
    def logits_PV(self) -> Tensor:
        return self.final_PE @ self.weight_VE.T

    @cached_property
    def labels_P1(self) -> Tensor:
        return torch.from_numpy(self.rows.input_ids_BT).long().flatten()[self.places_P + 1][:, None]

    def probabilities(self, chunk: slice) -> Tensor:
        return self.logits_PV[chunk].softmax(1)

    def expected(self) -> Tensor:
        """P W of the teacher [P, E], the part of the full distribution's gradient that needs no student."""
        return torch.cat([self.probabilities(chunk) @ self.weight_VE for chunk in self.chunks()])

    def chunks(self) -> Iterator[slice]:
        yield from (slice(start, start + AT_ONCE) for start in range(0, len(self.places_P), AT_ONCE))

    def entropy(self) -> float:
        """Nats, mean over the positions."""
        parts = [self.logits_PV[chunk].log_softmax(1) for chunk in self.chunks()]
        return -sum(float((part.exp() * part).sum()) for part in parts) / len(self.places_P)


class KnownTeacher:
    """Stands in for the teacher in a build: its final state of a position is the position's number."""

    def __init__(self, texts: Texts, batch: Batch) -> None:
        self.device, self.record, self.tokenizer = torch.device("cpu"), texts.teacher.record, texts.teacher.tokenizer
        self._logits_PV = batch.logits_PV
        self._place_N = torch.full((batch.rows.input_ids_BT.size,), -1)
        self._place_N[batch.places_P] = torch.arange(len(batch.places_P))

    def run(self, input_ids_BT: Tensor, _length_B: Tensor, **_: Any) -> TeacherOutputs:
        number_BT1 = torch.arange(input_ids_BT.numel()).view(*input_ids_BT.shape, 1)
        return TeacherOutputs(hidden={}, attention={}, final_BTD=number_BT1)

    def head(self) -> Callable[[Tensor], Tensor]:
        return lambda number_P1: self._logits_PV[self._place_N[number_P1[:, 0]]]


def store_form(texts: Texts, batch: Batch, spec: LogitsSpec, folder: Path) -> tuple[float, Targets]:
    """Write the block and read it back: bytes a position, and the targets of its positions."""
    manifest = replace(texts.manifest(spec), rows=len(batch.rows.length_B))
    [writer] = groups_to_build(LocalStorage(folder), manifest)
    writer.write_metadata()
    known: Any = KnownTeacher(texts, batch)
    targets = compute_block(writer.group.layout, known, {}, batch.rows, len(batch.rows.length_B))
    writer.write_block(0, targets.finish())
    arrays = [spec for path, spec in writer.group.layout.arrays.items() if path.startswith("logits/")]
    size = sum(len(writer.storage.read(shard_key(spec, 0))) for spec in arrays)
    reader = CacheReader.open(folder, allow_unsealed=True)
    read = flat_targets(reader.read_rows(0, manifest.rows, TargetRequest(logits=True))["plain"])
    real_P = read.real_P
    return size / len(batch.places_P), type(read)(*(part[real_P] for part in read))


class Student:
    """Some of the teacher's layers, uniformly chosen, of which the last one is differentiated."""

    def __init__(self, folder: str, layers: int, teacher: Teacher) -> None:
        with quiet_transformers():
            model = with_head(teacher.model.config).from_pretrained(folder, dtype=torch.float32).eval()
        self.encoder = encoder_of(model.requires_grad_(False))
        depth = model.config.num_hidden_layers
        stack = next(one for one in self.encoder.modules() if isinstance(one, nn.ModuleList) and len(one) == depth)
        chosen = sorted({round(place * (depth - 1) / (layers - 1)) for place in range(layers)})
        kept = [stack[place] for place in chosen]
        del stack[len(kept) :]
        for place, layer in enumerate(kept):
            stack[place] = layer
        self.encoder.config.num_hidden_layers = len(kept)
        self.weights = [weight.requires_grad_() for weight in kept[-1].parameters() if weight.dim() > 1]

    def final(self, batch: Batch) -> Tensor:
        """Final states [P, E] with the graph of the last layer and the norm."""
        ids_BT = torch.from_numpy(batch.rows.input_ids_BT).long()
        real_BT = torch.arange(ids_BT.shape[1]) < torch.from_numpy(batch.rows.length_B)[:, None]
        assert batch.rows.starts_BT is not None
        given = forward_arguments(self.encoder, real_BT, torch.from_numpy(batch.rows.starts_BT))
        return self.encoder(ids_BT, **given).last_hidden_state.flatten(0, 1)[batch.places_P]

    def gradient(self, final_PE: Tensor, gradient_PE: Tensor) -> Tensor:
        """Of the last layer's weights, all in one vector, in float64."""
        parts = torch.autograd.grad(final_PE, self.weights, gradient_PE / len(gradient_PE), retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).double()
