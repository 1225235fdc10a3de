"""Run a teacher once over a corpus and keep what students learn from in a compressed, self-describing zarr store.

Folders named by a noun are materials, each knowing only those below it: `contract`, `models`, `corpus`, `teacher`,
`codecs`, `storage`, `format`, `read`. Folders named by a verb are commands: `build`, `derive`, `verify`. Each folder's
`__init__.py` says where to begin in it. The files beside them are tools that know nothing of distillation.
Importing this package costs nothing: torch, transformers and zarr are imported by the modules that need them.

Doors for other programs, each documented where it lives and in README.md beside this file: `open_caches` and
`TargetRequest` read, `build_cache` builds, `derive_store` makes a smaller store, `describe_store` and `verify_store`
look at one. Each is imported with the first use of its name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.build.build import build_cache
    from teacher_cache.build.settings import BuildSettings
    from teacher_cache.contract.batch import TargetRequest
    from teacher_cache.derive.derive import derive_store
    from teacher_cache.derive.settings import DeriveSettings
    from teacher_cache.importing.importing import import_store
    from teacher_cache.importing.settings import ImportSettings
    from teacher_cache.read.info import describe_store
    from teacher_cache.read.pool import open_caches
    from teacher_cache.verify.verify import verify_store

__all__ = [
    "BuildSettings",
    "DeriveSettings",
    "ImportSettings",
    "TargetRequest",
    "build_cache",
    "derive_store",
    "describe_store",
    "import_store",
    "open_caches",
    "verify_store",
]

_HOMES = {
    "BuildSettings": "build.settings",
    "DeriveSettings": "derive.settings",
    "ImportSettings": "importing.settings",
    "TargetRequest": "contract.batch",
    "build_cache": "build.build",
    "derive_store": "derive.derive",
    "describe_store": "read.info",
    "import_store": "importing.importing",
    "open_caches": "read.pool",
    "verify_store": "verify.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
