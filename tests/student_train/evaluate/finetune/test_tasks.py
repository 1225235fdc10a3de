"""Where tasks lie on the hub."""

from __future__ import annotations

from student_train.evaluate.finetune.tasks import TASKS, hub_sources


def test_sources_on_the_hub() -> None:
    assert hub_sources(TASKS["sst2"], "en", None) == ("nyu-mll/glue:sst2:train", "nyu-mll/glue:sst2:validation", {})
    _, dev, tests = hub_sources(TASKS["mnli"], "en", None)
    assert dev == tests["matched"] == "nyu-mll/glue:mnli:validation_matched"
    assert list(tests) == ["matched", "mismatched"]


def test_languages() -> None:
    """XNLI is trained on one language and tested on all 15, or those chosen; entities are found in the one language."""
    train, dev, tests = hub_sources(TASKS["xnli"], "en", None)
    assert (train, dev) == ("facebook/xnli:en:train", "facebook/xnli:en:validation")
    assert len(tests) == 15 and tests["sw"] == "facebook/xnli:sw:test"
    assert list(hub_sources(TASKS["xnli"], "de", ("fr", "en"))[2]) == ["fr", "en"]
    assert hub_sources(TASKS["ner"], "de", None)[2] == {"de": "unimelb-nlp/wikiann:de:test"}
