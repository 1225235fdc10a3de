"""The picture of a training: a PNG of a size for a page, drawn without a display, nothing cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from student_train.evaluate.report.training_plot import plot_training
from tests.student_train.evaluate.reports import make_report


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.4])
def test_picture(tmp_path: Path, scale: float) -> None:
    """A PNG of a size for a page, drawn without a display, with curve, points and nothing cut off at its edges."""
    from matplotlib.image import imread

    records = [{"step": 0, "valid_loss": 3.0}]
    records += [{"step": step, "loss": 3.0 / step} for step in range(1, 20)]
    records += [{"step": 19, "valid_loss": 0.2}]
    path = tmp_path / "picture.png"
    plot_training(records, {"before": make_report(), "after": make_report(scale)}, path, title="a student")
    pixels = imread(path)[:, :, :3]
    assert pixels.shape[:2] == (648, 1560)
    inked = (pixels < 0.9).any(axis=2)
    left, right = inked[:, : pixels.shape[1] // 2], inked[:, pixels.shape[1] // 2 :]
    assert left.mean() > 0.01 and right.mean() > 0.01
    for edge in (inked[:3], inked[-3:], inked[:, -3:]):
        assert not edge.any()
    for color in ((0x1F, 0x5F, 0xA8), (0xD9, 0x66, 0x1F)):
        assert (np.abs(pixels * 255 - color).max(axis=2) < 8).any(), color
