"""What is known of a teacher whose weights are somewhere else: its configuration and its tokenizer.

Students take their family and their sizes from the configuration, exports the tokenizer, so both go into the store, in
the folder that holds the whole teacher of a store that was built. Of the weights nothing is known: the teacher is told
from others by its name, its tokenizer and its configuration.
"""

from __future__ import annotations

import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from teacher_cache.contract.manifest import TeacherRecord, sha256_of_json
from teacher_cache.corpus.corpus import tokenizer_fingerprint
from teacher_cache.errors import SettingsError, TeacherError, first_line
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.models.families import read_config
from teacher_cache.teacher.loading import check_tokenizer, load_tokenizer, teacher_kind

_CONFIG = "config.json"
_OF_WEIGHTS = ("quantization_config", "auto_map")
"""Fields about how weights are stored, and what code runs them: neither is there."""
_OF_A_WRITER = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache")
"""Fields that say nothing of what a model computes."""


class KnownTeacher:
    """Configuration and tokenizer of a causal LM."""

    def __init__(self, name: str, config: PreTrainedConfig, tokenizer: Any) -> None:
        self.name = name
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, settings: ImportSettings) -> KnownTeacher:
        """Read both from local folders.

        Raises:
            SettingsError: a folder is not there, or holds no configuration.
            TeacherError: one of them cannot be read, or the teacher is no causal LM.
        """
        folder = Path(settings.teacher_config or settings.tokenizer).expanduser()
        words = Path(settings.tokenizer).expanduser()
        if not words.is_dir():
            raise SettingsError(
                f"--tokenizer {settings.tokenizer!r} is no folder: ids could not be checked, and no student could be "
                "exported; give the folder with the teacher's tokenizer.json"
            )
        if not (folder / _CONFIG).is_file():
            flag = "--tokenizer" if settings.teacher_config is None else "--teacher-config"
            raise SettingsError(
                f"{flag} {str(folder)!r} holds no {_CONFIG}: how large the teacher's vocabulary is, and what family "
                "its students are of, would not be known; give --teacher-config DIR, a folder with that file (it takes "
                "no weights)"
            )
        config = _read_config(folder)
        kind = teacher_kind(str(folder), config)
        if kind != "causal-lm":
            raise TeacherError(
                f"the configuration in {str(folder)!r} is that of a {config.model_type!r}, which predicts masked "
                "tokens: what is imported are distributions and states of causal LMs; build such a store with "
                "`kdcache build`"
            )
        tokenizer = load_tokenizer(str(words), config, None)
        check_tokenizer(str(words), tokenizer, config, kind)
        return cls(settings.teacher or folder.resolve().name, config, tokenizer)

    @cached_property
    def tokens(self) -> int:
        """One more than the largest id of the tokenizer; the vocabulary may be padded beyond."""
        largest = max(int(number) for number in self.tokenizer.get_vocab().values())
        return min(1 + largest, int(self.config.vocab_size))

    def record(self, seq_len: int) -> TeacherRecord:
        """What a store records of it; it has read rows of `seq_len` tokens."""
        config = self.config
        known = {
            "name": self.name,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "configuration": {
                name: value for name, value in json.loads(config.to_json_string()).items() if name not in _OF_A_WRITER
            },
        }
        return TeacherRecord(
            name=self.name,
            revision=None,
            weights_sha256=sha256_of_json(known),
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=max(getattr(config, "max_position_embeddings", None) or 0, seq_len),
            has_mlm_head=True,
            kind="causal-lm",
        )

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder without weights."""
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _read_config(folder: Path) -> PreTrainedConfig:
    """The configuration, whatever became of the weights that it was written for."""
    try:
        fields = json.loads((folder / _CONFIG).read_bytes())
        fields = {name: value for name, value in fields.items() if name not in _OF_WEIGHTS}
        with tempfile.TemporaryDirectory(prefix="kdcache-config-") as copy:
            (Path(copy) / _CONFIG).write_text(json.dumps(fields), encoding="utf-8")
            return read_config(copy)
    except Exception as error:
        # the file is anybody's: a field of a wrong type is stumbled over wherever it is first used
        raise TeacherError(
            f"the configuration in {str(folder)!r} cannot be read ({type(error).__name__}: {first_line(error)}): the "
            "teacher's vocabulary and sizes would not be known; give the config.json of a model that Transformers "
            "knows"
        ) from error
