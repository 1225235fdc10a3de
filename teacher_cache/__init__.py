"""Run a teacher once over a corpus and keep what students learn from in a compressed, self-describing zarr store.

Importing this package costs nothing: torch, transformers and zarr are imported by the modules that need them.
"""
