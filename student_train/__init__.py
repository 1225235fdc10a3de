"""Train students from a teacher cache, with DeepSpeed and without the teacher in memory, and measure them.

Begin with `train/train.py`, what `kdtrain` does, or with `data/batches.py` for a loop of your own. Doors for other
programs, each documented where it lives and in `teacher_cache/README.md`: `train` and `TrainSettings` are `kdtrain`,
`training_batches` and `CacheDataset` read a cache for other trainers, `register_method` and `register_mapping` add to
what `kdtrain` knows. Reads stores and never builds one.

Importing this package costs nothing: torch and deepspeed are imported with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.data.batches import training_batches
    from student_train.data.dataset import BlockSampler, CacheDataset
    from student_train.layer_map import register_mapping
    from student_train.methods.additions import register_method
    from student_train.settings import TrainSettings
    from student_train.train.train import train

__all__ = [
    "BlockSampler",
    "CacheDataset",
    "TrainSettings",
    "register_mapping",
    "register_method",
    "train",
    "training_batches",
]

_HOMES = {
    "BlockSampler": "data.dataset",
    "CacheDataset": "data.dataset",
    "TrainSettings": "settings",
    "register_mapping": "layer_map",
    "register_method": "methods.additions",
    "training_batches": "data.batches",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module(f"{__name__}.train")  # the wing: calling it trains
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
