"""Trainings of students with fewer ids than their teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from student_train.evaluate.fidelity.fidelity import measure_fidelity
from student_train.methods.model import DistillationModel
from student_train.settings import TrainSettings
from student_train.students.vocabulary.kept_ids import KEPT_IDS, read_kept_ids
from student_train.train.describe import describe_run
from student_train.train.prepare import TrainingRun, prepare_run
from student_train.train.train import train
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import DistillationError, SettingsError, StudentError, TrainingError
from tests.records import without_times

EVERYTHING = "od+mlm+hs+mha"


@pytest.fixture(scope="module")
def drawn(make_tiny_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of draws."""
    return make_tiny_store(
        tmp_path_factory.mktemp("drawn") / "cache.zarr", targets="logits", logits="sample", k=40, max_rows=48
    )


def asked(cache: Path, out: Path | str = "student", **values: Any) -> TrainSettings:
    given = {"method": "od", "vocabulary": "coverage:0.8", "steps": 4, "batch_size": 8, "device": "cpu", **values}
    return TrainSettings(cache=(str(cache),), out=str(out), **given)


def live_loss(run: TrainingRun, form: str) -> tuple[float, int]:
    """`od` of eight rows by the teacher itself: its distribution over kept ids, in float64; and the places.

    Of most probable ids, those of the 16 that are kept, and all else in one bucket. Of draws, their shares among them.
    """
    assert run.vocabulary is not None
    kept = run.vocabulary.kept
    teacher = AutoModelForMaskedLM.from_pretrained(run.reader.teacher_folder()).double().eval()
    student = run.built.model.double().eval()
    total, places = 0.0, 0
    for row in range(8):
        batch = run.reader.read_rows(row, row + 1, run.objective.request)["masked"]
        own = run.source.read_rows(row, row + 1, run.objective.request)["masked"]
        mask = batch.real_BT().long()
        with torch.no_grad():
            p_TV = teacher(batch.input_ids_BT.long(), attention_mask=mask).logits[0].softmax(-1)
            log_q_TK = student(own.input_ids_BT.long(), attention_mask=mask).logits[0].log_softmax(-1)
        assert batch.places is not None and batch.logits is not None
        for place in range(int(batch.places.count_B)):
            position = int(batch.places.positions_BM[0, place])
            places += 1
            if form == "topk":
                ids = [each for each in p_TV[position].topk(16).indices.tolist() if kept.own(each) is not None]
                p = p_TV[position, ids]
            else:
                known, counts = batch.logits.ids_BMK[0, place].tolist(), batch.logits.counts_BMK[0, place].tolist()
                drawn = {each: count for each, count in zip(known, counts, strict=True) if count}
                ids = [each for each in drawn if kept.own(each) is not None]
                p = torch.tensor([drawn[each] for each in ids]).double()
                p = p / p.sum()
            if not ids:
                continue
            q = log_q_TK[position, [kept.own(each) for each in ids]].exp()
            if form == "topk":
                p, q = (torch.cat([each, 1 - each.sum(0, keepdim=True)]) for each in (p, q))
            total += float((p * (p / q).log()).sum())
    return total, places


@pytest.mark.parametrize("form", ["topk", "sample"])
def test_cached_is_live(form: str, tiny_store: Path, drawn: Path) -> None:
    run = prepare_run(asked(tiny_store if form == "topk" else drawn))
    with torch.no_grad():
        loss = run.model(run.source.read_rows(0, 8, run.objective.request))["od"]
    total, places = live_loss(run, form)
    assert run.vocabulary is not None and run.vocabulary.lost["distribution"] > 0.05
    assert int(loss.count) == places
    assert float(loss.total) == pytest.approx(total, rel=2e-3)


