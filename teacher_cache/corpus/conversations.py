"""Records of tables -> conversations: who said what, and which of it a model is to learn to say.

A table holds conversations in a column `messages` or `conversations`, a list of messages with `role` and `content`, or
`from` and `value` as ShareGPT names them; or in `prompt` and `completion`, strings or lists of messages, of which only
the completion is learnt. A column `tools` describes functions that may be called. Content in parts of type `text` is
put together; values that are absent are left out, since tables fill them in where records differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa

from teacher_cache.corpus.columns import Note, Record
from teacher_cache.errors import CorpusError
from teacher_cache.wording import did_you_mean

CHAT_COLUMNS = ("messages", "conversations")
"""Names of a column that holds conversations, in upper or lower case; the first that is there counts."""
PAIR_COLUMNS = ("prompt", "completion")
"""Names of the two columns that hold what is given, and what is to be said."""

Message = dict[str, Any]

_SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_CALLED_OTHERWISE = ("text", "value", "message", "body", "response", "answer", "parts")
"""What tables that are not meant for chat templates call the content of a message."""
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with `role` and `content`; answers among those before `learnt_from` are context. Errors say `origin`."""

    messages: list[Message]
    origin: str
    tools: list[Any] | None = None
    learnt_from: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A text and what follows it, as they are: no template puts anything between them."""

    prompt: str
    completion: str
    origin: str


Chat = Conversation | Completion


def chat_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The column of conversations, or the two of prompts and completions, among the names of columns; else nothing."""
    plain = {column.strip().casefold(): column for column in reversed(list(columns))}
    for name in CHAT_COLUMNS:
        if name in plain:
            return (plain[name],)
    return tuple(plain[name] for name in PAIR_COLUMNS) if all(name in plain for name in PAIR_COLUMNS) else ()


def record_columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a table without types that hold conversations, by its first record."""
    columns = chat_columns(record)
    values = [record[column] for column in columns]
    if len(values) == 2 and all(isinstance(value, str) for value in values):
        return columns
    return columns if all(isinstance(value, list) for value in values) else ()


def arrow_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns of an Arrow table that hold conversations."""
    columns = chat_columns(schema.names)
    types = [schema.field(column).type for column in columns]
    strings = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in types]
    if len(types) == 2 and all(strings):
        return columns
    return columns if all(map(_holds_messages, types)) else ()


def _holds_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return bool(pa.types.is_struct(kind.value_type) or isinstance(kind.value_type, pa.JsonType))


def read_chats(origin: str, records: Iterable[Record], columns: tuple[str, ...], note: Note) -> Iterator[Chat]:
    """The conversations in records, by the number of each; records whose columns are empty are left out.

    Raises:
        CorpusError: a record lacks the columns, or holds something else than a conversation in them.
    """
    what = f"column {columns[0]!r}" if len(columns) == 1 else f"columns {columns[0]!r} and {columns[1]!r}"
    note(f"{origin}: conversations are read from {what}")
    for number, record in records:
        reader = _Reader(f"{origin}, record {number}")
        if any(column not in record for column in columns):
            reader.refuse(f"it has no {what}, where the first record has conversations; put every document there")
        values = [record[column] for column in columns]
        if any(values):
            yield reader.chat(values, record.get("tools"))


@dataclass(frozen=True)
class _Reader:
    """Reads one record, which `origin` names in errors."""

    origin: str

    def refuse(self, what: str) -> NoReturn:
        raise CorpusError(f"the corpus {self.origin}: {what}")

    def chat(self, values: list[Any], tools: Any) -> Chat:
        if len(values) == 2 and all(isinstance(value, str) for value in values):
            return Completion(prompt=values[0], completion=values[1], origin=self.origin)
        if not all(isinstance(value, list) for value in values):
            kinds = " and ".join(type(value).__name__ for value in values)
            self.refuse(
                f"{kinds} stands where a conversation should: a list of messages, each with a role and its content, "
                "or a prompt and its completion, both strings or both such lists"
            )
        parts = [[self._message(message) for message in value] for value in values]
        return Conversation(
            messages=[message for part in parts for message in part],
            origin=self.origin,
            tools=self._tools(tools),
            learnt_from=len(parts[0]) if len(parts) == 2 else 0,
        )

    def _message(self, value: Any) -> Message:
        if isinstance(value, str):  # as tables keep objects of different shapes
            value = self._json(value)
        if not isinstance(value, dict):
            self.refuse(f"the message {value!r} is no object; give each a role and its content")
        message = {str(key): _present(part) for key, part in value.items() if part is not None}
        sender = message.pop("from", None) if "role" not in message else None
        if sender is not None:
            if sender not in _SENDERS:
                self.refuse(
                    f"a message is from {sender!r}, and whose that is, is not known: an answer could go unlearnt; "
                    f"{did_you_mean(str(sender), _SENDERS)} one of {', '.join(_SENDERS)}"
                )
            message = {"role": _SENDERS[sender], "content": message.pop("value", None), **message}
        role = message.get("role")
        if not isinstance(role, str) or not role.strip():
            self.refuse(
                f"a message has no role (its keys are {', '.join(map(repr, message)) or 'none'}): who says it, and "
                "whether it is to be learnt, is not known; give each a role, such as user or assistant"
            )
        message["content"] = self._content(message.get("content"))
        if message["content"] is None:
            del message["content"]
            if not message.get("tool_calls"):
                self._refuse_content_elsewhere(message)
                message["content"] = ""
        return message

    def _refuse_content_elsewhere(self, message: Message) -> None:
        for name in _CALLED_OTHERWISE:
            if message.get(name):
                self.refuse(
                    f"a message has no content, and {name!r} with {str(message[name])[:_SHOWN]!r}: chat templates read "
                    "content, and to them it is empty: what it says would be neither seen nor learnt; call that content"
                )

    def _content(self, content: Any) -> str | None:
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list):
            self.refuse(f"the content of a message is {content!r}, where text is read; write it as one string")
        texts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
                self.refuse(f"a message has the part {part!r}, and only text is read; leave such records out")
            texts.append(text)
        return "".join(texts)

    def _tools(self, tools: Any) -> list[Any] | None:
        if isinstance(tools, str):
            tools = self._json(tools) if tools.strip() else None
        if not tools:
            return None
        if not isinstance(tools, list):
            self.refuse(f"its tools are {tools!r}, where a list of their descriptions is read; mend the record")
        return [_present(self._json(tool) if isinstance(tool, str) else tool) for tool in tools]

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.refuse(f"the string {text[:40]!r} stands where an object should; give objects, or their JSON")


def _present(value: Any) -> Any:
    """A value without what is absent in it."""
    if isinstance(value, dict):
        return {key: _present(part) for key, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value
