"""Shares of several sources in the rows, against plain counts, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.corpus.corpus import Rows, pack_corpus
from teacher_cache.corpus.mixing import Mix, mixed_order
from teacher_cache.errors import CorpusError, SettingsError
from teacher_cache.random_bits import uniform_bits

SIZES = {"large": 4000, "medium": 1000, "small": 60}


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of so many lines of four tokens for each source; its rows can be told by their words."""
    folder = tmp_path_factory.mktemp("languages")
    for word, (name, lines) in zip(("babo", "bada", "bafe"), SIZES.items(), strict=True):
        (folder / f"{name}.txt").write_text(f"{word} {word} {word} {word}\n" * lines)
    return folder


def pack(languages: Path, tokenizer, suffixes=("", "", ""), names=tuple(SIZES), **settings) -> Rows:
    specs = [str(languages / f"{name}.txt") + suffix for name, suffix in zip(names, suffixes, strict=True)]
    defaults = {"seq_len": 6, "row_mode": "document", "seed": 1}
    return pack_corpus(specs, tokenizer, **(defaults | settings))


def words(rows: Rows) -> list[int]:
    """The first word of each row in its order."""
    return rows.read(0, len(rows)).input_ids_BT[:, 1].tolist()


def test_shares_are_sizes_to_a_power(languages: Path, tiny_tokenizer) -> None:
    rows = pack(languages, tiny_tokenizer(), mix_alpha=0.3, max_rows=300)
    wanted = np.array([4000, 1000, 60]) ** 0.3
    wanted = 300 * wanted / wanted.sum()
    counts = [count for _, count in rows.sources]
    assert sum(counts) == 300
    # draws without replacement: the small one, of which most is taken, falls behind its share
    assert counts == pytest.approx(wanted, abs=25)
    found = Counter(words(rows))
    assert sorted(found.values()) == sorted(counts)
    plain = Counter(words(pack(languages, tiny_tokenizer(), max_rows=300)))
    assert min(plain.values()) < 10 < min(found.values())


def test_weights_are_shares(languages: Path, tiny_tokenizer) -> None:
    rows = pack(languages, tiny_tokenizer(), ("@1", "@3", "@0.01"), max_rows=400)
    large, medium, small = (count for _, count in rows.sources)
    assert large == pytest.approx(100, abs=25) and medium == pytest.approx(300, abs=25) and small < 12
    assert [Path(spec).name for spec, _ in rows.sources] == ["large.txt", "medium.txt", "small.txt"]


def test_no_row_twice_and_what_a_source_lacks_falls_to_the_others(languages: Path, tiny_tokenizer) -> None:
    rows = pack(languages, tiny_tokenizer(), ("@1", "@1", "@100"), max_rows=1000)
    ids = rows.read(0, len(rows)).row_id_B
    assert len(set(ids.tolist())) == 1000
    assert dict(rows.sources)[str(languages / "small.txt")] == 60


def test_fewer_rows_are_the_first_ones_and_a_sources_rows_keep_their_order(languages: Path, tiny_tokenizer) -> None:
    whole = pack(languages, tiny_tokenizer(), mix_alpha=0.3).read(0, 5060).row_id_B.tolist()
    assert sorted(whole) == list(range(5060))
    assert pack(languages, tiny_tokenizer(), mix_alpha=0.3, max_rows=70).read(0, 70).row_id_B.tolist() == whole[:70]
    medium = [row for row in whole if 4000 <= row < 5000]
    assert medium == sorted(medium, key=lambda row: int(uniform_bits(1, row)))


def test_other_shares_are_another_corpus(languages: Path, tiny_tokenizer) -> None:
    records = [
        pack(languages, tiny_tokenizer(), **settings).record
        for settings in ({}, {"mix_alpha": 0.3}, {"mix_alpha": 0.5}, {"suffixes": ("@1", "@1", "@2")})
    ]
    assert len({record.fingerprint for record in records}) == 4
    assert len({(record.documents, record.tokens, record.rows) for record in records}) == 1


def test_packed_rows_belong_to_the_source_that_they_begin_in(languages: Path, tiny_tokenizer) -> None:
    rows = pack(languages, tiny_tokenizer(), ("@0.001", "@0.001", "@1"), row_mode="packed", seq_len=12, max_rows=20)
    assert dict(rows.sources)[str(languages / "small.txt")] >= 18
    frequent, _ = Counter(words(rows)).most_common(1)[0]
    assert frequent == tiny_tokenizer()("bafe", add_special_tokens=False)["input_ids"][0]


