"""What `kdtrain` says of methods that a causal store cannot teach, and of `lm` where the teacher is a masked LM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdtrain
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings


@pytest.fixture(scope="module")
def stores(
    causal_teacher: Path,
    causal_corpus: Path,
    tiny_teacher: Callable[..., Path],
    tiny_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """A store of draws of a causal teacher, and one of a masked LM."""
    folder, made = tmp_path_factory.mktemp("stores"), {}
    for kind, teacher, corpus in (("causal", causal_teacher, causal_corpus), ("masked", tiny_teacher(), tiny_corpus)):
        made[kind] = str(folder / f"{kind}.zarr")
        build_cache(
            BuildSettings(
                teacher=str(teacher), corpus=(str(corpus),), out=made[kind], seq_len=16, max_rows=16, targets="logits",
                device="cpu",
            )
        )  # fmt: skip
    return made


@pytest.mark.parametrize(
    "kind, method, told",
    [
        ("masked", "lm", "comes from the masked LM .* no next tokens to learn; use --method mlm or od"),
        ("masked", "od+lm", "no next tokens to learn"),
        ("causal", "mlm", "comes from the causal LM .* no masked words to learn; use --method lm or od"),
        ("causal", "mha", "lacks attention 3.* It has logits; repeat the command .*--targets attention"),
        ("causal", "hs", "lacks hidden .* It has logits; repeat the command .*--targets hidden"),
    ],
)
def test_a_method_of_another_kind_is_one_message(
    stores: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, method: str, told: str
) -> None:
    import re

    out = tmp_path / "student"
    arguments = ["--cache", stores[kind], "--method", method, "--out", str(out), "--steps", "1", "--device", "cpu"]
    assert kdtrain.main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdtrain: ")]
    assert len(lines) == 1 and re.search(told, lines[0])
    assert not out.exists()
