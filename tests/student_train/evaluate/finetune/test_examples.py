"""Examples of tasks from real files of every format, and what is refused with which file and line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from student_train.evaluate.finetune.examples import Examples, check_examples, read_source, to_examples
from student_train.evaluate.finetune.tasks import TASKS, Task
from teacher_cache.errors import TaskError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def examples_of(source: str, task: Task, language: str = "en") -> Examples:
    return to_examples(read_source(source, task), task, language)


def test_formats_agree(tmp_path: Path) -> None:
    """Quotes mean nothing in GLUE's tables, and a line separator inside a text is no end of a line."""
    texts, labels = ['he said "no', "a\u2028b , c"], [0, 1]
    rows = list(zip(texts, labels, strict=True))
    tsv = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    csv = 'idx,label,sentence\r\n7,negative,"he said ""no"\r\n8,positive,"a\u2028b , c"\r\n'
    lines = "\n".join(json.dumps({"label": label, "sentence": text}) for text, label in rows)
    found = [
        examples_of(write(tmp_path, name, text), TASKS["sst2"])
        for name, text in (("a.tsv", "\ufeff" + tsv), ("a.tsv.gz", tsv), ("a.csv", csv), ("a.jsonl", lines))
    ]
    assert found[0].inputs == (('he said "no',), ("a\u2028b , c",))
    assert found[0].labels == (0, 1)
    assert len({each.sha256() for each in found}) == 1


