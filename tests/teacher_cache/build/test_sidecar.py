"""What a store keeps of the teacher beside its targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from teacher_cache.build.settings import BuildSettings
from teacher_cache.build.sidecar import reach_attention, write_projections, write_teacher, write_variances
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.format.groups import Group
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import SEAL, TEACHER_FILES, has_teacher, read_manifest, read_teacher_files
from teacher_cache.format.small_arrays import read_constant
from teacher_cache.format.transforms import read_projections
from teacher_cache.models.attention import AttentionProjections, Projection
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay
from teacher_cache.teacher.teacher import Teacher

Settings = Callable[..., BuildSettings]


def test_the_store_carries_the_teacher_unchanged(small_settings: Settings, small_store: Path, tmp_path: Path) -> None:
    original = AutoModelForMaskedLM.from_pretrained(small_settings(tmp_path).teacher)
    kept = AutoModelForMaskedLM.from_pretrained(CacheReader.open(small_store).teacher_folder())
    for (name, want), (_, have) in zip(original.state_dict().items(), kept.state_dict().items(), strict=True):
        assert torch.equal(want, have), name


@pytest.fixture(scope="module")
def attention_manifest(plain_manifest: Callable[..., Manifest]) -> Manifest:
    """Attention 3 computed from hidden state 2, attention 2 as vectors."""
    return plain_manifest(
        TargetSpecs(
            hidden=(HiddenSpec(layer=2, codec="float16"),),
            attention=(
                AttentionSpec(layer=2, form="vectors", codec="float16"),
                AttentionSpec(layer=3, form="shared", codec="float16"),
            ),
        )
    )


def test_projections_that_are_not_known_are_found(
    tiny_teacher: Callable[..., Path], attention_manifest: Manifest
) -> None:
    """Of layers that are held as their input, and of no others."""
    teacher = Teacher.load(str(tiny_teacher("bert")), device="cpu")
    groups = [Group(prefix="", manifest=attention_manifest, seal=None)]
    found = reach_attention(teacher, groups, {})
    assert set(found) == {3}
    layer = teacher.model.bert.encoder.layer[2].attention.self
    for name in VECTORS:
        assert torch.equal(getattr(found[3], name).weight, getattr(layer, name).weight)
        assert torch.equal(getattr(found[3], name).bias, getattr(layer, name).bias)
    assert reach_attention(teacher, groups, found) == {}
    # attention of every layer can be read from now on
    outputs = teacher.run(torch.tensor([[5, 6]]), torch.tensor([2]), attention_layers=[2])
    assert outputs.attention[2].key_BTD.shape == (1, 2, 32)


def test_projections_are_written_once_and_read_back(
    tiny_teacher: Callable[..., Path], attention_manifest: Manifest, tmp_path: Path
) -> None:
    teacher, storage = Teacher.load(str(tiny_teacher("bert")), device="cpu"), LocalStorage(tmp_path)
    found = reach_attention(teacher, [Group(prefix="", manifest=attention_manifest, seal=None)], {})
    write_projections(storage, StoreLayout.of(attention_manifest), found)
    before = {key: storage.read(key) for key in storage.list()}
    assert {key.split("/")[1] for key in before if key.startswith("attention/3/")} == {"3"}
    assert not storage.list("attention/2/")
    read = read_projections(storage, attention_manifest, 3)
    for name in VECTORS:
        assert torch.equal(getattr(read, name).weight, getattr(found[3], name).weight)
        assert torch.equal(getattr(read, name).bias, getattr(found[3], name).bias)
    zeros = Projection(weight=torch.zeros(32, 32), bias=torch.zeros(32))
    write_projections(
        storage, StoreLayout.of(attention_manifest), {3: AttentionProjections(query=zeros, key=zeros, value=zeros)}
    )
    assert {key: storage.read(key) for key in storage.list()} == before, "what is there stays"


def test_a_teacher_is_kept_whole_or_again(tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    """Its list comes last: without it, or with a file in another size, all files are written anew."""
    teacher, storage = Teacher.load(str(tiny_teacher("bert")), device="cpu"), LocalStorage(tmp_path / "store")
    with storage.lock():
        write_teacher(storage, teacher)
        whole = {key: storage.read(key) for key in storage.list()}
        assert {"teacher/config.json", "teacher/model.safetensors", "teacher/tokenizer.json", TEACHER_FILES} <= set(
            whole
        )
        assert set(read_teacher_files(storage)) == set(whole) - {TEACHER_FILES}
        for damage in ("teacher/config.json", TEACHER_FILES):
            storage.delete(damage)
            assert not has_teacher(storage)
            write_teacher(storage, teacher)
            assert {key: storage.read(key) for key in storage.list()} == whole
        storage.write("teacher/config.json", b" " * len(whole["teacher/config.json"]))
        write_teacher(storage, teacher)
        assert storage.read("teacher/config.json") != whole["teacher/config.json"], "contents are for verify"


@pytest.mark.parametrize("store", ["small_store", "nmse_store"])
def test_variances_are_those_of_the_stored_values(store: str, request: pytest.FixtureRequest) -> None:
    """Beside plain float64 of everything at once; padding counts nothing."""
    base = LocalStorage(request.getfixturevalue(store))
    draft = Overlay(base)
    for key in base.list():
        if "/variance/" in key or key == SEAL:
            draft.delete(key)
    manifest = read_manifest(draft)
    write_variances(draft, manifest, complete=("",))
    targets = CacheReader.of(base).read_rows(0, 40, TargetRequest(hidden_layers=(2, 4)))["plain"]
    real_BT = targets.real_BT()
    for layer in (2, 4):
        values_ND = targets.hidden[layer][real_BT].double()
        want = float((values_ND - values_ND.mean(dim=0)).square().sum(dim=1).mean())
        assert float(read_constant(draft, f"hidden/{layer}/variance")) == pytest.approx(want, rel=1e-9)
        assert draft.written[f"hidden/{layer}/variance/c"] == base.read(f"hidden/{layer}/variance/c")
    written = dict(draft.written)
    write_variances(draft, manifest, complete=("",))
    assert draft.written == written
