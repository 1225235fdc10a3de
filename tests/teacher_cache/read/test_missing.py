"""What a store lacks is named, and the command that the message names adds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.targets import AttentionSpec, HiddenSpec, TargetSpecs
from teacher_cache.errors import TargetsError
from teacher_cache.read.missing import check_request
from teacher_cache.read.reader import CacheReader

Settings = Callable[..., BuildSettings]


def refusal(reader: CacheReader, request: TargetRequest) -> str:
    with pytest.raises(TargetsError) as refused:
        reader.require(request)
    return str(refused.value)


def with_flags(settings: BuildSettings, flags: str) -> BuildSettings:
    """The same build with the flags of a message."""
    words = flags.split()
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    values = dict(zip(names, words[1::2], strict=True))
    layer = values.pop("attention_layer", None)
    return replace(settings, **values, attention_layer=layer and int(layer))  # type: ignore[arg-type]


def test_the_flags_that_a_message_names_add_what_is_lacking(small_settings: Settings, tmp_path: Path) -> None:
    """In a store of one hidden state, with another form of logits than the default's and another attention layer."""
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2", logits="sample", max_rows=6)
    build_cache(settings)
    request = TargetRequest(hidden_layers=(1, 2, 4), attention_layers=(2, 3), logits=True)
    message = refusal(CacheReader.open(settings.out), request)
    assert "lacks hidden 1, hidden 4, attention 2, attention 3, logits" in message
    assert "It has hidden 2" in message
    commands = re.findall("`(.*?)`", message)
    assert commands == [
        "--targets logits,hidden,attention --layers 1,4 --attention-layer 2",
        "--targets attention --attention-layer 3",
    ]
    for flags in commands:
        build_cache(with_flags(settings, flags))
    reader = CacheReader.open(settings.out)
    reader.require(request)
    assert reader.manifest.targets.hidden_layers() == (1, 2, 4)
    assert reader.manifest.targets.logits.form == "sample"  # type: ignore[union-attr]


def test_only_what_is_lacking_is_named(small_store: Path) -> None:
    message = refusal(CacheReader.open(small_store), TargetRequest(hidden_layers=(1, 2), logits=True))
    assert "lacks hidden 1:" in message
    assert "It has logits, hidden 2, hidden 4, attention 3" in message
    assert "repeat the command that built it with `--targets hidden --layers 1`, which" in message


def test_masked_views_come_with_logits(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2", max_rows=6)
    build_cache(settings)
    request = TargetRequest(hidden_layers=(2, 4), masked=True)
    message = refusal(CacheReader.open(settings.out), request)
    assert "lacks hidden 4, masked views:" in message
    (flags,) = re.findall("`(.*?)`", message)
    assert flags == "--targets logits,hidden --layers 4"
    build_cache(with_flags(settings, flags))
    batch = CacheReader.open(settings.out).read_rows(0, 6, request)
    assert batch["masked"].places is not None and list(batch["plain"].hidden) == [2, 4]


def test_masked_views_of_a_teacher_without_a_head_come_with_another_target(
    tiny_teacher: Callable[..., Path], small_settings: Settings, tmp_path: Path
) -> None:
    teacher = str(tiny_teacher(head=False))
    settings = small_settings(
        tmp_path / "cache.zarr", teacher=teacher, targets="hidden", layers="1,2", attention_layer=None, max_rows=6
    )
    build_cache(settings)
    request = TargetRequest(hidden_layers=(2, 3, 4), attention_layers=(1, 2), masked=True)
    commands = re.findall("`(.*?)`", refusal(CacheReader.open(settings.out), request))
    assert commands == [
        "--targets hidden,attention --layers 3,4 --attention-layer 1",
        "--targets attention --attention-layer 2",
        "--targets attention --attention-layer 3 --hs-view masked",
    ]
    for flags in commands:
        build_cache(with_flags(settings, flags))
    batch = CacheReader.open(settings.out).read_rows(0, 6, request)
    assert batch["masked"].places is not None and list(batch["plain"].hidden) == [2, 3, 4]


def test_masked_views_that_no_target_is_left_for(small_store: Path) -> None:
    manifest = CacheReader.open(small_store).manifest
    plain = AttentionSpec(layer=1, form="vectors", codec="float16")
    targets = TargetSpecs(
        hidden=tuple(HiddenSpec(layer=layer, codec="float16") for layer in range(1, 5)),
        attention=tuple(replace(plain, layer=layer) for layer in range(1, 5)),
    )
    full = replace(manifest, teacher=replace(manifest.teacher, has_mlm_head=False), targets=targets)
    with pytest.raises(TargetsError, match="lacks masked views.*build another store, with --hs-view masked"):
        check_request(TargetRequest(masked=True), full, "cache.zarr")


def test_logits_of_a_teacher_without_a_head_are_not_promised(small_store: Path) -> None:
    manifest = CacheReader.open(small_store).manifest
    headless = replace(
        manifest, teacher=replace(manifest.teacher, has_mlm_head=False), targets=replace(manifest.targets, logits=None)
    )
    with pytest.raises(TargetsError, match="lacks logits.*no language-modelling head") as refused:
        check_request(TargetRequest(logits=True), headless, "cache.zarr")
    assert "--targets" not in str(refused.value)


def test_of_the_other_kind_of_teacher_there_is_nothing_to_add(small_store: Path, causal_store: Path) -> None:
    message = refusal(CacheReader.open(causal_store), TargetRequest(masked=True, logits=True))
    assert "comes from the causal LM" in message and "use --method lm or od" in message and "`" not in message
    message = refusal(CacheReader.open(small_store), TargetRequest(next_tokens=True, logits=True))
    assert "comes from the masked LM" in message and "use --method mlm or od" in message
    CacheReader.open(causal_store).require(TargetRequest(next_tokens=True, logits=True, hidden_layers=(2, 4)))
