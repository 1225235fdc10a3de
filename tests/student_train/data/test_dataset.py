"""Rows of a cache as a dataset: the tensors of `read_rows`, through real workers and a real Hugging Face Trainer."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from student_train import BlockSampler, CacheDataset
from student_train.data.batches import training_batches
from student_train.data.source import split_source
from teacher_cache import BuildSettings, TargetRequest, build_cache, open_caches
from teacher_cache.errors import SettingsError, StoreError, TargetsError
from teacher_cache.read.pool import CacheSource
from teacher_cache.storage.base import open_storage

if TYPE_CHECKING:
    from tests.conftest import S3Server

EVERYTHING = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)
PLAIN = TargetRequest(hidden_layers=(4,))


def expected(source: CacheSource, row: int, masked_view: int = 0) -> dict[str, torch.Tensor]:
    """What a row of `EVERYTHING` should be, one call of `read_rows` a row."""
    batch = source.read_rows(row, row + 1, EVERYTHING, masked_view=masked_view)
    plain, masked = batch["plain"], batch["masked"]
    vectors, places, logits = plain.attention[3], masked.places, masked.logits
    found = {
        "row_id": plain.row_id_B,
        "attention_mask": (torch.arange(24) < plain.length_B[0]).long()[None],
        "input_ids": plain.input_ids_BT,
        "hidden_2": plain.hidden[2],
        "hidden_4": plain.hidden[4],
        "query_3": vectors.query_BTD,
        "key_3": vectors.key_BTD,
        "value_3": vectors.value_BTD,
        "masked_input_ids": masked.input_ids_BT,
        "masked_positions": places.positions_BM,
        "masked_original_ids": places.label_ids_BM,
        "masked_real": torch.arange(places.positions_BM.shape[1])[None] < places.count_B[0],
        "masked_top_ids": logits.ids_BMK.long(),
        "masked_top_log_probs": logits.log_probs_BMK,
        "masked_tail_log_prob": logits.log_tail_BM,
    }
    return {name: values[0] for name, values in found.items()}


def assert_same(row: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert row.keys() == other.keys()
    for name, values in row.items():
        assert values.dtype == other[name].dtype and torch.equal(values, other[name]), name


@pytest.fixture(scope="module")
def pool(tiny_parts: tuple[str, str]) -> CacheSource:
    """101 rows in blocks of 8, then 33 in blocks of 5."""
    return open_caches(tiny_parts)


@pytest.fixture
def loaded(pool: CacheSource, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks of the pool as they are loaded."""
    numbers: list[int] = []
    load = pool.load_block

    def noted(block: int, *rest: Any, **options: Any) -> Any:
        numbers.append(block)
        return load(block, *rest, **options)

    monkeypatch.setattr(pool, "load_block", noted)
    return numbers


def test_every_row_is_what_read_rows_gives(tiny_parts: tuple[str, str], pool: CacheSource) -> None:
    dataset = CacheDataset(tiny_parts, EVERYTHING, rows="all", masked_view=1)
    assert len(dataset) == 134
    for row in (0, 7, 8, 100, 101, 133):
        assert_same(dataset[row], expected(pool, row, masked_view=1))
    scattered = [120, 3, 101, 4, 120, 99, 5]
    for index, found in zip(scattered, dataset.__getitems__(scattered), strict=True):
        assert_same(found, expected(pool, index, masked_view=1))
    dataset.masked_view = 0
    assert_same(dataset[-1], expected(pool, 133))
    for beyond in (134, -135):
        with pytest.raises(IndexError, match="134"):
            dataset[beyond]


def test_the_rows_are_those_that_kdtrain_trains_on_and_holds_out(pool: CacheSource) -> None:
    training, held_out = split_source(pool, 0.1)
    for rows, ranges in (("train", training), ("valid", held_out)):
        dataset = CacheDataset(pool, PLAIN, rows=rows, valid_share=0.1)  # type: ignore[arg-type]
        numbers = [row for run in ranges for row in run]
        assert len(dataset) == len(numbers)
        ids = [int(dataset[index]["row_id"]) for index in range(len(dataset))]
        assert ids == [int(pool.read_rows(row, row + 1, PLAIN)["plain"].row_id_B) for row in numbers]
        assert [dataset.index_of(row) for row in numbers] == list(range(len(numbers)))
    with pytest.raises(ValueError, match="none of this dataset"):
        CacheDataset(pool, PLAIN, rows="valid").index_of(0)


