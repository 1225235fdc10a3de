"""The packages that ONNX files need, and which of them are not there. Imports none of them."""

from __future__ import annotations

import importlib.util

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install 'kdcache[onnx]'"


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]