def test_what_is_lost_is_counted_and_said(tiny_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    run = prepare_run(asked(tiny_store, method=EVERYTHING))
    assert run.vocabulary is not None
    kept = run.vocabulary.kept
    tokens = lost = 0
    for rows in run.training_rows:
        batch = run.reader.read_rows(rows.start, rows.stop, run.objective.request)["plain"]
        ids = batch.input_ids_BT[batch.real_BT()].tolist()
        tokens, lost = tokens + len(ids), lost + sum(kept.own(each) is None for each in ids)
    assert run.vocabulary.lost["tokens"] == pytest.approx(lost / tokens) and 0 < lost / tokens <= 0.2
    (line,) = [line for line in describe_run(run) if line.startswith("ids ")]
    assert f"{len(kept)} of 200 ids; {lost / tokens:.4%} of the tokens" in line and "'[UNK]'" in line
    train(asked(tiny_store, out, method=EVERYTHING))
    record = json.loads((out / "provenance.json").read_text())["vocabulary"]
    assert (record["choice"], record["kept"], record["of"]) == ("coverage:0.8", len(kept), 200)
    assert record["sha256"] == kept.sha256 and record["lost"] == run.vocabulary.lost
    found = read_kept_ids(out)
    assert found is not None and found.sha256 == kept.sha256
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == len(kept)
    assert (model.config.pad_token_id, tokenizer.unk_token_id) == (0, kept.own_stand_in)
    teacher_tokenizer = AutoTokenizer.from_pretrained(run.reader.teacher_folder())
    words = teacher_tokenizer.convert_ids_to_tokens(kept.ids_K[5:15].tolist())
    assert kept.ids_K[tokenizer(" ".join(words)).input_ids].tolist() == teacher_tokenizer(" ".join(words)).input_ids
    for exact in (False, True):
        report = measure_fidelity(out, [str(tiny_store)], exact=exact)
        assert report.relations and report.hidden and report.distribution is not None
        assert any(f"the student has {len(kept)} of its teacher's 200 ids" in note for note in report.notes)


def test_everything_kept_is_the_training_without(tiny_store: Path, tmp_path: Path) -> None:
    """Ids of the teacher keep their order: with all of them, nothing is another number."""
    words = AutoTokenizer.from_pretrained(prepare_run(asked(tiny_store, steps=0)).reader.teacher_folder())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words.convert_ids_to_tokens(range(5, 200))) + "\n")
    losses = []
    for vocabulary in ("all", f"trim:{text}"):
        out = tmp_path / vocabulary[:4]
        train(asked(tiny_store, out, method=EVERYTHING, vocabulary=vocabulary))
        losses.append(without_times(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()))
    assert losses[0] == losses[1]
    assert not (tmp_path / "all" / KEPT_IDS).exists()
    assert read_kept_ids(tmp_path / "trim") is not None


def test_resumed(tiny_store: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(asked(tiny_store, whole, save_every=2))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "step-00000004")
    with pytest.raises(TrainingError, match="--vocabulary was 'coverage:0.8' and is 'coverage:0.7'"):
        train(asked(tiny_store, halves, save_every=2, vocabulary="coverage:0.7", resume="auto"))
    train(asked(tiny_store, halves, save_every=2, resume="auto"))
    for name in ("model.safetensors", KEPT_IDS, "tokenizer.json"):
        assert (halves / name).read_bytes() == (whole / name).read_bytes()


def test_another_student_in_the_same_place_has_all_ids(tiny_store: Path, tmp_path: Path) -> None:
    from student_train.train.best import write_student

    out = tmp_path / "student"
    write_student(prepare_run(asked(tiny_store, steps=0)), None, out, result={})
    assert (out / KEPT_IDS).exists()
    write_student(prepare_run(asked(tiny_store, steps=0, vocabulary="all")), None, out, result={})
    assert not (out / KEPT_IDS).exists()
    assert measure_fidelity(out, [str(tiny_store)]).notes == ()


def test_ids_of_another_student(tiny_store: Path, tmp_path: Path) -> None:
    first = prepare_run(asked(tiny_store, steps=0))
    assert first.vocabulary is not None
    first.vocabulary.kept.write(tmp_path)
    second = prepare_run(asked(tiny_store, steps=0, vocabulary=f"trim:{tmp_path / KEPT_IDS}", student="2x16"))
    assert second.vocabulary is not None and second.vocabulary.kept.sha256 == first.vocabulary.kept.sha256
    assert second.built.model.config.vocab_size == len(first.vocabulary.kept)
    assert isinstance(second.model, DistillationModel)


