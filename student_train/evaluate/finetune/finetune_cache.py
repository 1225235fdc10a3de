"""Results of fine-tuning runs by content: the same weights, tokenizer, examples and settings are trained once.

One small JSON file per run, named by the SHA-256 of everything that decides its result, written when the run ends.
Files may be deleted at any time. A folder that cannot be written to costs the next run its time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def identify(key: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()


class ResultCache:
    """The results in one folder. Those that lack one of `names` do not count."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, set(names)
        self.writable = True

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a run, None if it is not there; a damaged file counts as none."""
        try:
            entry = json.loads(self._file(key).read_text(encoding="utf-8"))
            result: dict[str, Any] = entry["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if entry.get("key") == key and isinstance(result, dict) and result.keys() == self.names else None

    def keep(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Remember a result; says once on the log where that is not possible."""
        file = self._file(key)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"key": key, "result": result}, indent=2), encoding="utf-8")
            temporary.replace(file)
        except OSError as error:
            if self.writable:
                log.warning(
                    "results are not kept, for %r cannot be written to (%s): a second run starts from the beginning; "
                    "give --cache-dir a folder that can",
                    str(self.folder),
                    error.strerror,
                )
            self.writable = False

    def _file(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{identify(key)}.json"
