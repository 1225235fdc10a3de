"""ONNX Runtime on the CPU: a file opened with so many threads, and run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def open_session(file: Path, threads: int) -> InferenceSession:
    """ONNX Runtime on `file` with so many CPU threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; its warnings are about nodes that it leaves as they are
    # threads that wait by spinning after a run would take the cores from the other model, whose turn it is
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: InferenceSession, feed: dict[str, Any]) -> Any:
    """The one output of the file as a NumPy array; `feed` holds both inputs as NumPy arrays."""
    return session.run(None, feed)[0]