def test_keys_and_shapes_of_one_view_draws_and_matrices(
    make_tiny_store: Callable[..., Path], tmp_path: Path, tiny_store: Path
) -> None:
    assert list(CacheDataset(tiny_store, PLAIN)[0]) == ["row_id", "attention_mask", "input_ids", "hidden_4"]
    only_logits = CacheDataset(tiny_store, TargetRequest(logits=True))[0]
    assert "input_ids" not in only_logits and only_logits["masked_input_ids"].shape == (24,)
    assert only_logits["masked_top_ids"].shape == (4, 16)

    store = make_tiny_store(tmp_path / "other.zarr", max_rows=24, logits="sample", k=20, relations="matrix")
    dataset = CacheDataset(store, TargetRequest(attention_layers=(3,), logits=True), rows="all")
    batch = default_collate(dataset.__getitems__(list(range(24))))
    assert batch["query_relations_3"].shape[0] == 24 and batch["query_relations_3"].shape[2:] == (24, 24)
    # rows have different numbers of distinct draws, all of them as many columns
    assert batch["masked_drawn_ids"].shape == batch["masked_draw_counts"].shape == (24, 4, 20)
    assert (batch["masked_draw_counts"].sum(-1) == 20 * batch["masked_real"]).all()


@pytest.mark.parametrize("form", ["sample", "topk"])
def test_rows_of_a_causal_teacher(causal_teacher: Path, causal_corpus: Path, tmp_path: Path, form: str) -> None:
    """Its places are those of the plain view; a student reads documents for themselves where they begin anew."""
    out = str(tmp_path / "cache.zarr")
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=out, seq_len=16, max_rows=20, block_rows=8,
            logits=form, k=9, segments="isolated" if form == "sample" else "joined",  # type: ignore[arg-type]
        )
    )  # fmt: skip
    dataset = CacheDataset(out, TargetRequest(logits=True), rows="all")
    batch = default_collate([dataset[row] for row in range(20)])
    want = open_caches(out).read_rows(0, 20, TargetRequest(logits=True))["plain"]
    assert want.places is not None
    inputs = {"row_id", "attention_mask", "input_ids", "next_positions", "next_ids", "next_real"}
    assert torch.equal(batch["next_positions"], want.places.positions_BM) and batch["next_ids"].shape == (20, 15)
    assert torch.equal(batch["next_real"], want.places.real_BM())
    following = batch["input_ids"].gather(1, batch["next_positions"] + 1)
    assert torch.equal(following[batch["next_real"]], batch["next_ids"][batch["next_real"]])
    if form == "sample":
        assert batch.keys() == inputs | {"segment_starts", "next_drawn_ids", "next_draw_counts"}
        assert torch.equal(batch["segment_starts"], want.starts_BT)
        assert (batch["next_draw_counts"].sum(-1) == 9 * batch["next_real"]).all()
    else:
        assert batch.keys() == inputs | {"next_top_ids", "next_top_log_probs", "next_tail_log_prob"}
        assert torch.equal(batch["next_top_log_probs"], want.logits.log_probs_BMK)


