"""Perplexity of a causal LM on held-out text, and bits per byte: `kdeval perplexity`.

In: documents as strings, a student's folder, perhaps a teacher. Out: a `PerplexityReport`. Each document is cut into
tokens without special ones; all of these are predicted once, the first after the beginning of text (`bos`) or, where
the tokenizer has none, after its end of text (`eos`), as between documents of a training. So what is predicted
spells the whole text, and bits per byte are of the same bytes for every tokenizer. The end of a document is no text and
is not predicted. Where there is neither token, the first of a document is not predicted and its bytes do not count.

Documents do not see each other. One longer than a window is read in windows that overlap (windows.py). A teacher reads
the same documents afterwards. Cost: a forward pass over seq_len / stride times the tokens; of the text some windows are
in memory, of logits never more than `scoring.CHUNK_LOGITS`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from student_train.evaluate.causal import CausalModel, load_causal
from student_train.evaluate.perplexity.records import PerplexityReport, TextScore
from student_train.evaluate.perplexity.scoring import Scorer
from student_train.evaluate.perplexity.settings import DEFAULT_SEQ_LEN, PerplexitySettings, check_stride
from student_train.evaluate.perplexity.windows import Window, batches, windows
from teacher_cache.device import resolve_dtype
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.arithmetic import move_model

INSTEAD = (
    "perplexity would be no number of it; measure it with `kdeval fidelity` on rows of a cache, or on a task with "
    "`kdeval finetune`"
)


class Show(Protocol):
    """Called with what is being done, for a progress line."""

    def __call__(self, doing: str, /) -> None: ...


def measure_perplexity(
    settings: PerplexitySettings, documents: Callable[[], Iterable[str]], *, device: str, show: Show
) -> PerplexityReport:
    """Measure the student on the documents, and the teacher if one is given.

    Args:
        settings: the flags.
        documents: gives the text from its beginning, each time the same.
        device: `cpu` or `cuda`.
        show: is told what is being done.

    Raises:
        StudentError: a model or its tokenizer cannot be loaded, is no causal LM, or gives no finite probabilities.
        SettingsError: there is no text, or a model cannot read windows of that length.
    """
    show("loading the models")
    models = [load_causal(settings.student, "student", instead=INSTEAD, tokenizer=True)]
    if settings.teacher is not None:
        models.append(load_causal(settings.teacher, "teacher", instead=INSTEAD, tokenizer=True))
    seq_len, stride = _choose_windows(settings, models)
    dtype = resolve_dtype(settings.dtype, torch.device(device))
    speakers = [Speaker.of(model) for model in models]
    text = _Text(settings.text)
    scores: list[TextScore] = []
    notes: list[str] = []
    for speaker in speakers:
        move_model(speaker.causal.model, device=device, dtype=getattr(torch, dtype))
        read = text.watched(_until(documents(), settings.max_tokens, speakers[0]))
        counted = _Counted(speaker, seq_len, stride)
        scores.append(_score(counted, read, settings.batch_size, show))
        notes += counted.notes()
    student, *teachers = speakers
    return PerplexityReport(
        student=settings.student,
        teacher=settings.teacher,
        text=settings.text,
        documents=text.documents,
        seq_len=seq_len,
        stride=stride,
        dtype=dtype,
        device=device,
        student_score=scores[0],
        teacher_score=scores[1] if teachers else None,
        fingerprints={
            "student": student.causal.fingerprint,
            "text": text.fingerprint,
            "vocabulary": student.vocabulary,
            **{
                name: value
                for each in teachers
                for name, value in (("teacher", each.causal.fingerprint), ("teacher_vocabulary", each.vocabulary))
            },
        },
        notes=tuple(notes),
    )


def _choose_windows(settings: PerplexitySettings, models: Iterable[CausalModel]) -> tuple[int, int]:
    limits = [(model.positions, model) for model in models if model.positions is not None]
    limit, shortest = min(limits, key=lambda pair: pair[0], default=(None, None))
    if settings.seq_len is None:
        seq_len = DEFAULT_SEQ_LEN if limit is None else min(limit, DEFAULT_SEQ_LEN)
    elif limit is not None and shortest is not None and settings.seq_len > limit:
        raise SettingsError(
            f"--seq-len {settings.seq_len!r}: {shortest.role} {shortest.name!r} reads at most {limit} positions, so "
            f"longer windows would ask it what it never saw; give {limit} or less"
        )
    else:
        seq_len = settings.seq_len
    stride = max(1, seq_len // 2) if settings.stride is None else settings.stride
    check_stride(stride, seq_len)
    return seq_len, stride


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A causal LM with its tokenizer: text in its own tokens.

    `start` is the id that stands before a document. `repeats` says that the tokenizer itself puts it before every text:
    then the model has read no row without it, and each window begins with it.
    """

    causal: CausalModel
    tokenizer: Any
    start: int | None
    repeats: bool

    @classmethod
    def of(cls, causal: CausalModel) -> Speaker:
        """Of a model and the tokenizer beside it."""
        tokenizer = causal.tokenizer()
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        by_itself = list(tokenizer("a").input_ids)
        return cls(
            causal=causal,
            tokenizer=tokenizer,
            start=start,
            repeats=start is not None and len(by_itself) > 1 and by_itself[0] == start,
        )

    @property
    def vocabulary(self) -> str:
        """SHA-256 of the tokens with their ids."""
        entries = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, none of them special.

        Raises:
            StudentError: the model does not have all of them.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        entries, highest = self.causal.config.vocab_size, max([*ids, self.start or 0])
        if highest >= entries:
            raise StudentError(
                f"the tokenizer of {self.causal.role} {self.causal.name!r} gives the id {highest}, of which the model "
                f"has {entries}: it is another model's, and its tokens would be other words; put the right one into "
                "the folder"
            )
        return ids

    def begins(self, text: str) -> list[int]:
        """Where in the text each of its tokens begins; white space that no token is said to spell is the next one's.

        Tokenizers that trim their offsets leave out the space in front of a word.

        Raises:
            StudentError: the tokenizer cannot tell.
        """
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError as error:
            raise StudentError(
                f"the tokenizer of {self.causal.role} {self.causal.name!r} is a slow one, which does not say where in "
                "a text its tokens lie: which bytes a part of them spells cannot be counted; leave --max-tokens "
                "out, or save a fast tokenizer (tokenizer.json)"
            ) from error
        spans = found.offset_mapping
        # a token that shares a character with the one before it begins before that ends
        return [min(begin, end) for (begin, _), (_, end) in zip(spans, [(0, 0), *spans[:-1]], strict=True)]


