"""The teacher's Hugging Face folder in a store: which files of it may be handed to Transformers.

A store may come from anybody, and Transformers does what a model folder says: it runs Python files that a configuration
names, unpickles weights, fetches attention kernels. A store says numbers and never what code runs, so what could do
any of that is refused by name before Transformers sees it. Files that no list names are not handed on at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from teacher_cache.errors import StoreError
from teacher_cache.models.token_ids import check_token_ids

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npy", ".npz", ".joblib")
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_NO_VOCABULARY = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
_MOST_JSON_BYTES = 256 * 2**20
"""A tokenizer of 250,000 ids takes 17 MB."""


def check_teacher_folder(folder: Path, names: Collection[str], entries: int, location: str) -> None:
    """Check that these files of a teacher's folder are weights, configuration and tokenizer, and nothing that runs.

    `entries` is how many ids the teacher's vocabulary has.

    Raises:
        StoreError: one of them is code, pickled, malformed, names code to be run, or gives a token another id.
    """
    if "config.json" not in names or not any(map(_may_hold_a_vocabulary, names)):
        raise StoreError(
            f"the teacher in {location!r} lists {', '.join(sorted(names)) or 'no files'}, and lacks its configuration "
            "or the vocabulary of its tokenizer: no student could read the rows; restore the store from a copy, or "
            "build it again"
        )
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        if suffix in _CODE or suffix in _PICKLED:
            what = "code" if suffix in _CODE else "in a format that can run code when it is loaded"
            raise _refused(location, name, f"is {what}")
        if suffix == ".json":
            _check_json(folder / name, name, location)
    try:
        check_token_ids([folder / name for name in names], entries)
    except ValueError as error:
        raise StoreError(
            f"the tokenizer of the teacher in {location!r} has other ids than the teacher: {error}. Text would become "
            "ids that no model reads, in as much memory as the largest of them; get the store from whoever built it "
            "with kdcache, or build it again"
        ) from error


def _may_hold_a_vocabulary(name: str) -> bool:
    """Each kind of tokenizer has files of its own; here is what holds none in any of them."""
    return name not in _NO_VOCABULARY and not name.endswith((".safetensors", ".safetensors.index.json"))


def _check_json(path: Path, name: str, location: str) -> None:
    size = path.stat().st_size
    if size > _MOST_JSON_BYTES:
        raise _refused(location, name, f"has {size} bytes of JSON, more than any tokenizer needs")
    try:
        fields: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(location, name, f"is no JSON ({type(error).__name__}: {error})") from error
    if name == "tokenizer.json" or not isinstance(fields, dict):
        return
    if fields.get("auto_map"):
        raise _refused(location, name, f"names Python code to be run: 'auto_map' is {fields['auto_map']!r}")
    if fields.get("quantization_config"):
        raise _refused(location, name, "asks for a quantised model: 'quantization_config' chooses code that loads it")
    for key in ("attn_implementation", "_attn_implementation"):
        if fields.get(key) not in _ATTENTION:
            raise _refused(
                location, name, f"names an attention kernel to be fetched and run: {key!r} is {fields[key]!r}"
            )


def _refused(location: str, name: str, what: str) -> StoreError:
    return StoreError(
        f"'teacher/{name}' in {location!r} {what}: a store holds numbers and text and never decides what code runs, so "
        "nothing of its teacher was loaded; get the store from whoever built it with kdcache, or build it again"
    )


def only_listed(folder: Path, names: Collection[str]) -> tempfile.TemporaryDirectory[str] | None:
    """A folder of links to these files, where the folder of the store has others beside them; None where it has not."""
    if {path.name for path in folder.iterdir()} == set(names):
        return None
    listed = tempfile.TemporaryDirectory(prefix="kdcache-teacher-", ignore_cleanup_errors=True)
    for name in names:
        (Path(listed.name) / name).symlink_to((folder / name).absolute())
    return listed
