"""What a build stores is what a fresh teacher computes, for every family, precision, batch size and interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import Silent
from teacher_cache.build.settings import BuildSettings
from teacher_cache.codecs.fixed import make_codec
from teacher_cache.codecs.logits import LogProbabilityCodec
from teacher_cache.codecs.sparse_logits import sample_points
from teacher_cache.contract.batch import AttentionRelations, Batch, SampledLogits, TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.errors import SettingsError, StoreError, TeacherError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader

Settings = Callable[..., BuildSettings]
FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]
OTHER_FAMILIES = [
    "camembert", "albert", "data2vec-text", "ernie", "eurobert", "nomic_bert", "roberta-prelayernorm", "xlm-roberta-xl",
]  # fmt: skip
EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)


def assert_within(values: torch.Tensor, live: torch.Tensor, bound: torch.Tensor) -> None:
    """Every decoded value is within the codec's bound of the live one, and float noise of another batch shape."""
    noise = 1e-5 * live.abs().max()
    excess = (values - live).abs() - bound - noise
    assert float(excess.max()) <= 0, f"off by {float(excess.max()):g} beyond the declared error"


def check_against_live_teacher(teacher: str, batch: Batch, precision: str, k: int, temperature: float = 1.0) -> None:
    """Run the teacher as any user would, row by row, and compare every target."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    enable_tap(model)
    codec = make_codec(precision)
    for targets in batch.values():
        for row in range(len(targets.input_ids_BT)):
            ids_BT, real_T = targets.input_ids_BT[row : row + 1], targets.real_BT()[row]
            with torch.no_grad(), record_attention(model, [3]) as recorded:
                live = model(ids_BT, attention_mask=real_T[None].long(), output_hidden_states=True)
            for layer, values in targets.hidden.items():
                want_TD = live.hidden_states[layer][0][real_T]
                assert_within(values[row][real_T], want_TD, codec.error_bound_ND(want_TD))
                assert not values[row][~real_T].any(), "padding is stored as zeros"
            for vectors in targets.attention.values():
                for name in VECTORS:
                    want_TD = getattr(recorded.vectors[3], f"{name}_BTD")[0][real_T]
                    have_TD = getattr(vectors, f"{name}_BTD")[row][real_T]
                    # in `hidden` mode the error is that of the projected input: bounded by its norm, loosely
                    assert (have_TD - want_TD).pow(2).mean() <= 1e-3 * want_TD.pow(2).mean()
                    if precision == "float16":
                        assert (have_TD - want_TD).abs().max() <= 4e-3 * want_TD.abs().max()
            if targets.logits is not None:
                assert targets.places is not None
                real_M = targets.places.real_BM()[row]
                positions_M = targets.places.positions_BM[row][real_M]
                want_MV = (live.logits[0, positions_M] / temperature).double().log_softmax(-1)
                if isinstance(targets.logits, SampledLogits):
                    points_MN = sample_points(0, targets.row_id_B[row].numpy().repeat(len(want_MV)), 0,
                                              np.arange(len(want_MV)), k)  # fmt: skip
                    check_draws(targets.logits, row, real_M, torch.from_numpy(points_MN), want_MV)
                    continue
                top = want_MV.topk(k, dim=-1)
                have_ids = targets.logits.ids_BMK[row][real_M]
                assert torch.equal(have_ids.sort().values, top.indices.sort().values)
                want_log_probs = want_MV.gather(1, have_ids)
                bound = LogProbabilityCodec("float16" if precision == "float16" else "root8").error_bound(
                    want_log_probs
                )
                assert_within(targets.logits.log_probs_BMK[row][real_M].exp(), want_log_probs.exp(), bound)
                want_tail = (1 - top.values.exp().sum(-1)).log()
                assert (targets.logits.log_tail_BM[row][real_M] - want_tail).abs().max() < 0.01


def check_draws(
    drawn: SampledLogits, row: int, real_M: torch.Tensor, points_MN: torch.Tensor, want_MV: torch.Tensor
) -> None:
    """Every draw is the id whose share of the live distribution, ids in order, its point falls into."""
    counts_MK = drawn.counts_BMK[row]
    assert not counts_MK[~real_M].any()
    assert (counts_MK[real_M].sum(1) == points_MN.shape[1]).all()
    end_MV = want_MV.exp().cumsum(1)
    for place, (ids_K, counts_K) in enumerate(zip(drawn.ids_BMK[row][real_M], counts_MK[real_M], strict=True)):
        ids_K, counts_K = ids_K[counts_K > 0], counts_K[counts_K > 0]
        assert (ids_K.diff() > 0).all()
        ids_N = ids_K.repeat_interleave(counts_K.long())
        end_N, share_N = end_MV[place, ids_N], want_MV[place, ids_N].exp()
        noise = 1e-5
        assert (points_MN[place] <= end_N + noise).all()
        assert (points_MN[place] >= end_N - share_N - noise).all()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_cached_equals_live_for_every_target_and_family(small_settings: Settings, tmp_path: Path, family: str) -> None:
    settings = small_settings(tmp_path / "cache.zarr", family)
    build_cache(settings)
    batch = CacheReader.open(settings.out).read_rows(10, 40, EVERYTHING)
    assert set(batch) == {"plain", "masked"}
    check_against_live_teacher(settings.teacher, batch, "float16", settings.entries(causal=False))


@pytest.mark.parametrize("precision", ["float16", "nmse:1e-2"])
def test_draws_are_those_of_the_live_distribution(small_settings: Settings, tmp_path: Path, precision: str) -> None:
    settings = small_settings(
        tmp_path / "cache.zarr", logits="sample", k=30, temperature=1.5, targets="logits", precision=precision, views=2
    )
    build_cache(settings)
    reader = CacheReader.open(settings.out)
    batch = reader.read_rows(0, 40, TargetRequest(logits=True))
    check_against_live_teacher(settings.teacher, batch, "float16", 30, temperature=1.5)
    other = reader.read_rows(0, 40, TargetRequest(logits=True), masked_view=1)["masked"].logits
    drawn = batch["masked"].logits
    assert isinstance(other, SampledLogits)
    assert isinstance(drawn, SampledLogits)
    assert not torch.equal(other.ids_BMK, drawn.ids_BMK)
    for start, stop in ((0, 1), (7, 16), (15, 40)):
        part = reader.read_rows(start, stop, TargetRequest(logits=True))["masked"].logits
        assert isinstance(part, SampledLogits)
        assert torch.equal(part.ids_BMK, drawn.ids_BMK[start:stop])
        assert torch.equal(part.counts_BMK, drawn.counts_BMK[start:stop])


def test_int4_is_within_its_declared_error(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="int4", targets="hidden,logits")
    build_cache(settings)
    batch = CacheReader.open(settings.out).read_rows(0, 20, TargetRequest(hidden_layers=(2, 4), logits=True))
    check_against_live_teacher(settings.teacher, batch, "int4", settings.entries(causal=False))


def test_int8_is_within_its_declared_error_at_any_temperature(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="int8", temperature=2.5, relations="qkv")
    build_cache(settings)
    batch = CacheReader.open(settings.out).read_rows(0, 20, EVERYTHING)
    check_against_live_teacher(settings.teacher, batch, "int8", settings.entries(causal=False), temperature=2.5)


def test_cached_equals_live_on_the_real_teacher(shared_teacher: Path, shared_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "some.txt"
    import gzip

    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        corpus.write_text("".join(line for line, _ in zip(text, range(20), strict=False)), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(corpus),), out=str(tmp_path / "cache.zarr"), seq_len=64, max_rows=8,
        layers="2,4", attention_layer=3, precision="float16",
    )  # fmt: skip
    build_cache(settings)
    batch = CacheReader.open(settings.out).read_rows(0, 8, EVERYTHING)
    check_against_live_teacher(settings.teacher, batch, "float16", settings.entries(causal=False))


def test_log_probabilities_take_a_byte_where_vectors_take_a_share_of_their_variance(
    small_settings: Settings, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", targets="logits")
    build_cache(settings)
    batch = CacheReader.open(settings.out).read_rows(0, 20, TargetRequest(logits=True))
    check_against_live_teacher(settings.teacher, batch, "int8", settings.entries(causal=False))


def test_masked_hidden_states_and_several_views(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", hs_view="masked", views=2)
    build_cache(settings)
    reader = CacheReader.open(settings.out)
    first = reader.read_rows(14, 20, EVERYTHING, masked_view=0)
    second = reader.read_rows(14, 20, EVERYTHING, masked_view=1)
    assert set(first) == {"masked"}
    assert not torch.equal(first["masked"].input_ids_BT, second["masked"].input_ids_BT)
    check_against_live_teacher(settings.teacher, first, "float16", settings.entries(causal=False))
    check_against_live_teacher(settings.teacher, second, "float16", settings.entries(causal=False))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_relation_matrices_are_those_of_the_live_teacher(small_settings: Settings, tmp_path: Path, family: str) -> None:
    settings = small_settings(
        tmp_path / "cache.zarr", family, targets="attention", relations="matrix", relation_heads=4, rows="document",
        hs_view="masked", views=2, precision="nmse:1e-2",
    )  # fmt: skip
    build_cache(settings)
    reader, request = CacheReader.open(settings.out), TargetRequest(attention_layers=(3,))
    assert describe_store(settings.out).groups[0].targets == {
        "attention 3": "matrix of 4 relation heads, masked view, float16"
    }
    model = AutoModelForMaskedLM.from_pretrained(settings.teacher).eval()
    enable_tap(model)
    for masked_view, (start, stop) in enumerate(((14, 18), (0, 40))):
        targets = reader.read_rows(start, stop, request, masked_view=masked_view)["masked"]
        relations = targets.attention[3]
        assert isinstance(relations, AttentionRelations)
        assert targets.length_B.min() < 24, "no row is padded"
        for row, length in enumerate(targets.length_B.tolist()):
            with torch.no_grad(), record_attention(model, [3]) as recorded:
                model(targets.input_ids_BT[row : row + 1, :length])
            for name in VECTORS:
                have_ATT = getattr(relations, f"{name}_BATT")[row]
                parts = getattr(recorded.vectors[3], f"{name}_BTD")[0].double().split(8, dim=1)
                want_ATT = torch.stack([(x @ x.T / 8**0.5).softmax(1) for x in parts])
                error_ATT = (have_ATT[:, :length, :length].double() - want_ATT).abs()
                assert (error_ATT <= want_ATT * 2**-11 + 2**-25 + 1e-5).all()
                assert not have_ATT[:, length:].any()
                assert not have_ATT[:, :, length:].any()


def test_the_attention_input_is_stored_once(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", max_rows=16)
    build_cache(settings)
    assert (Path(settings.out) / "hidden/2/codes").is_dir()
    assert not (Path(settings.out) / "attention/3/input").exists()
    alone = small_settings(tmp_path / "alone.zarr", max_rows=16, targets="attention")
    build_cache(alone)
    assert (Path(alone.out) / "attention/3/input/codes").is_dir()
    request = TargetRequest(attention_layers=(3,))
    shared, own = (CacheReader.open(s.out).read_rows(0, 16, request)["plain"] for s in (settings, alone))
    assert torch.equal(shared.attention[3].key_BTD, own.attention[3].key_BTD)


def test_a_checkpoint_without_head_gives_all_but_logits(
    small_settings: Settings, tiny_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    headless = str(tiny_teacher("bert", head=False))
    settings = small_settings(tmp_path / "cache.zarr", teacher=headless, max_rows=8)
    build_cache(settings)
    reader = CacheReader.open(settings.out)
    assert reader.manifest.targets.logits is None
    assert reader.views_for(TargetRequest(hidden_layers=(2,))) == ("plain",)
    _, info = AutoModel.from_pretrained(reader.teacher_folder(), output_loading_info=True)
    assert not [key for key in info["missing_keys"] if not key.startswith("pooler")]
    with pytest.raises(TeacherError, match="no language-modelling head"):
        build_cache(small_settings(tmp_path / "no.zarr", teacher=headless, targets="logits"))
    assert not (tmp_path / "no.zarr").exists()


def test_a_longer_build_starts_with_the_same_rows_and_masks(small_settings: Settings, tmp_path: Path) -> None:
    batches = []
    for rows, block_rows in ((12, 5), (40, 16)):
        settings = small_settings(tmp_path / f"{rows}.zarr", max_rows=rows, block_rows=block_rows, batch_size=3)
        build_cache(settings)
        batches.append(CacheReader.open(settings.out).read_rows(0, 12, EVERYTHING))
    short, long = batches
    for view in ("plain", "masked"):
        assert torch.equal(short[view].input_ids_BT, long[view].input_ids_BT)
        assert torch.equal(short[view].row_id_B, long[view].row_id_B)
    short_masks, long_masks = short["masked"].places, long["masked"].places
    assert short_masks is not None
    assert long_masks is not None
    for name in ("positions_BM", "label_ids_BM", "count_B"):
        assert torch.equal(getattr(short_masks, name), getattr(long_masks, name))


def all_but_provenance(store: Path) -> dict[str, bytes]:
    """Every file; not the root manifest, which records time and command line, and the seal, which holds its hash."""
    files = {file.relative_to(store).as_posix(): file for file in sorted(store.rglob("*")) if file.is_file()}
    return {key: file.read_bytes() for key, file in files.items() if key not in ("zarr.json", "seal.json")}


def test_a_damaged_shard_that_no_commit_counts_does_not_stop_a_build(
    small_settings: Settings, small_store: Path, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr")
    out = Path(shutil.copytree(small_store, settings.out))
    (out / "seal.json").unlink()
    (out / "commits/00000001.json").unlink()
    (out / "hidden/4/codes/c/1/0/0").write_bytes(b"half a shard")
    build_cache(settings)
    assert all_but_provenance(out) == all_but_provenance(small_store)


def test_building_again_refills_what_a_sealed_store_lost(
    small_settings: Settings, small_store: Path, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr")
    out = Path(shutil.copytree(small_store, settings.out))
    (out / "hidden/2/codes/c/2/0/0").unlink()
    with pytest.raises(StoreError, match="delete it and run the same `kdcache build` again"):
        CacheReader.open(out).read_rows(32, 40, EVERYTHING)
    assert build_cache(settings).computed_rows == 8
    assert all_but_provenance(out) == all_but_provenance(small_store)
    assert build_cache(settings).computed_rows == 0


def test_undefined_logits_are_refused_whatever_the_precision(
    small_settings: Settings, tiny_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_teacher("bert"), tmp_path / "teacher"))
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.cls.predictions.bias[7] = float("nan")
    model.save_pretrained(folder)
    for logits, precision in (("topk", "float16"), ("topk", "int8"), ("sample", "int8")):
        settings = small_settings(
            tmp_path / f"{logits}-{precision}.zarr", teacher=str(folder), logits=logits, precision=precision
        )
        with pytest.raises(TeacherError, match="undefined or infinite"):
            build_cache(settings)


def test_resuming_with_other_settings_is_refused_by_name(small_settings: Settings, small_store: Path) -> None:
    with pytest.raises(StoreError) as refused:
        build_cache(small_settings(small_store, seed=7, k=4, views=2))
    message = str(refused.value)
    for part in ("--seed: the store has 0, this command asks for 7", "--views", "topk 8", "topk 4"):
        assert part in message


def test_another_folder_is_not_overwritten(small_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not a store"):
        build_cache(small_settings(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_store_of_the_beginning_of_a_corpus_goes_on_with_that_alone(small_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    asked = {"targets": "hidden", "shuffle_buffer": 8}
    build_cache(small_settings(out, **asked))
    manifest = describe_store(out).manifest
    assert manifest.corpus.shuffle_buffer == 8 and manifest.rows == 40 <= manifest.corpus.rows < 60
    assert build_cache(small_settings(out, **asked)).computed_rows == 0
    with pytest.raises(StoreError, match=r"corpus: the store has .* as far as --shuffle-buffer 8 \(SHA-256"):
        build_cache(small_settings(out, targets="hidden"))


def test_fewer_rows_than_asked_for_are_said_where_not_all_was_read(
    small_settings: Settings, tiny_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("\n".join(tiny_corpus.read_text().splitlines()[:3]) + "\n")
    corpus, notes = (f"{tiny_corpus}@1", f"{tmp_path / 'short.txt'}@9"), list[str]()

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    settings = small_settings(tmp_path / "out.zarr", corpus=corpus, targets="hidden", shuffle_buffer=10)
    report = build_cache(settings, Notes())
    assert report.rows < 40
    assert f"what was read of the corpus makes {report.rows} rows, fewer than --max-rows 40: all are kept" in notes
    with pytest.raises(SettingsError, match="--shuffle-buffer 10 reads the beginning of a corpus, and of 2"):
        build_cache(replace(settings, corpus=(str(tiny_corpus), str(tmp_path / "short.txt")), teacher="no/teacher"))