def test_hidden_states_of_the_masked_view_are_named_after_it(
    make_tiny_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_tiny_store(tmp_path / "masked.zarr", max_rows=16, hs_view="masked", targets="hidden")
    row = CacheDataset(store, PLAIN, rows="all")[3]
    assert "masked_hidden_4" in row and "masked_input_ids" in row and "hidden_4" not in row and "input_ids" not in row


def test_rows_asked_for_together_read_each_block_once_and_blocks_are_kept(pool: CacheSource, loaded: list[int]) -> None:
    dataset = CacheDataset(pool, PLAIN, rows="all", blocks_kept=2)
    dataset.__getitems__([0, 17, 1, 16, 2, 18])
    assert loaded == [0, 2]
    dataset[3], dataset[19]
    assert loaded == [0, 2]
    dataset[133]
    dataset[3]  # the one that had not been met for longest is gone
    assert loaded == [0, 2, 19, 0]


def test_the_sampler_gives_the_order_of_kdtrain_with_each_block_read_once(pool: CacheSource, loaded: list[int]) -> None:
    dataset = CacheDataset(pool, PLAIN, blocks_kept=1)
    sampler = BlockSampler(dataset, seed=3)
    loader = DataLoader(dataset, batch_size=7, sampler=sampler)
    for epoch in range(2):
        loaded.clear()
        ids = [row for batch in loader for row in batch["row_id"].tolist()]
        assert sorted(loaded) == list(range(20))
        with training_batches(pool, PLAIN, batch_size=1, seed=3, position=epoch * len(dataset)) as batches:
            assert ids == [next(batches).row_ids[0] for _ in range(len(dataset))]
    sampler.set_epoch(0)
    again = list(sampler)
    assert sorted(again) == list(range(len(dataset))) and len(sampler) == len(dataset)
    assert again == list(BlockSampler(dataset, seed=3)) != list(sampler)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_have_blocks_of_their_own(pool: CacheSource, workers: int) -> None:
    dataset = CacheDataset(pool, PLAIN)
    order = list(BlockSampler(dataset, seed=1, batch_size=4, workers=workers))
    assert sorted(order) == list(range(len(dataset)))
    rows = [row for run in dataset.row_ranges for row in run]
    batches = [order[first : first + 4] for first in range(0, len(order), 4)]
    read_by: dict[int, set[int]] = {}
    # up to where the first of the streams ends, whose last batch is short
    for number, batch in enumerate(batches[: len(batches) * 3 // 4]):
        for index in batch:
            block = int(dataset.block_bounds.searchsorted(rows[index], side="right")) - 1
            read_by.setdefault(block, set()).add(number % workers)
    assert all(len(readers) == 1 for readers in read_by.values())


def test_forked_workers_open_the_store_for_themselves(tiny_parts: tuple[str, str], pool: CacheSource) -> None:
    dataset = CacheDataset(tiny_parts, EVERYTHING, rows="all")
    dataset[0]  # opened and met in this process already
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    by_id = {(int(expected(pool, row)["row_id"]), row >= 101): row for row in range(134)}
    assert sum(len(batch["row_id"]) for batch in batches) == len(by_id) == 134
    for batch in batches:
        for place, row_id in enumerate(batch["row_id"].tolist()):
            one = {name: values[place] for name, values in batch.items()}
            # rows of both stores are numbered from 0
            rows = [row for second in (False, True) if (row := by_id.get((row_id, second))) is not None]
            assert any(torch.equal(one["hidden_4"], expected(pool, row)["hidden_4"]) for row in rows)


def test_object_storage_is_read_by_spawned_workers_and_refused_to_forked_ones(tiny_store: Path, s3: S3Server) -> None:
    address = f"{s3.bucket('dataset')}/cache.zarr"
    local, remote = open_storage(tiny_store), open_storage(address)
    for key in local.list():
        remote.write(key, local.read(key))
    dataset = CacheDataset(address, PLAIN)
    in_order = [int(dataset[index]["row_id"]) for index in range(20)]
    with pytest.raises(StoreError, match='multiprocessing_context="spawn"'):
        next(iter(DataLoader(dataset, num_workers=1, multiprocessing_context="fork")))
    loader = DataLoader(dataset, batch_size=10, num_workers=2, multiprocessing_context="spawn")
    batches = iter(loader)
    assert [row for batch in (next(batches), next(batches)) for row in batch["row_id"].tolist()] == in_order
    del batches


def test_what_is_pickled_is_no_open_store(tiny_store: Path) -> None:
    dataset = CacheDataset(tiny_store, EVERYTHING)
    dataset[0]
    written = pickle.dumps(dataset)
    assert len(written) < 4_000
    assert_same(pickle.loads(written)[5], dataset[5])


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"request": TargetRequest(hidden_layers=(9,))}, TargetsError, "lacks hidden 9"),
        ({"rows": "test"}, SettingsError, "rows 'test'"),
        ({"masked_view": 2}, SettingsError, "masked_view 2: .* has 2 masked inputs"),
        ({"valid_share": 0.999}, SettingsError, "no row is left"),
        ({"cache": "nothing.zarr"}, StoreError, "no store at 'nothing.zarr'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    tiny_store: Path, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        CacheDataset(**{"cache": tiny_store, "request": PLAIN, **options})


# ---- other people's loops -------------------------------------------------------------------------------------------


def student_and_map(tiny_store: Path) -> tuple[torch.nn.Module, torch.nn.Linear]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(open_caches(tiny_store).teacher_folder())
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    return AutoModel.from_config(config), torch.nn.Linear(config.hidden_size, config.hidden_size)


def hidden_error(student: Any, linear: torch.nn.Linear, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    states = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    errors_BT = (linear(states) - inputs["hidden_4"]).square().mean(-1)
    return (errors_BT * inputs["attention_mask"]).sum() / inputs["attention_mask"].sum()


def test_the_hugging_face_trainer_trains_on_it(tiny_store: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.modeling_outputs import ModelOutput

    class Distilled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.linear = student_and_map(tiny_store)

    class DistillationTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = hidden_error(model.student, model.linear, inputs)
            return (loss, ModelOutput(loss=loss)) if return_outputs else loss

        def _get_train_sampler(self, train_dataset: Any = None) -> BlockSampler:
            return BlockSampler(self.train_dataset, seed=self.args.seed)

    trainer = DistillationTrainer(
        model=Distilled(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=1,
            remove_unused_columns=False,
            label_names=["hidden_4"],
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=CacheDataset(tiny_store, PLAIN),
        eval_dataset=CacheDataset(tiny_store, PLAIN, rows="valid"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < before


def test_a_loop_as_lightning_has_it(tiny_store: Path) -> None:
    """`training_step(batch, index)` on what a loader gives, moved by a recursion over dicts."""
    student, linear = student_and_map(tiny_store)
    dataset = CacheDataset(tiny_store, PLAIN)
    loader = DataLoader(dataset, batch_size=16, sampler=BlockSampler(dataset))
    optimizer = torch.optim.Adam([*student.parameters(), *linear.parameters()], lr=1e-2)
    losses = []
    for _epoch in range(3):
        for batch in loader:
            loss = hidden_error(student, linear, {name: values.to("cpu") for name, values in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    import multiprocessing

    assert multiprocessing.active_children() == []
