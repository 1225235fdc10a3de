"""The tasks of `kdeval finetune`: what an example looks like, what its labels mean, which metric counts, where it lies.

A table and nothing else. Label numbers are those of the datasets on the hub (so 0 of an inference task is entailment);
column names are those of the hub and of the original downloads of GLUE and XNLI. The metric of each task is the one
that the BERT paper reports (Devlin et al. 2019, section 4.1); all others that apply are recorded beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["classification", "regression", "tokens"]
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro-f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "tokens": ("f1",),
}
"""That may count in a task of the user's own, the usual one first."""
XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `inputs` has the accepted column names of each text of an example, best first; `label` those of labels.

    `labels` are the classes by number, `synonyms` what else files call them. `headless` are the columns of an original
    file that comes without a header. `train`, `dev` and `tests` name datasets of the hub, name:config:split, in which
    {language} is to be replaced. A task of the user's `own` has none; where it has classes and no `labels`, these are
    found in its examples.
    """

    name: str
    kind: Kind = "classification"
    inputs: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    metric: str = "accuracy"
    headless: tuple[str, ...] = ()
    train: str = ""
    dev: str = ""
    tests: Mapping[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    own: bool = False

    @property
    def in_languages(self) -> bool:
        """Whether examples of it come in many languages, of which one is trained on."""
        return "{language}" in self.train


def _glue(name: str, *inputs: tuple[str, ...], dev: str = "validation", **facts: Any) -> Task:
    return Task(name=name, inputs=inputs, train=f"nyu-mll/glue:{name}:train", dev=f"nyu-mll/glue:{name}:{dev}", **facts)


_SENTENCES = (("sentence1",), ("sentence2",))
_PREMISE = (("premise", "sentence1"), ("hypothesis", "hypo", "sentence2"))
_INFERENCE = ("entailment", "neutral", "contradiction")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("sst2", ("sentence",), labels=("negative", "positive")),
        _glue("rte", *_SENTENCES, labels=("entailment", "not_entailment")),
        _glue(
            "mrpc",
            ("sentence1", "#1 String"),
            ("sentence2", "#2 String"),
            label=("label", "Quality"),
            labels=("not_equivalent", "equivalent"),
            metric="f1",
        ),
        _glue(
            "cola",
            ("sentence",),
            labels=("unacceptable", "acceptable"),
            metric="matthews",
            headless=("source", "label", "mark", "sentence"),
        ),
        _glue("stsb", *_SENTENCES, label=("label", "score"), kind="regression", metric="spearman"),
        _glue("qnli", ("question",), ("sentence",), labels=("entailment", "not_entailment")),
        _glue(
            "qqp",
            ("question1",),
            ("question2",),
            label=("label", "is_duplicate"),
            labels=("not_duplicate", "duplicate"),
            metric="f1",
        ),
        _glue(
            "mnli",
            *_PREMISE,
            label=("label", "gold_label"),
            labels=_INFERENCE,
            dev="validation_matched",
            tests={
                "matched": "nyu-mll/glue:mnli:validation_matched",
                "mismatched": "nyu-mll/glue:mnli:validation_mismatched",
            },
        ),
        Task(
            name="xnli",
            inputs=_PREMISE,
            label=("label", "gold_label"),
            labels=_INFERENCE,
            synonyms={"contradictory": "contradiction"},
            train="facebook/xnli:{language}:train",
            dev="facebook/xnli:{language}:validation",
            tests={"{language}": "facebook/xnli:{language}:test"},
            languages=tuple(XNLI_LANGUAGES),
        ),
        Task(
            name="ner",
            kind="tokens",
            inputs=(("tokens", "words"),),
            label=("ner_tags", "tags", "labels"),
            metric="f1",
            train="unimelb-nlp/wikiann:{language}:train",
            dev="unimelb-nlp/wikiann:{language}:validation",
            tests={"{language}": "unimelb-nlp/wikiann:{language}:test"},
        ),
    )
}


def hub_sources(task: Task, language: str, test_languages: tuple[str, ...] | None) -> tuple[str, str, dict[str, str]]:
    """Datasets of the hub to train on, to choose on, and to test on by name."""
    tested = test_languages or task.languages or (language,)
    tests = {
        name.format(language=each): source.format(language=each)
        for name, source in task.tests.items()
        for each in (tested if "{language}" in name else (language,))
    }
    return task.train.format(language=language), task.dev.format(language=language), tests
