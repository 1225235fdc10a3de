"""What a seal vouches for byte by byte can still be wrong: objects that were sealed with impossible contents.

Whoever makes a store can seal anything. So the few objects that decide what else is read and how numbers are decoded
are parsed here as readers parse them: the list of the files of the teacher, and every small array of constants. Cost:
they are read once more.
"""

from __future__ import annotations

from collections.abc import Iterator

from teacher_cache.errors import StoreError
from teacher_cache.format.layout import StoreLayout
from teacher_cache.format.protocol import METADATA, NOT_AN_OBJECT, TEACHER_FILES, Seal, damage, read_teacher_files
from teacher_cache.format.small_arrays import read_constant
from teacher_cache.storage.base import Storage


def impossible_contents(storage: Storage, layout: StoreLayout, seal: Seal) -> Iterator[tuple[str, str]]:
    """Keys of sealed objects whose bytes are as they were sealed and whose contents cannot be, and what is wrong."""

    def is_as_sealed(*keys: str) -> bool:
        # a changed byte is found by its hash, and said once
        return all(damage(storage, key, seal.objects[key]) is None for key in keys)

    if TEACHER_FILES in seal.objects and is_as_sealed(TEACHER_FILES):
        try:
            read_teacher_files(storage)
        except (OSError, *NOT_AN_OBJECT) as error:
            yield TEACHER_FILES, f"was sealed with contents that cannot be read ({error})"
    for path, spec in layout.constants.items():
        keys = [key for key in seal.objects if key.startswith(f"{path}/")]
        try:
            read_constant(storage, path, spec)
        except StoreError as error:
            if keys and is_as_sealed(*keys):
                yield f"{path}/{METADATA}", f"was sealed as what no build writes ({error.__cause__})"