def test_order_follows_the_plain_keys() -> None:
    source_of_row, shares = np.array([0, 0, 0, 1]), np.array([0.25, 0.75])
    uniform = [int(uniform_bits(5, row)) / 2**64 for row in range(4)]
    keys = [-np.log(1 - u) / w for u, w in zip(uniform, [0.25 / 3] * 3 + [0.75], strict=True)]
    assert mixed_order(5, source_of_row, shares).tolist() == sorted(range(4), key=keys.__getitem__)


def test_kept_rows_are_counted_by_source() -> None:
    """Source 0 has two rows of little weight, source 1 three heavy ones, source 2 none; none is lost."""
    mix = Mix(specs=("a", "b", "c"), weights=(1e-9, 1.0, 1.0))
    source_of_row = np.array([0, 1, 1, 0, 1])
    order, kept = mix.order_rows(3, source_of_row, [20, 30, 0], 4)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert set(order[:3].tolist()) == {1, 2, 4}, "what weighs a billion times as much comes first"
    assert kept == [("a", 1), ("b", 3), ("c", 0)]
    again, everything = mix.order_rows(3, source_of_row, [20, 30, 0], None)
    assert again.tolist() == order.tolist()
    assert everything == [("a", 2), ("b", 3), ("c", 0)]


@pytest.mark.parametrize(
    ("corpus", "alpha", "message"),
    [
        (("a.txt@1", "b.txt"), None, r"'b\.txt' has no weight.*such as 'b\.txt@1'"),
        (("a.txt@1", "b.txt@2"), 0.3, "--mix-alpha 0.3 and weights"),
        (("a.txt@0", "b.txt@2"), None, "a share of 0: give a positive weight"),
        (("a.txt@nan", "b.txt@2"), None, "a share of nan"),
    ],
)
def test_unclear_shares_are_refused(corpus: tuple[str, ...], alpha: float | None, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Mix.of(corpus, alpha)


def test_a_file_of_that_name_has_no_weight(tmp_path: Path) -> None:
    (tmp_path / "a@2").write_text("text")
    assert Mix.of((str(tmp_path / "a@2"),), None) is None
    assert Mix.of(("user/name@main:config",), None) is None


def test_a_wrong_path_is_found_before_anything_is_read(languages: Path, tiny_tokenizer) -> None:
    with pytest.raises(CorpusError, match="no file matches"):
        pack(languages, tiny_tokenizer(), ("@1", "@2"), names=("large", "missing"))


def test_sources_are_read_up_to_their_shares(languages: Path, tiny_tokenizer) -> None:
    """With a shuffle buffer, so many documents of each as its share of all the rows is."""
    notes: list[str] = []
    settings = {"max_rows": 100, "shuffle_buffer": 60, "note": notes.append}
    rows = pack(languages, tiny_tokenizer(), ("@1", "@3"), ("large", "medium"), **settings)
    assert rows.record.documents == 40 + 120 and len(rows) == 100
    counts = [count for _, count in rows.sources]
    assert counts == pytest.approx([25, 75], abs=12)
    assert notes == ["read 160 documents, up to --shuffle-buffer: what may follow in the corpus is left out"]
    # what is too small for its share is named where the others do not make up for it
    rows = pack(languages, tiny_tokenizer(), ("@1", "@9"), ("large", "small"), **settings)
    assert rows.record.documents == 16 + 60 == len(rows)
    assert notes[-1].startswith(f"{languages / 'small.txt'} ended before its share of the rows, and what was read")
    notes.clear()
    rows = pack(languages, tiny_tokenizer(), ("@1", "@1"), ("large", "small"), **settings)
    assert rows.record.documents == 80 + 60 and len(rows) == 100
    assert notes == ["read 140 documents, up to --shuffle-buffer: what may follow in the corpus is left out"]
    with pytest.raises(SettingsError, match=r"of 2 one after another that may be '.*large.txt' alone: say how much"):
        pack(languages, tiny_tokenizer(), ("", ""), ("large", "medium"), **settings)
    with pytest.raises(SettingsError, match="--mix-alpha 0.3 needs the size of every corpus"):
        pack(languages, tiny_tokenizer(), mix_alpha=0.3, max_rows=100, shuffle_buffer=60)