@pytest.mark.parametrize(
    "task, text, inputs, labels",
    [
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tx\ty\n", ("x", "y"), (1,)),
        ("cola", "gj04\t1\t\tx .\ngj04\t0\t*\ty .\n", ("x .",), (1, 0)),
        ("stsb", "index\tsentence1\tsentence2\tscore\n0\tx\ty\t3.800\n", ("x", "y"), (3.8,)),
        ("mnli", "sentence1\tsentence2\tlabel1\tgold_label\nx\ty\tneutral\tcontradiction\n", ("x", "y"), (2,)),
        ("xnli", "premise\thypo\tlabel\nx\ty\tcontradictory\n", ("x", "y"), (2,)),
        ("qqp", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tx\ty\t1\n", ("x", "y"), (1,)),
        ("qnli", "index\tquestion\tsentence\tlabel\n0\tx\ty\tnot_entailment\n", ("x", "y"), (1,)),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\tx\ty\tentailment\n", ("x", "y"), (0,)),
    ],
)
def test_original_downloads(
    task: str, text: str, inputs: tuple[str, ...], labels: tuple[float, ...], tmp_path: Path
) -> None:
    found = examples_of(write(tmp_path, "train.tsv", text), TASKS[task])
    assert found.inputs[0] == inputs
    assert found.labels == labels


def test_columns_of_tokens(tmp_path: Path) -> None:
    conll = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n"
    wikiann = "de:EU\tB-ORG\nde:rejects\tO\n\n\nde:Peter\tB-PER\n\n"
    mixed = wikiann.replace("de:rejects", "rejects")
    lines = '{"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]}\n{"tokens": ["Peter"], "ner_tags": ["B-PER"]}\n'
    found = [
        examples_of(write(tmp_path, name, text), TASKS["ner"])
        for name, text in (("eng.train", conll), ("train", wikiann), ("a.jsonl", lines))
    ]
    assert found[0].inputs == (("EU", "rejects"), ("Peter",))
    assert found[0].labels == (("B-ORG", "O"), ("B-PER",))
    assert len({each.sha256() for each in found}) == 1
    # what looks like a language here belongs to the word
    assert examples_of(write(tmp_path, "mixed.txt", mixed), TASKS["ner"]).inputs[0] == ("de:EU", "rejects")


@pytest.mark.parametrize(
    "task, name, text, said",
    [
        ("sst2", "a.tsv", "sentence\tlabel\nx\t1\ny\n", "line 3: 1 columns where the header has 2"),
        ("sst2", "a.tsv", "text\tlabel\nx\t1\n", "'sentence', which task 'sst2' needs"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\t1\ny\t3.8\n", "line 3: label '3.8' is none of task 'sst2' (0 or"),
        ("rte", "a.csv", 'sentence1,sentence2,label\n"x\ny",z,-1\n', "line 3: label '-1' .* withheld"),
        ("sst2", "a.csv", 'sentence,label\n"x,1\n', "line 2: this is not CSV"),
        ("sst2", "a.jsonl", '{"sentence": "x", "label": null}', "line 1: the label is missing"),
        ("sst2", "a.jsonl", '{"sentence": "x", "label": true}', "line 1: label True"),
        ("sst2", "a.jsonl", '{"sentence": "x", "label": 1}\n\n{"sentence": 5, "label": 1}', "line 3: .*holds 5"),
        ("sst2", "a.jsonl", '["x", 1]', "line 1: .*no JSON object"),
        ("stsb", "a.tsv", "sentence1\tsentence2\tscore\nx\ty\tentailment\n", "line 2: .* from 0 to 5"),
        ("stsb", "a.tsv", "sentence1\tsentence2\tscore\nx\ty\tnan\n", "line 2: .* from 0 to 5"),
        ("ner", "a.txt", "EU B-ORG\nPeter\n", "line 2: 'Peter' has no tag"),
        ("ner", "a.txt", "EU B-ORG\n\nPeter NNP\n", "line 3: tag 'NNP'"),
        ("ner", "a.jsonl", '{"tokens": ["EU"], "ner_tags": [3]}', "line 1: .*lists of strings"),
        ("ner", "a.jsonl", '{"tokens": ["EU", "x"], "ner_tags": ["O"]}', "line 1: 2 words and 1 tags"),
        ("sst2", "a.tsv", "sentence\tlabel\n", "holds no examples"),
        ("sst2", "a.parquet", "x", "cannot be told from its suffix"),
    ],
)
def test_refusals_name_file_and_line(task: str, name: str, text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(TaskError, match=said.replace("(", r"\(")) as caught:
        examples_of(path, TASKS[task])
    assert path in str(caught.value)


def test_of_a_file_in_several_languages_one_is_read(tmp_path: Path) -> None:
    """As the original XNLI files come: one after the other, told by a column."""
    lines = ["language\tgold_label\tsentence1\tsentence2"]
    lines += [f"{language}\tneutral\t{language} {number}\tx" for language in ("ar", "en") for number in range(2)]
    path = write(tmp_path, "xnli.dev.tsv", "\n".join(lines))
    assert examples_of(path, TASKS["xnli"]).inputs == (("en 0", "x"), ("en 1", "x"))
    assert examples_of(path, TASKS["xnli"], "ar").inputs == (("ar 0", "x"), ("ar 1", "x"))
    with pytest.raises(TaskError, match=r"several languages \(ar, en\) and none in 'all'.*--test-files ar="):
        examples_of(path, TASKS["xnli"], "all")
    assert len(examples_of(path, replace(TASKS["mnli"], label=("gold_label",)))) == 4, "another task has no languages"
    alone = write(tmp_path, "xnli.ar.tsv", "\n".join(lines[:3]))
    assert len(examples_of(alone, TASKS["xnli"])) == 2


def test_no_such_file_and_no_hub(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no file 'nowhere.tsv'"):
        examples_of("nowhere.tsv", TASKS["sst2"])
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" * 99)[:20] + b"\xff" * 20)
    with pytest.raises(TaskError, match=r"cut\.tsv\.gz' cannot be read"):
        examples_of(str(tmp_path / "cut.tsv.gz"), TASKS["sst2"])
    with pytest.raises(TaskError, match=r"is a folder.*train\.tsv"):
        examples_of(str(tmp_path), TASKS["sst2"])
    with pytest.raises(TaskError, match="(?i)offline.*--train-file and --dev-file"):
        examples_of(TASKS["sst2"].train, TASKS["sst2"])


def test_datasets_with_named_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub serves: numbers whose names are in the dataset, which decide. A folder stands in for the hub."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    monkeypatch.chdir(tmp_path)
    classes = ClassLabel(names=["positive", "negative"])  # the other way round than in the task
    features = Features({"sentence": Value("string"), "label": classes})
    Dataset.from_dict({"sentence": ["x", "y"], "label": [0, 1]}, features).to_parquet("glue/train.parquet")
    assert examples_of("glue::train", TASKS["sst2"]).labels == (1, 0)
    tags = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, tags).to_parquet("ner/train.parquet")
    assert examples_of("ner::train", TASKS["ner"]).labels == (("O", "B-PER"),)


def test_examples_that_say_nothing() -> None:
    one_class = Examples(origin="dev.tsv", inputs=(("x",), ("y",)), labels=(1, 1))
    with pytest.raises(TaskError, match=r"2 examples of 'dev.tsv' all have the label 1 \(positive\): accuracy on them"):
        check_examples(one_class, TASKS["sst2"], training=False)
    with pytest.raises(TaskError, match="nothing could be learned.*--train-rows"):
        check_examples(one_class, TASKS["stsb"], training=True)
    no_entity = Examples(origin="dev.txt", inputs=(("x", "y"),), labels=(("O", "O"),))
    with pytest.raises(TaskError, match="no entity"):
        check_examples(no_entity, TASKS["ner"], training=False)


def test_draw_is_the_same_every_time_and_keeps_the_order() -> None:
    examples = Examples(origin="x", inputs=tuple((str(n),) for n in range(100)), labels=tuple(range(100)))
    drawn = examples.draw(10)
    assert drawn == examples.draw(10) and drawn.labels == tuple(sorted(drawn.labels)) != tuple(range(10))
    assert [text for (text,) in drawn.inputs] == [str(label) for label in drawn.labels]
    assert examples.draw(100) is examples
