"""Are all keys of a user's DeepSpeed configuration known to the DeepSpeed that is installed?

It passes over names that it does not know, but for some sections, and a misspelt section would leave training without
it. So its own reader is given the configuration once, and what it never asked for is refused. Costs the import of
DeepSpeed, which a training needs anyway, and milliseconds.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from contextlib import redirect_stdout
from typing import Any

from student_train.engine.engine import DeepSpeedConfig, import_deepspeed, refusals
from teacher_cache.errors import SettingsError
from teacher_cache.wording import did_you_mean

_WHOLE_BATCH = "train_batch_size"
_SIZES = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
"""In place of the real ones, which are checked elsewhere; the whole batch follows from these and the processes."""
_READ_LATER = ("params", "data_efficiency", "compression_training", "autotuning", "pipeline")
"""Sections that are handed on to what reads them when training starts, and refuses what it does not know."""


def check_keys(path: str, override: DeepSpeedConfig, config: DeepSpeedConfig, *, device: str) -> None:
    """Refuse names in `override`, the user's file, that DeepSpeed does not ask for when it reads `config`.

    Raises:
        SettingsError: there is such a name, or DeepSpeed refuses a value.
    """
    deepspeed = import_deepspeed(device)
    traced = _Traced({name: value for name, value in config.items() if name != _WHOLE_BATCH} | _SIZES)
    try:
        with redirect_stdout(sys.stderr):
            deepspeed.DeepSpeedConfig(traced)
    except refusals(deepspeed) as error:
        what = " ".join(str(error).split())
        raise SettingsError(
            f"--deepspeed {path!r} is refused by DeepSpeed ({what}): training would not start; correct the file"
        ) from error
    traced.asked.add("sequence_parallel_size")  # asked for only where several processes run
    for section, name, known in _unknown(override, traced, ""):
        raise SettingsError(
            f"--deepspeed {path!r} sets {section + name!r}, which DeepSpeed does not know: it would be passed "
            f"over, and training would run without it; {did_you_mean(name, sorted(known))} a name that it knows, or "
            "leave it out"
        )


class _Traced(dict[str, Any]):
    """A dictionary that remembers which names it was asked for, those that it does not have among them."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__({name: _Traced(each) if isinstance(each, dict) else each for name, each in content.items()})
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:
        return KeysView(self)

    def __iter__(self) -> Iterator[str]:  # so that ** asks for each name
        return super().__iter__()

    def items(self) -> Any:
        return ItemsView(self)

    def __copy__(self) -> _Traced:
        return self


def _unknown(override: Mapping[str, Any], traced: _Traced, section: str) -> Iterator[tuple[str, str, set[str]]]:
    """Section and name of what was not asked for, and the names that were."""
    for name, value in override.items():
        if name not in traced.asked:
            yield section, name, traced.asked - override.keys()
            continue
        inner = dict.get(traced, name)
        # one that was never asked went to a model as a whole, which knows its names
        if isinstance(value, dict) and isinstance(inner, _Traced) and inner.asked and name not in _READ_LATER:
            yield from _unknown(value, inner, f"{section}{name}.")
