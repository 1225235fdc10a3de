"""Run a teacher once over a corpus and keep what students learn from in a compressed, self-describing zarr store.

Folders named by a noun are materials, each knowing only those below it: `contract`, `models`, `corpus`, `teacher`,
`codecs`, `storage`, `format`, `read`. Folders named by a verb are commands: `build`, `derive`, `verify`. Each folder's
`__init__.py` says where to begin in it. The files beside them are tools that know nothing of distillation.
Importing this package costs nothing: torch, transformers and zarr are imported by the modules that need them.
"""
