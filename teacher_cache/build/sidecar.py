"""What a store keeps of the teacher beside its targets, so that training needs neither the teacher nor a network.

The Hugging Face folder of the teacher, and the projections of attention layers that are held as their input. What is
there already stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from teacher_cache.contract.manifest import Manifest
from teacher_cache.format.groups import Group
from teacher_cache.format.layout import projection_path
from teacher_cache.format.protocol import TEACHER, digest_object, has_teacher, write_teacher_files
from teacher_cache.format.small_arrays import has_constant, write_constant
from teacher_cache.models.attention import VECTORS, AttentionProjections
from teacher_cache.storage.local import LocalStorage, Storage
from teacher_cache.teacher.teacher import Teacher


def reach_attention(
    teacher: Teacher, groups: Iterable[Group], known: Mapping[int, AttentionProjections]
) -> dict[int, AttentionProjections]:
    """Make the attention of these groups readable, and find the projections that are not `known`. Before `start`.

    A group may hold other layers than the command names that mends it.
    """
    found = {}
    for group in groups:
        for spec in group.manifest.targets.attention:
            teacher.tap()
            if spec.mode == "hidden" and spec.layer not in known:
                projections = teacher.probe_attention(spec.layer)
                assert projections is not None, "the store was built by the same weights"
                found[spec.layer] = projections
    return found


def write_projections(storage: Storage, manifest: Manifest, projections: Mapping[int, AttentionProjections]) -> None:
    """Write the maps of attention layers in `hidden` mode, where they are not there yet."""
    for spec in manifest.targets.attention:
        for name in VECTORS if spec.mode == "hidden" else ():
            for part in ("weight", "bias"):
                path = projection_path(spec.layer, name, part)
                if not has_constant(storage, path):
                    write_constant(storage, path, getattr(getattr(projections[spec.layer], name), part).numpy())


def write_teacher(storage: Storage, teacher: Teacher) -> None:
    """Keep what students need of the teacher, so that training needs neither the teacher nor a network."""
    if has_teacher(storage):
        return
    with storage.scratch() as folder:
        teacher.save(folder)
        saved = LocalStorage(folder)
        files = {name: digest_object(saved, name) for name in saved.list()}
        for name in files:
            storage.write_file(f"{TEACHER}/{name}", folder / name)
    write_teacher_files(storage, {f"{TEACHER}/{name}": digest for name, digest in files.items()})
