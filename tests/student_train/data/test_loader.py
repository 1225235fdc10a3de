"""Real batches from a real store: contents, places, ranks, threads and failures."""

import gc
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from student_train.data.loader import READ_AHEAD, CacheLoader
from student_train.data.order import RowOrder
from teacher_cache.contract.batch import TargetRequest, concatenate
from teacher_cache.errors import StoreError
from teacher_cache.read.pool import open_caches
from teacher_cache.read.reader import CacheReader

REQUEST = TargetRequest(hidden_layers=(2,), attention_layers=(3,), logits=True)


def rows_of(order, segments):
    return [
        int(order.bounds[segment.block]) + row for segment in segments for row in range(segment.start, segment.stop)
    ]


@pytest.fixture(scope="module")
def reader(tiny_store):
    return CacheReader.open(tiny_store)


@pytest.fixture
def load(reader):
    loaders = []

    def make(**options):
        settings = {"rows": (range(reader.rows - 5),), "batch_size": 12, "seed": 3} | options
        loaders.append(CacheLoader(settings.pop("reader", reader), REQUEST, **settings))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def pool(tiny_parts):
    return open_caches(tiny_parts)


POOLED = (range(96), range(101, 130))  # both stores without their last rows


def take(loader, count):
    return [next(loader) for _ in range(count)]


def tensors(batch):
    for _, targets in sorted(batch.views.items()):
        yield targets.input_ids_BT
        yield targets.length_B
        yield from targets.hidden.values()
        for vectors in targets.attention.values():
            yield from (vectors.query_BTD, vectors.key_BTD, vectors.value_BTD)
        if targets.logits is not None:
            yield from (targets.logits.ids_BMK, targets.logits.log_probs_BMK, targets.logits.log_tail_BM)


def assert_same(ours, theirs):
    for mine, other in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(mine, other)


