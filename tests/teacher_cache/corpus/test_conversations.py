"""Conversations in records of every shape, and what is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from teacher_cache.corpus.conversations import Chat, Completion, Conversation, arrow_columns, chat_columns, read_chats
from teacher_cache.corpus.documents import read_documents
from teacher_cache.errors import CorpusError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def read(*records: dict[str, Any]) -> list[Chat]:
    columns = chat_columns(records[0])
    return list(read_chats("a.jsonl", enumerate(records, 1), columns, lambda _: None))


@pytest.mark.parametrize(
    "columns, chosen",
    [
        (["text", "Messages"], ["Messages"]),
        (["conversations", "id"], ["conversations"]),
        (["conversations", "messages"], ["messages"]),
        (["completion", "x", "Prompt "], ["Prompt ", "completion"]),
        (["prompt", "messages"], ["messages"]),
        (["prompt", "text"], []),
        (["text"], []),
    ],
)
def test_columns_of_conversations(columns: Sequence[str], chosen: Sequence[str]) -> None:
    assert list(chat_columns(columns)) == chosen


def test_messages_come_as_they_are_without_what_is_absent() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None}
    [chat] = read({"messages": [USER, asks, {"role": "tool", "content": "3", "name": "add"}, ANSWER]})
    assert isinstance(chat, Conversation)
    assert chat.messages == [
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3", "name": "add"},
        ANSWER,
    ]
    assert (chat.tools, chat.learnt_from, chat.origin) == (None, 0, "a.jsonl, record 1")


def test_content_in_parts_is_put_together_and_no_content_is_empty() -> None:
    parts = [{"type": "text", "text": "one "}, {"text": "two"}, " three"]
    [chat] = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant"}]})
    assert isinstance(chat, Conversation)
    assert [message["content"] for message in chat.messages] == ["one two three", ""]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_sharegpt_names(column: str) -> None:
    senders = ["system", "human", "gpt", "observation", "gpt"]
    [chat] = read({column: [{"from": sender, "value": sender, "weight": 1} for sender in senders]})
    assert isinstance(chat, Conversation)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [message["content"] for message in chat.messages] == senders


def test_prompt_and_completion() -> None:
    strings, lists = {"prompt": "a ", "completion": "b"}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert read(strings, lists) == [
        Completion(prompt="a ", completion="b", origin="a.jsonl, record 1"),
        Conversation(messages=[USER, ANSWER, USER, ANSWER], origin="a.jsonl, record 2", learnt_from=3),
    ]


def test_tools_as_objects_and_as_json() -> None:
    tool = {"type": "function", "function": {"name": "add", "strict": None, "n": 2}}
    want = [{"type": "function", "function": {"name": "add", "n": 2}}]
    shapes = ([tool], json.dumps([tool]), [json.dumps(tool)], None, "", [])
    chats = read(*({"messages": [USER, ANSWER], "tools": tools} for tools in shapes))
    assert [chat.tools for chat in chats if isinstance(chat, Conversation)] == [want, want, want, None, None, None]


def test_empty_records_are_left_out() -> None:
    assert read({"messages": []}, {"messages": None}) == []
    assert read({"prompt": "", "completion": ""}) == []


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [{"content": "hi"}]}, r"record 2: a message has no role \(its keys are 'content'\)"),
        ({"messages": [{"role": " ", "content": "hi"}]}, "has no role"),
        ({"messages": [{"from": "gtp", "value": "hi"}]}, r"from 'gtp'.*did you mean gpt"),
        ({"messages": ["hi"]}, "the string 'hi' stands where an object should"),
        ({"messages": [["hi"]]}, r"the message \['hi'\] is no object"),
        ({"messages": "hi"}, "str stands where a conversation should"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "only text is read"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content of a message is 5"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "no content, and 'text' with 'hi': .*; call that content"),
        ({"messages": [{"role": "user", "value": "hi"}]}, "no content, and 'value' with 'hi'"),
        ({"messages": [{"from": "human", "text": "hi"}]}, "no content, and 'text' with 'hi'"),
        ({"messages": [USER], "tools": {"name": "add"}}, "its tools are"),
        ({"text": "hi"}, "it has no column 'messages', where the first record has conversations"),
    ],
)
def test_what_is_no_conversation_is_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(CorpusError, match=r"a\.jsonl, record 2: .*") as failure:
        read({"messages": [USER, ANSWER]}, record)
    assert failure.match(words)


def test_a_prompt_of_one_kind_and_a_completion_of_another() -> None:
    with pytest.raises(CorpusError, match="str and list stands where a conversation should"):
        read({"prompt": "a", "completion": [ANSWER]})


def test_types_of_arrow_tables() -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    assert arrow_columns(pa.schema([("messages", pa.list_(message))])) == ("messages",)
    assert arrow_columns(pa.schema([("conversations", pa.large_list(message))])) == ("conversations",)
    assert arrow_columns(pa.schema([("messages", pa.list_(pa.json_()))])) == ("messages",)
    assert arrow_columns(pa.schema([("prompt", pa.string()), ("completion", pa.large_string())])) != ()
    assert arrow_columns(pa.schema([("prompt", pa.string()), ("completion", pa.list_(message))])) == ()
    assert arrow_columns(pa.schema([("messages", pa.string())])) == ()
    assert arrow_columns(pa.schema([("messages", pa.list_(pa.string()))])) == ()


# ---- files ----------------------------------------------------------------------------------------------------------

RECORDS: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER], "tools": None},
    {"messages": [{"role": "system", "content": "be"}, USER, ANSWER], "tools": '[{"name": "add", "most": 7}]'},
]


def write(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith(".json"):
        path.write_text(json.dumps(list(records), indent=1))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        Dataset.from_list(list(records)).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "saved"])
def test_every_kind_of_table_gives_the_same_conversations(name: str, tmp_path: Path) -> None:
    path, notes = write(tmp_path, name, RECORDS), list[str]()
    for chat in (None, True):
        found = [one for one in read_documents([str(path)], notes.append, chat=chat) if isinstance(one, Conversation)]
        assert [one.messages for one in found] == [record["messages"] for record in RECORDS]
        assert [one.tools for one in found] == [None, [{"name": "add", "most": 7}]]
    assert notes == [f"{path}: conversations are read from column 'messages'"] * 2
    with pytest.raises(CorpusError, match="no text column|holds a list where|column"):
        list(read_documents([str(path)]))


def test_pairs_in_csv_keep_their_white_space(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"2 + 2 = ", 4\n')
    [chat] = read_documents([str(tmp_path / "a.csv")], chat=None)
    assert isinstance(chat, Completion)
    assert (chat.prompt, chat.completion) == ("2 + 2 = ", " 4")


def test_text_and_conversations_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", RECORDS[:1])
    (tmp_path / "b.txt").write_text("text\n")
    write(tmp_path, "c.jsonl", [{"text": "more"}])
    documents = list(read_documents([str(tmp_path)], chat=None))
    assert [type(one) for one in documents] == [Conversation, str, str]


@pytest.mark.parametrize("name", ["b.txt", "c.jsonl", "c.parquet", "c"])
def test_conversations_that_must_be_there(name: str, tmp_path: Path) -> None:
    if name == "b.txt":
        (tmp_path / name).write_text("text\n")
    else:
        write(tmp_path, name, [{"text": "more", "id": 3}])
    with pytest.raises(CorpusError, match=r"has (plain text|columns text, id), and --chat asks for conversations"):
        list(read_documents([str(tmp_path / name)], chat=True))


def test_numbers_of_a_tool_are_kept(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 12, "b": 0.5, "c": 10**400, "d": True}}}
    write(tmp_path, "a.jsonl", [{"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}])
    [chat] = read_documents([str(tmp_path / "a.jsonl")], chat=None)
    assert isinstance(chat, Conversation)
    arguments = chat.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"a": 12, "b": 0.5, "c": float("inf"), "d": True}