def _score(counted: _Counted, texts: Iterable[str], batch_size: int, show: Show) -> TextScore:
    speaker = counted.speaker
    scorer = Scorer(speaker.causal.model)
    nats = 0.0
    for done, batch in enumerate(batches(counted.windows(texts), batch_size)):
        if done % 8 == 0:
            show(f"{speaker.causal.role}: {counted.tokens:,} tokens of {counted.documents:,} documents")
        nats += scorer.nats(batch)
    if counted.tokens == 0:
        raise SettingsError(
            f"--text holds nothing that {speaker.causal.role} {speaker.causal.name!r} could predict "
            f"({counted.documents} documents): give files with text in them"
        )
    if not math.isfinite(nats):
        raise StudentError(
            f"{speaker.causal.role} {speaker.causal.name!r} gives probabilities that are not finite numbers: its "
            "weights, or outputs that come from them, are NaN or infinite; train it anew with a lower --lr, or give "
            "--dtype float32"
        )
    start = None if speaker.start is None else str(speaker.tokenizer.convert_ids_to_tokens(speaker.start))
    return TextScore(nats=nats, tokens=counted.tokens, bytes=counted.bytes, start=start)


class _Counted:
    """Windows of texts, and how many documents, tokens and bytes these predict so far."""

    def __init__(self, speaker: Speaker, seq_len: int, stride: int) -> None:
        self.speaker, self._seq_len, self._stride = speaker, seq_len, stride
        self.tokens = self.bytes = self.documents = self.unknown = 0

    def windows(self, texts: Iterable[str]) -> Iterator[Window]:
        """Those of each text, in order."""
        speaker = self.speaker
        for text in texts:
            ids = speaker.tokens(text)
            yield from windows(ids, speaker.start, seq_len=self._seq_len, stride=self._stride, repeat=speaker.repeats)
            if speaker.start is None:
                ids, text = ids[1:], _after_the_first(speaker, text)
            self.documents += 1
            self.tokens += len(ids)
            self.bytes += len(text.encode())
            self.unknown += ids.count(speaker.tokenizer.unk_token_id)

    def notes(self) -> Iterator[str]:
        """What to know of the numbers."""
        role = self.speaker.causal.role
        if self.speaker.start is None:
            yield (
                f"the tokenizer of the {role} has neither a beginning nor an end of text: the first token of each "
                "document is not predicted, and its bytes do not count"
            )
        if self.unknown:
            yield (
                f"{self.unknown / self.tokens:.1%} of the {role}'s tokens are unknown ones, which are easy to predict "
                "and spell nothing: its perplexity and bits a byte are too low"
            )


def _after_the_first(speaker: Speaker, text: str) -> str:
    """What all tokens but the first spell. One that shares a character with the first counts as spelling it."""
    begins = speaker.begins(text)
    return text[begins[1] :] if len(begins) > 1 else ""


def _until(documents: Iterable[str], tokens: int | None, speaker: Speaker) -> Iterator[str]:
    """The documents up to so many tokens, the last one cut before the token that would be one more."""
    left = tokens
    for text in documents:
        if left is None:
            yield text
            continue
        begins = speaker.begins(text)
        if len(begins) > left:
            text = text[: begins[left]]
        left -= len(begins)
        if text:
            yield text
        if left <= 0:
            return


class _Text:
    """What was read: its documents and their hash."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.documents, self.fingerprint = 0, ""

    def watched(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, which are known as a whole when the last one has been taken.

        Raises:
            SettingsError: a second reading gave others than the first.
        """
        digest, count = hashlib.sha256(), 0
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
            count += 1
            yield text
        if self.fingerprint not in ("", digest.hexdigest()):
            raise SettingsError(
                f"--text {' '.join(self._names)!r} gave other text when it was read again for the teacher: the two "
                "would not compare; write what comes from a pipe into a file"
            )
        self.documents, self.fingerprint = count, digest.hexdigest()
