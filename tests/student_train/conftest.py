"""Targets for students to learn from: batches straight from a live teacher, and a real store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from student_train.registry import ADDED_MAPPINGS, ADDED_METHODS
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import Batch, Places, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.contract.manifest import CorpusRecord, Manifest, TeacherRecord
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, LogitsSpec, TargetSpecs
from teacher_cache.errors import TargetsError
from teacher_cache.models.attention_tap import enable_tap, record_attention

MASK_ID = 4
KEPT = 8


@dataclass(frozen=True, kw_only=True)
class LiveCache:
    """A teacher that answers like a cache: its manifest, its hidden variances, and batches in float32."""

    folder: Path
    manifest: Manifest
    required: list[TargetRequest] = field(default_factory=list)

    def require(self, request: TargetRequest) -> None:
        self.required.append(request)
        targets = self.manifest.targets
        hidden = set(request.hidden_layers) - set(targets.hidden_layers())
        attention = set(request.attention_layers) - set(targets.attention_layers())
        if hidden or attention or (request.logits and targets.logits is None):
            raise TargetsError(f"not cached: hidden {hidden}, attention {attention}, logits {request.logits}")

    def hidden_variance(self, layer: int) -> float:
        return 2.0 + layer

    def rotation(self, layer: int) -> None:
        """None: its hidden states come as the teacher gives them."""

    def read_rows(self, start: int, stop: int, request: TargetRequest) -> Batch:
        """Rows of 5 to 12 positions, whatever is asked for."""
        return self.batch([5 + row % 8 for row in range(start, stop)], seed=1)

    def batch(self, lengths: Sequence[int], *, positions: int = 12, places: int = 3, seed: int = 0) -> Batch:
        """Random rows of these lengths in both views, with every target that the manifest names."""
        generator = torch.Generator().manual_seed(seed)
        length_B = torch.tensor(lengths)
        real_BT = torch.arange(positions)[None, :] < length_B[:, None]
        # from 5 on: the tiny tokenizers keep their special tokens below
        plain_BT = torch.randint(5, self.manifest.teacher.vocab_size, real_BT.shape, generator=generator)
        plain_BT = plain_BT.masked_fill(~real_BT, self.pad_id)
        masked = self._mask(plain_BT, length_B, places, generator)
        masked_BT = plain_BT.clone()
        for row, count in enumerate(masked.count_B.tolist()):
            masked_BT[row, masked.positions_BM[row, :count]] = MASK_ID
        views: Mapping[str, Tensor] = {"plain": plain_BT, "masked": masked_BT}
        wanted = self.manifest.targets.views()
        return {view: self._targets(view, views[view], length_B, masked) for view in wanted}

    @property
    def pad_id(self) -> int:
        return 1 if "roberta" in self.manifest.teacher.model_type else 0

    def _mask(self, ids_BT: Tensor, length_B: Tensor, places: int, generator: torch.Generator) -> Places:
        count_B = torch.minimum(length_B, torch.tensor(places))
        positions_BM = torch.zeros(len(length_B), places, dtype=torch.int32)
        for row, (length, count) in enumerate(zip(length_B.tolist(), count_B.tolist(), strict=True)):
            positions_BM[row, :count] = torch.randperm(length, generator=generator)[:count].sort().values
        return Places(
            positions_BM=positions_BM, label_ids_BM=ids_BT.gather(1, positions_BM.long()).int(), count_B=count_B
        )

    @torch.no_grad()
    def _targets(self, view: str, ids_BT: Tensor, length_B: Tensor, masked: Places) -> TargetBatch:
        specs = self.manifest.targets
        teacher = AutoModelForMaskedLM.from_pretrained(self.folder).eval()
        enable_tap(teacher)
        targets = TargetBatch(
            input_ids_BT=ids_BT.int(),
            length_B=length_B,
            row_id_B=torch.arange(len(length_B)),
            places=masked if view == "masked" else None,
        )
        layers = [spec.layer for spec in specs.attention if spec.view == view]
        with record_attention(teacher.base_model, layers) as recorded:
            out = teacher(input_ids=ids_BT.long(), attention_mask=targets.real_BT().long(), output_hidden_states=True)
        hidden = {spec.layer: out.hidden_states[spec.layer] for spec in specs.hidden if spec.view == view}
        targets = replace(targets, hidden=hidden, attention=recorded.vectors)
        if specs.logits is not None and specs.logits.view == view:
            targets = replace(targets, logits=self._topk(out.logits, masked))
        return targets

    def _topk(self, logits_BTV: Tensor, masked: Places) -> TopkLogits:
        logits_BMV = logits_BTV.take_along_dim(masked.positions_BM.long().unsqueeze(-1), dim=1)
        log_probs_BMV = (logits_BMV / self.manifest.temperature).log_softmax(-1)
        log_probs_BMK, ids_BMK = log_probs_BMV.topk(KEPT)
        log_tail_BM = log_probs_BMV.scatter(-1, ids_BMK, float("-inf")).logsumexp(-1)
        return TopkLogits(ids_BMK=ids_BMK.int(), log_probs_BMK=log_probs_BMK, log_tail_BM=log_tail_BM)


MakeLiveCache = Callable[..., LiveCache]


@pytest.fixture(scope="session")
def live_cache() -> MakeLiveCache:
    """`live_cache(folder, hidden=(...), attention=(...), logits=True, view="plain", temperature=1.0)`."""

    def make(
        folder: Path,
        *,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        logits: bool = False,
        view: str = "plain",
        temperature: float = 1.0,
    ) -> LiveCache:
        config = AutoModelForMaskedLM.from_pretrained(folder).config
        targets = TargetSpecs(
            logits=LogitsSpec(entries=KEPT, codec="float32") if logits else None,
            hidden=tuple(HiddenSpec(layer=layer, codec="float32", view=view) for layer in hidden),
            attention=tuple(
                AttentionSpec(layer=layer, form="vectors", codec="float32", view=view) for layer in attention
            ),
        )
        teacher = TeacherRecord(
            name="tiny", revision=None, weights_sha256="", model_type=config.model_type,
            layers=config.num_hidden_layers, hidden_size=config.hidden_size, heads=config.num_attention_heads,
            vocab_size=config.vocab_size, max_positions=64, has_mlm_head=True,
        )  # fmt: skip
        corpus = CorpusRecord(specs=(), fingerprint="", documents=0, tokens=0, rows=8)
        manifest = Manifest(
            teacher=teacher, tokenizer_sha256="", corpus=corpus, seq_len=12, row_mode="packed", rows=8, block_rows=8,
            seed=0, views=1, mlm_probability=0.25, temperature=temperature, dtype="float32", targets=targets,
        )  # fmt: skip
        return LiveCache(folder=folder, manifest=manifest)

    return make


@pytest.fixture(scope="session")
def tiny_store(tiny_teacher, tiny_corpus, tmp_path_factory) -> Path:
    """A sealed store of 101 rows of a 4-layer BERT: all layers, attention 3, logits, two masked views, float16.

    Do not write into the folder: other tests share it.
    """
    out = tmp_path_factory.mktemp("store") / "cache.zarr"
    return build_tiny_store(out, tiny_teacher("bert"), tiny_corpus, max_rows=101, block_rows=8)


@pytest.fixture(scope="session")
def tiny_parts(tiny_store, tiny_teacher, tiny_corpus, tmp_path_factory) -> tuple[str, str]:
    """`tiny_store`, and a store like it of 33 rows of another text in blocks of 5."""
    folder = tmp_path_factory.mktemp("part")
    (folder / "other.txt").write_text("\n".join(reversed(tiny_corpus.read_text().splitlines())))
    other = build_tiny_store(
        folder / "other.zarr", tiny_teacher("bert"), folder / "other.txt", max_rows=33, block_rows=5
    )
    return str(tiny_store), str(other)


@pytest.fixture(scope="session")
def make_tiny_store(tiny_teacher, tiny_corpus) -> Callable[..., Path]:
    """`make_tiny_store(out, **settings)`: a store like `tiny_store` with some settings changed."""

    def make(out: Path, **changes: object) -> Path:
        return build_tiny_store(out, tiny_teacher("bert"), changes.pop("corpus", tiny_corpus), **changes)

    return make


def build_tiny_store(out: Path, teacher: Path, corpus: Path, **changes: object) -> Path:
    values: dict[str, object] = {
        "teacher": str(teacher),
        "corpus": (str(corpus),),
        "out": str(out),
        "seq_len": 24,
        "rows": "document",
        "layers": "all",
        "attention_layer": 3,
        "views": 2,
        "k": 16,
        "precision": "float16",
        "device": "cpu",
    }
    build_cache(BuildSettings(**{**values, **changes}))  # type: ignore[arg-type]
    return out


class Site:
    """Packages of somebody else, as pip leaves them: modules, and the metadata that names their entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def install(self, module: str, code: str, *, package: str, version: str, **entry_points: str) -> None:
        """A module of a package; `methods` and `mappings` are the lines `name = module` of its entry points."""
        (self.folder / f"{module}.py").write_text(code, encoding="utf-8")
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", "utf-8")
        groups = [f"[kdcache.{group}]\n{lines}\n" for group, lines in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(groups), "utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A folder of installed packages. What is registered in the test, or imported from there, is gone after it."""
    for registry in (ADDED_METHODS, ADDED_MAPPINGS):
        monkeypatch.setattr(registry, "_added", dict(registry._added))
    made = Site(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(made.folder)
    before = set(sys.modules)
    yield made
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(made.folder)):
            del sys.modules[name]
