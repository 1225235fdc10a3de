"""Conversations -> token ids, and for each token whether the model is the one that says it.

The tokenizer's chat template writes a conversation as one text; what the assistant says in it, and the token that ends
its turn, is learnt, all else is context. Where a template marks that with `{% generation %}`, its marks count. Else an
answer is what the conversation up to it has more than the conversation before it with the prompt for an answer. That
holds only where a template writes earlier turns alike whatever follows; where it does not, it is refused rather than
guessed. A special token that directly follows an answer ends it, whoever wrote it there; white space after that token
is the template's, and is not learnt (unless the marks say so).

Tokens are told by the characters that they stand for, never by their ids: a token of which any character is learnt, is.
A prompt and its completion, both plain strings, are one text without a template, which begins and ends as documents do.

Cost: one rendering of the template per conversation, without marks two more per answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from teacher_cache.corpus.columns import Note
from teacher_cache.corpus.conversations import Chat, Completion, Conversation, Message
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.corpus.pieces import MOST_UNCUT
from teacher_cache.corpus.tokens import CHARACTERS_AT_ONCE, DOCUMENTS_AT_ONCE, Ids
from teacher_cache.errors import CorpusError, TeacherError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Learnt = NDArray[np.bool_]

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SHOWN = 60
_DAY = datetime(2024, 7, 26)
"""What templates that write today's date are told, the day that Llama 3's has where it is told none: a corpus is not
another one tomorrow, nor at another place."""
_CLOCK = "strftime_now"
"""What Transformers gives to templates. A macro of that name takes its place; variables can be of plain types only."""
_DIRECTIVES = (*(f"-{one}" for one in "dmHIMSjy"), *"aAbBcCdDeFfGhHIjklmMpPrRSTuUVwWxXyYzZ")
_STOPPED_CLOCK = "".join(
    (
        f"{{%- macro {_CLOCK}(format) -%}}{{{{ format|replace('%%', '\ue000')",
        *(f"|replace('%{one}', '{_DAY.strftime(f'%{one}')}')" for one in _DIRECTIVES),
        "|replace('\ue000', '%') }}{%- endmacro %}\n",
    )
)
"""Put before a template; its line break is eaten, as is that after every tag, and nothing of the template is."""


class ChatEncoder:
    """Encodes conversations for one tokenizer, and counts what the user should know of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frame: RowFrame) -> None:
        """Prepare for a tokenizer.

        Raises:
            TeacherError: it cannot tell which characters a token stands for.
        """
        if not tokenizer.is_fast:
            raise TeacherError(
                f"the tokenizer {tokenizer.name_or_path!r} is one in Python, which does not say which characters a "
                "token stands for: what is an answer in a conversation cannot be told; save it with a tokenizer.json"
            )
        self._tokenizer, self._frame = tokenizer, frame
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        self._special = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._conversations = self._unanswered = self._opening = self._answers = self._endless = 0

    def encode(self, chats: Iterable[Chat]) -> Iterator[list[tuple[Ids, Learnt]]]:
        """The ids of each conversation and which of them are learnt, in batches; those without an answer are left out.

        Raises:
            CorpusError: the chat template cannot write a conversation, or not so that answers are found in it.
            TeacherError: the tokenizer has no chat template.
        """
        batch: list[tuple[str, list[Span], bool]] = []
        characters = 0
        for chat in chats:
            text, spans = self._read(chat)
            if not spans:
                continue
            if batch and (characters + len(text) > CHARACTERS_AT_ONCE or len(batch) == DOCUMENTS_AT_ONCE):
                yield self._encode(batch)
                batch, characters = [], 0
            batch.append((text, spans, isinstance(chat, Completion)))
            characters += len(text)
        if batch:
            yield self._encode(batch)

    def tell(self, note: Note) -> None:
        """Say what was left out, or may not be as meant.

        Raises:
            CorpusError: no conversation has an answer.
        """
        if self._conversations and self._unanswered == self._conversations:
            raise CorpusError(
                f"none of the {self._conversations} conversations of the corpus has an answer of the assistant that is "
                "to be learnt: there is nothing to learn from them; check the roles, or give their text as text"
            )
        if self._unanswered:
            note(f"{self._unanswered} of {self._conversations} conversations have no answer to learn, and are left out")
        if self._opening:
            note(f"{self._opening} conversations begin with an answer, which is read and not learnt")
        if self._endless:
            note(
                f"{self._endless} of {self._answers} answers end in no special token: a student does not learn there "
                "where to stop; a chat template ends each turn with one"
            )

    # ---- text -------------------------------------------------------------------------------------------------------

    def _read(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text of a conversation and where in it the answers are; none where it is to be left out."""
        self._conversations += 1
        if isinstance(chat, Completion):
            text = chat.prompt + chat.completion
            return self._checked(text, chat.origin), [(len(chat.prompt), len(text) + 1)]
        answers = [at for at, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if not any(at >= chat.learnt_from for at in answers):
            self._unanswered += 1
            return "", []
        text, marked = self._render(chat, chat.messages)
        self._checked(text, chat.origin)
        if marked is None:
            spans = [span for at in answers if at >= chat.learnt_from for span in self._found(chat, text, at)]
        else:
            spans = [span for span in marked if span[0] >= self._context(chat, text)]
        spans = [self._ended(text, start, stop, trim=marked is None) for start, stop in spans]
        if not spans:
            self._unanswered += 1
        return text, spans

    def _found(self, chat: Conversation, text: str, at: int) -> list[Span]:
        """Where the answer at message `at` is in the text of the conversation."""
        try:
            before, _ = self._render(chat, chat.messages[:at], prompt=True)
        except CorpusError:
            if at:
                raise
            before = ""  # many a template cannot write a conversation without messages
        if at == 0 and not (before and text.startswith(before)):
            self._opening += 1
            return []
        through = text if at + 1 == len(chat.messages) else self._render(chat, chat.messages[: at + 1])[0]
        for beginning, said in ((before, "the prompt for it"), (through, "the conversation up to it")):
            if not text.startswith(beginning):
                same = next(place for place, one in enumerate(beginning) if text[place : place + 1] != one)
                raise CorpusError(
                    f"the corpus {chat.origin}: the chat template of the tokenizer "
                    f"{self._tokenizer.name_or_path!r} writes what comes before or in the answer at message {at + 1} "
                    f"otherwise once the conversation goes on ({said} has {beginning[same : same + _SHOWN]!r} where "
                    f"the whole has {text[same : same + _SHOWN]!r}): which tokens are the answer cannot be told; mark "
                    "answers in the template with {% generation %} and {% endgeneration %}, or give conversations "
                    "that end with their first answer"
                )
        return [(len(before), len(through))]

    def _context(self, chat: Conversation, text: str) -> int:
        """How many characters of a text with marks are given, and not learnt whatever the marks say."""
        if not chat.learnt_from:
            return 0
        given, _ = self._render(chat, chat.messages[: chat.learnt_from])
        if not text.startswith(given):
            raise CorpusError(
                f"the corpus {chat.origin}: the chat template of the tokenizer {self._tokenizer.name_or_path!r} writes "
                "the prompt otherwise once the completion follows: where the completion begins cannot be told; give "
                "the record as one list of messages"
            )
        return len(given)

    def _ended(self, text: str, start: int, stop: int, *, trim: bool) -> Span:
        """The span of an answer with the special token that ends it and, with `trim`, without white space after it."""
        self._answers += 1
        bare = start + len(text[start:stop].rstrip())
        if text[start:bare].endswith(tuple(self._special)):
            return start, bare if trim else stop
        following = next((token for token in self._special if text.startswith(token, stop)), None)
        if following is None:
            self._endless += 1
        return start, stop + len(following or "")

    def _render(
        self, chat: Conversation, messages: list[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The text of messages, and the answers in it if the template marks them."""
        template = self._template(chat)
        marks = _MARKS.search(template) is not None
        try:
            # what apply_chat_template does, without its tokens: their place is told from offsets below
            variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
            texts, spans = cast(
                "tuple[list[str], list[list[Span]]]",
                render_jinja_template(
                    conversations=[messages],
                    tools=chat.tools,
                    chat_template=_STOPPED_CLOCK + template if _CLOCK in template else template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **variables,
                ),
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise CorpusError(
                f"the corpus {chat.origin}: the chat template of the tokenizer {self._tokenizer.name_or_path!r} does "
                f"not write this conversation ({first_line(error)}; its roles: {roles[:_SHOWN]}): nothing can be "
                "learnt from it; mend it or leave it out"
            ) from error
        return texts[0], spans[0] if marks else None

    def _template(self, chat: Conversation) -> str:
        try:
            return self._tokenizer.get_chat_template(None, chat.tools)
        except ValueError as error:
            raise TeacherError(
                f"the tokenizer {self._tokenizer.name_or_path!r} has no chat template, and {chat.origin} is a "
                "conversation: how it is to be written as text is not said; take a teacher that was trained on "
                "conversations, put its chat_template.jinja beside its tokenizer, or give text"
            ) from error

    def _checked(self, text: str, origin: str) -> str:
        what = f"has more than {MOST_UNCUT} characters" if len(text) > MOST_UNCUT else None
        if "\0" in text:
            what = "holds a NUL character"
        elif not text.isascii() and re.search("[\ud800-\udfff]", text):
            what = "holds half a character (one of two surrogates of UTF-16)"
        if what is not None:
            raise CorpusError(f"the corpus {origin} {what}: tokenizers cannot take it; mend or leave out the record")
        return text

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def _encode(self, batch: Sequence[tuple[str, list[Span], bool]]) -> list[tuple[Ids, Learnt]]:
        encoded = self._tokenizer(
            [text for text, _, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        read = zip(encoded["input_ids"], encoded["offset_mapping"], batch, strict=True)
        documents = [
            self._document(np.asarray(ids, dtype=np.int32), np.asarray(offsets).reshape(-1, 2), spans, completes)
            for ids, offsets, (_, spans, completes) in read
        ]
        return [(ids, learnt) for ids, learnt in documents if len(ids)]

    def _document(
        self, ids: Ids, offset_N2: NDArray[np.int64], spans: Sequence[Span], completes: bool
    ) -> tuple[Ids, Learnt]:
        learnt = _said(offset_N2, spans)
        if not completes:
            return ids, learnt
        before, after = self._frame.prefix, self._frame.ending
        if tuple(ids[-len(after) :].tolist()) == after:
            after = ()  # the completion says it itself
        return (
            np.concatenate((np.asarray(before, dtype=np.int32), ids, np.asarray(after, dtype=np.int32))),
            np.concatenate((np.zeros(len(before), dtype=bool), learnt, np.ones(len(after), dtype=bool))),
        )


def _said(offset_N2: NDArray[np.int64], spans: Sequence[Span]) -> Learnt:
    """Which tokens stand for a character of a span.

    Some tokenizers leave white space out of what a token stands for: one of nothing else ends where it is said to.
    """
    first, last = np.minimum(offset_N2[:, 0], offset_N2[:, 1] - 1), offset_N2[:, 1]
    learnt = np.zeros(len(offset_N2), dtype=bool)
    for start, stop in spans:
        learnt |= (first < stop) & (last > start)
    return learnt