def test_batches_are_what_the_reader_reads_at_those_rows(reader, load):
    """Over the border of an epoch, where the second masked view takes over."""
    size = reader.rows - 5
    order = RowOrder(rows=(range(size),), bounds=reader.block_bounds, seed=3)
    for number, batch in enumerate(take(load(), 2 * size // 12)):
        assert batch.position == 12 * number
        expected = []
        for segment in order.segments(batch.position, batch.position + 12):
            first = int(order.bounds[segment.block])
            start, stop = first + segment.start, first + segment.stop
            expected.append(reader.read_rows(start, stop, REQUEST, masked_view=segment.epoch % 2))
        for view in ("plain", "masked"):
            ids = torch.cat([part[view].input_ids_BT for part in expected])
            assert torch.equal(batch.views[view].input_ids_BT, ids)
        logits = torch.cat([part["masked"].logits.log_probs_BMK for part in expected])
        assert torch.equal(batch.views["masked"].logits.log_probs_BMK, logits)
        assert list(batch.row_ids) == batch.views["plain"].row_id_B.tolist()
        assert batch.counts == {
            "positions": int(batch.views["plain"].real_BT().sum()),
            "places": int(batch.views["masked"].places.real_BM().sum()),
            "rows": 12,
        }


def test_the_two_masked_views_differ(reader):
    first, second = (reader.read_rows(0, 4, REQUEST, masked_view=view)["masked"] for view in (0, 1))
    assert not torch.equal(first.places.positions_BM, second.places.positions_BM)


def test_training_goes_on_from_any_position_exactly(load):
    whole = take(load(), 9)
    for ours, theirs in zip(take(load(position=60), 4), whole[5:], strict=True):
        assert ours.position == theirs.position
        assert_same(ours, theirs)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_same_global_batches(load, world_size):
    whole = take(load(), 5)
    shares = [take(load(rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert tuple(row for part in parts for row in part.row_ids) == batch.row_ids
        assert sum(part.counts["positions"] for part in parts) == batch.counts["positions"]
        ids = torch.cat([part.views["plain"].input_ids_BT for part in parts])
        assert torch.equal(ids, batch.views["plain"].input_ids_BT)


def test_held_out_rows_come_once_in_order_with_a_short_last_batch(reader, load):
    held_out = range(reader.rows - 5, reader.rows)
    batches = list(load(rows=(held_out,), batch_size=2, seed=None, stop=5))
    assert [len(batch.row_ids) for batch in batches] == [2, 2, 1]
    ids = [row for batch in batches for row in batch.row_ids]
    assert ids == reader.read_rows(held_out.start, held_out.stop, REQUEST)["plain"].row_id_B.tolist()


def test_several_stores_are_shuffled_together(pool, load):
    """Every row of both once an epoch, in batches that mix them, each row's targets those of its own store."""
    batches = take(load(reader=pool, rows=POOLED), 2 * 125 // 12)
    order = RowOrder(rows=POOLED, bounds=pool.block_bounds, seed=3)
    for number, batch in enumerate(batches):
        rows = rows_of(order, order.segments(12 * number, 12 * number + 12))
        epochs = [(12 * number + place) // 125 for place in range(12)]
        expected = [
            pool.read_rows(row, row + 1, REQUEST, masked_view=epoch % 2)
            for row, epoch in zip(rows, epochs, strict=True)
        ]
        views = {view: concatenate([one[view] for one in expected]) for view in expected[0]}
        assert_same(batch, SimpleNamespace(views=views))
    first_epoch = rows_of(order, order.segments(0, 125))
    assert sorted(first_epoch) == [*range(96), *range(101, 130)]
    assert any({row < 101 for row in rows} == {True, False} for rows in zip(*[iter(first_epoch)] * 12, strict=False))


@pytest.mark.parametrize("position", [24, 96, 120])
def test_several_stores_go_on_from_any_position_on_any_number_of_ranks(pool, load, position):
    whole = take(load(reader=pool, rows=POOLED), 12)[position // 12 :]
    shares = [take(load(reader=pool, rows=POOLED, rank=rank, world_size=2, position=position), 2) for rank in range(2)]
    for batch, first, second in zip(whole, *shares, strict=False):
        assert batch.position == first.position == second.position
        assert first.row_ids + second.row_ids == batch.row_ids
        for ours, *halves in zip(tensors(batch), tensors(first), tensors(second), strict=True):
            assert torch.equal(ours, torch.cat(halves))


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "kdtrain-loader"]


def test_the_threads_end_when_the_loader_is_closed(load):
    before = loader_threads()
    loader = load()
    next(loader)
    assert len(loader_threads()) > len(before)
    loader.close()
    assert loader_threads() == before
    assert list(loader) == []


def test_the_threads_end_when_the_loader_is_forgotten(reader):
    loader = CacheLoader(reader, REQUEST, rows=(range(20),), batch_size=4, seed=0)
    next(loader)
    threads = loader_threads()
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join()
    assert loader_threads() == []


def shared_memory(tests):
    """What this process has of it, without files of these tests that happen to be kept in memory."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return [line for line in lines if "/dev/shm" in line and str(tests) not in line]


def test_no_shared_memory_is_used_and_reading_ahead_is_bounded(reader, load, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    before = shared_memory(folder)
    counting = CountingReader(reader)
    loader = load(reader=counting, rows=(range(reader.rows),))
    while counting.blocks < READ_AHEAD + 1:
        time.sleep(0.01)
    time.sleep(0.3)  # for one that should not come: a slow machine can only miss it
    assert counting.blocks == READ_AHEAD + 1  # two waiting, one in hand
    next(loader)
    assert len(shared_memory(folder)) == len(before)


class CountingReader:
    """The reader it is given, counting blocks as they are loaded in the plain view."""

    def __init__(self, reader):
        self._reader = reader
        self._lock = threading.Lock()
        self.blocks = 0

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def load_block(self, block, request, view, masked_view=0, threads=None):
        with self._lock:
            self.blocks += view == "plain"
        return self._reader.load_block(block, request, view, masked_view, threads)


class FailingReader(CountingReader):
    def __init__(self, reader, error):
        super().__init__(reader)
        self.error = error

    def load_block(self, block, request, view, masked_view=0, threads=None):
        if block == 2:
            raise self.error
        return super().load_block(block, request, view, masked_view, threads)


@pytest.mark.parametrize("error", [StoreError("a shard is gone"), OSError("disk says no")])
def test_an_error_in_the_thread_reaches_the_consumer_with_the_block_named(reader, load, error):
    loader = load(reader=FailingReader(reader, error), rows=(range(40),), batch_size=8, seed=None)
    take(loader, 2)
    with pytest.raises(StoreError, match=rf"block 2 of .*{error}"):
        next(loader)
    assert loader_threads() == []


def test_a_defect_in_the_thread_keeps_its_kind_and_its_traceback(reader, load):
    loader = load(reader=FailingReader(reader, ZeroDivisionError("ours")), rows=(range(40),), batch_size=24, seed=None)
    with pytest.raises(ZeroDivisionError, match="ours") as caught:
        next(loader)
    assert "block 2" in caught.value.__notes__[0]
