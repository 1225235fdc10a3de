"""Teachers spread over memory and disk: what they compute is what they compute in memory, of several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import choose_batch_rows
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import TeacherError
from teacher_cache.models import placing
from teacher_cache.models.placing import Placement
from teacher_cache.read.reader import CacheReader
from teacher_cache.teacher.teacher import Teacher
from tests import causal_models

LITTLE = Placement(most_bytes={"cpu": 40_000}, cpu_only=True)
"""Less than the embeddings and layers of any tiny teacher."""
IDS = torch.arange(1, 61).view(3, 20)
LENGTH = torch.tensor([20, 20, 14])
STARTS = torch.zeros(3, 20, dtype=torch.bool)
STARTS[:, [0, 7]] = True


def everything(teacher: Teacher, starts_BT: torch.Tensor | None, attention: bool) -> dict[str, torch.Tensor]:
    """All that a build could take of some rows."""
    layers = range(teacher.record.layers + 1)
    outputs = teacher.run(
        IDS, LENGTH, hidden_layers=layers, attention_layers=[2] if attention else [], starts_BT=starts_BT
    )
    with torch.inference_mode():
        found = {"logits": teacher.head()(outputs.final_BTD.flatten(0, 1)), "final": outputs.final_BTD}
    found |= {f"hidden {layer}": states for layer, states in outputs.hidden.items()}
    if attention:
        found |= {name: getattr(outputs.attention[2], f"{name}_BTD") for name in ("query", "key", "value")}
    return found


def compare(folder: Path, *, dtype: str = "auto", starts_BT: torch.Tensor | None = None, attention: bool) -> Teacher:
    """Check that a placed teacher gives bit for bit what a resident one gives; the placed one."""
    teachers = [Teacher.load(str(folder), device="cpu", dtype=dtype, placement=each) for each in (None, LITTLE)]
    for teacher in teachers:
        if attention:
            teacher.tap()
        teacher.start()
    resident, placed = (everything(teacher, starts_BT, attention) for teacher in teachers)
    assert resident.keys() == placed.keys()
    for name, values in resident.items():
        assert torch.equal(values, placed[name]), name
    assert teachers[0].record == teachers[1].record
    return teachers[1]


def on_disk(teacher: Teacher) -> int:
    """How many weights have no place in memory."""
    return sum(parameter.device.type == "meta" for parameter in teacher.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_decoders_that_lie_on_the_disk_compute_the_same(family: str, tmp_path: Path) -> None:
    placed = compare(causal_models.save_teacher(tmp_path, family), starts_BT=STARTS, attention=False)
    assert on_disk(placed) > len(list(placed.model.parameters())) // 2


@pytest.mark.parametrize("family", ["bert", "modernbert", "electra"])
def test_encoders_that_lie_on_the_disk_compute_the_same(tiny_teacher: Callable[..., Path], family: str) -> None:
    placed = compare(tiny_teacher(family), attention=True)
    assert on_disk(placed) > len(list(placed.model.parameters())) // 2


def test_weights_are_brought_in_the_arithmetic_that_was_asked_for(tmp_path: Path) -> None:
    model = causal_models.make_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    causal_models.make_tokenizer().save_pretrained(tmp_path)
    placed = compare(tmp_path, attention=False)
    assert placed.dtype == "float32" and on_disk(placed)
    assert everything(placed, None, attention=False)["final"].dtype == torch.float32
    compare(tmp_path, dtype="bfloat16", attention=False)


def test_weights_that_have_room_stay_in_memory(causal_teacher: Path) -> None:
    roomy = Placement(most_bytes={"cpu": 10**9}, cpu_only=True)
    teacher = Teacher.load(str(causal_teacher), device="cpu", placement=roomy)
    teacher.start()
    assert not on_disk(teacher)


def test_a_store_is_the_same_byte_for_byte(causal_teacher: Path, causal_corpus: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "teacher": str(causal_teacher), "corpus": (str(causal_corpus),), "seq_len": 24, "max_rows": 20,
        "block_rows": 8, "batch_size": 4, "targets": "logits,hidden", "layers": "2,4", "device": "cpu",
    }  # fmt: skip
    stores = []
    for number, placing_flags in enumerate([{}, {"device_map": "auto", "max_memory": "cpu:40kB"}]):
        stores.append(tmp_path / f"{number}.zarr")
        build_cache(BuildSettings(**common, **placing_flags, out=str(stores[-1])))
    # the manifest has the time of its making, and a seal the manifest's hash
    resident, placed = (
        {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
        for store in stores
    )
    assert resident.keys() == placed.keys() and len(resident) > 50
    assert {name for name, data in resident.items() if data != placed[name]} <= {"zarr.json", "seal.json"}
    manifests = [CacheReader.open(store).manifest for store in stores]
    assert replace(manifests[0], created="") == replace(manifests[1], created="")


def test_a_build_that_was_begun_in_memory_goes_on_from_the_disk(
    causal_teacher: Path, causal_corpus: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "teacher": str(causal_teacher), "corpus": (str(causal_corpus),), "seq_len": 24, "max_rows": 20,
        "block_rows": 4, "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    whole = tmp_path / "whole.zarr"
    build_cache(BuildSettings(**common, out=str(whole)))

    class Stopped:
        """Progress that ends the build once two blocks are safe."""

        def note(self, text: str) -> None: ...

        def tokenised(self, documents: int, tokens: int) -> None: ...

        def committed(self, rows: int, total: int, written_bytes: int) -> None:
            if rows >= 8:
                raise KeyboardInterrupt

    stopped = tmp_path / "stopped.zarr"
    with pytest.raises(KeyboardInterrupt):
        build_cache(BuildSettings(**common, out=str(stopped)), Stopped())
    offloaded = BuildSettings(**common, out=str(stopped), device_map="auto", max_memory="cpu:40kB")
    report = build_cache(offloaded)
    assert 0 < report.computed_rows < 20
    shards = [path for path in whole.rglob("*") if path.is_file() and "c" in path.parts]
    assert shards
    for path in shards:
        assert (stopped / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_batches_grow_where_weights_are_brought_for_each(causal_teacher: Path) -> None:
    settings = BuildSettings(teacher=str(causal_teacher), device="cpu")
    placed = BuildSettings(teacher=str(causal_teacher), device="cpu", device_map="auto")
    chosen = BuildSettings(teacher=str(causal_teacher), device="cpu", device_map="auto", batch_size=3)
    teacher = Teacher.load(str(causal_teacher), device="cpu")
    assert [choose_batch_rows(each, teacher, 64) for each in (settings, placed, chosen)] == [64, 256, 3]


def test_what_is_not_limited_leaves_room_to_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 1000, "cpu": 4000})
    assert Placement().budget() == {0: 900, "cpu": 3600}
    assert Placement(most_bytes={"cpu": 7}, cpu_only=True).budget() == {"cpu": 7}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Placement(most_bytes={0: 990}).budget() == {0: 990, "cpu": 1800}, "two workers share the machine"


def test_a_limit_for_a_gpu_that_is_not_there_is_refused(causal_teacher: Path) -> None:
    absent = Placement(most_bytes={97: 10**9}, cpu_only=True)
    teacher = Teacher.load(str(causal_teacher), device="cpu", placement=absent)
    with pytest.raises(TeacherError, match=r"names device 97, which is not there: .* there are cpu"):
        teacher.start()


def test_a_file_that_is_unpacked_into_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"model.gguf' is a GGUF file, .* cannot be left on the disk"):
        Teacher.load(str(tmp_path / "model.gguf"), placement=LITTLE)


def test_what_is_not_installed_is_named(causal_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"package 'accelerate', .*kdcache\[offload\]"):
        Teacher.load(str(causal_teacher), placement=LITTLE)