def test_a_decoder(causal_teacher: Path, causal_corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "cache.zarr"
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=str(store), seq_len=24, device="cpu"
        )
    )
    out = tmp_path / "student"
    result = train(asked(store, out, method="od+lm", steps=3, vocabulary="coverage:0.9"))
    assert result.steps == 3
    kept, model = read_kept_ids(out), AutoModelForCausalLM.from_pretrained(out)
    assert kept is not None and model.config.vocab_size == len(kept) < 105
    assert model.generation_config.eos_token_id == kept.own(0)
    assert measure_fidelity(out, [str(store)]).distribution is not None


def test_texts_of_several_languages(tiny_store: Path, tmp_path: Path) -> None:
    """Their ids together, and no others."""
    words = AutoTokenizer.from_pretrained(prepare_run(asked(tiny_store, steps=0)).reader.teacher_folder())
    texts = [" ".join(words.convert_ids_to_tokens(list(range(first, 200, 2)))) for first in (10, 11)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    found = []
    for files in ("0", "1", "01"):
        run = prepare_run(asked(tiny_store, vocabulary="trim:" + ",".join(f"{tmp_path / name}.txt" for name in files)))
        assert run.vocabulary is not None and run.vocabulary.differences is not None
        found.append(set(run.vocabulary.kept.ids_K.tolist()))
    assert found[2] == found[0] | found[1] and found[2] > found[0] != found[1]


@pytest.mark.parametrize(
    "text, error, told",
    [
        (None, SettingsError, "cannot be read .*No such file"),
        (b"\xff\xfe\xff", SettingsError, "cannot be read .*utf-8"),
        (b"bobo bobo\n", SettingsError, "the text uses .* of the 200 ids"),
        (b'{"version": 1}', StudentError, "cannot be read as a record of kept ids"),
    ],
)
def test_files_that_are_no_text_of_this_cache(
    text: bytes | None, error: type[DistillationError], told: str, tiny_store: Path, tmp_path: Path
) -> None:
    file = tmp_path / ("ids.json" if text and text.startswith(b"{") else "text.txt")
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(error, match=told):
        prepare_run(asked(tiny_store, vocabulary=f"trim:{file}"))


def test_ids_of_another_teacher_are_refused(tiny_store: Path, tmp_path: Path) -> None:
    first = prepare_run(asked(tiny_store, steps=0))
    assert first.vocabulary is not None
    fields = first.vocabulary.kept.to_json() | {"teacher_vocab_size": 300}
    (tmp_path / KEPT_IDS).write_text(json.dumps(fields))
    with pytest.raises(SettingsError, match="lists some of 300 ids, and the teacher of this cache has 200"):
        prepare_run(asked(tiny_store, vocabulary=f"trim:{tmp_path / KEPT_IDS}"))


def test_a_text_of_other_words_than_the_rows_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    reader = prepare_run(asked(tiny_store, steps=0)).reader
    tokenizer = AutoTokenizer.from_pretrained(reader.teacher_folder())
    from student_train.students.vocabulary.source import count_ids

    rarest = count_ids(reader, (range(reader.rows),))[5:].argsort()[:40] + 5
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tokenizer.convert_ids_to_tokens(rarest.tolist())))
    with pytest.raises(SettingsError, match="of the tokens of the rows to train on without an id"):
        prepare_run(asked(tiny_store, vocabulary=f"trim:{text}"))


def test_a_cache_whose_distribution_is_on_dropped_ids_alone_is_refused(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every id that the cache holds at a place is dropped; rows are read all the same."""
    settings = asked(tiny_store, vocabulary="coverage:1")
    monkeypatch.setattr(
        "student_train.train.vocabulary.IdMapping.dropped", lambda self, ids: torch.ones_like(ids, dtype=torch.bool)
    )
    with pytest.raises(SettingsError, match="leaves nothing of the teacher's distribution"):
        prepare_run(settings)
    prepare_run(asked(tiny_store, vocabulary="coverage:1", method="hs"))


def test_a_trimmed_student_is_no_start(tiny_store: Path, tmp_path: Path) -> None:
    from student_train.train.best import write_student

    write_student(prepare_run(asked(tiny_store, steps=0)), None, tmp_path / "student", result={})
    for flag in ("student", "init"):
        given: dict[str, Any] = {flag: str(tmp_path / "student"), "vocabulary": "all"}
        with pytest.raises(StudentError, match="of its teacher's 200 ids: .*--vocabulary trim:.*kept_ids.json"):
            prepare_run(asked(tiny_store, **given))
