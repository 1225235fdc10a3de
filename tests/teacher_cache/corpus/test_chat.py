"""Which tokens of a conversation are learnt, against pieces that are tokenised one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from teacher_cache.corpus.chat import ChatEncoder
from teacher_cache.corpus.conversations import Chat, Completion, Conversation, Message
from teacher_cache.corpus.frame import RowFrame
from teacher_cache.errors import CorpusError, TeacherError

EOS = 3
PLAIN = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' + message['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<eos>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
# the end of the turn outside of the marks
HALF_MARKED = MARKED.replace("+ '<eos>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<eos>\n' }}")

Pieces = Sequence[tuple[str, bool]]


def talk(*contents: str, first: str = "user", system: str | None = None) -> list[Message]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    said = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def encode(tokenizer: PreTrainedTokenizerBase, *chats: Chat | list[Message], notes: list[str] | None = None):
    """(id, learnt) of each token, for each conversation."""
    encoder = ChatEncoder(tokenizer, RowFrame.of(tokenizer, causal=True))
    whole = [Conversation(messages=one, origin="here") if isinstance(one, list) else one for one in chats]
    documents = [document for batch in encoder.encode(whole) for document in batch]
    encoder.tell((notes if notes is not None else []).append)
    for ids, learnt in documents:
        assert (ids.dtype, learnt.dtype) == (np.int32, np.bool_)
    return [list(zip(ids.tolist(), learnt.tolist(), strict=True)) for ids, learnt in documents]


def by_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> list[tuple[int, bool]]:
    """The tokens of each piece by itself; special tokens and line breaks keep pieces apart here."""
    return [(one, said) for text, said in pieces for one in tokenizer(text, add_special_tokens=False)["input_ids"]]


def pieces_of(messages: list[Message], learnt_from: int = 0) -> Pieces:
    pieces = []
    for at, message in enumerate(messages):
        said = message["role"] == "assistant" and at >= learnt_from
        pieces += [
            ("<bos>" + message["role"] + "\n", False),
            (message["content"], said),
            ("<eos>", said),
            ("\n", False),
        ]
    return pieces


@pytest.mark.parametrize("template", [PLAIN, MARKED, HALF_MARKED], ids=["plain", "marked", "half"])
def test_answers_and_the_ends_of_their_turns_are_learnt(template: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer("<bos> $A")
    tokenizer.chat_template = template
    draw, words = random.Random(1), ["the", "cat", "sat", "éü", "<eos>", "<bos>", "\n", "🤖", "assistant", "x" * 40]
    chats = []
    for _ in range(60):
        contents = [" ".join(draw.choices(words, k=draw.choice((0, 1, 2, 12)))) for _ in range(draw.randint(2, 7))]
        if template == HALF_MARKED:  # an answer that says itself the token that ends it has ended
            contents = [text + " cat" if text.rstrip().endswith(">") else text for text in contents]
        chats.append(talk(*contents, system=draw.choice((None, "be brief"))))
    found, notes = encode(tokenizer, *chats), list[str]()
    assert found == [by_pieces(tokenizer, pieces_of(chat)) for chat in chats]
    encode(tokenizer, *chats, notes=notes)
    assert notes == []
    assert found == [one for chat in chats for one in encode(tokenizer, chat)]
    assert sum(said for chat in found for _, said in chat) > 500


@pytest.mark.parametrize("beginning", ["", "\n", "  ", "  {% if true %}yes\n  {% endif %}", "{# what #}\n"])
def test_a_template_with_a_date_writes_all_else_as_before(beginning: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    form = "%F %T %D %R %h %-I %-H %k %l %r %C %d. %B %Y %% %%d"
    written = []
    for date in (repr(datetime(2024, 7, 26).strftime(form)), f"strftime_now({form!r})"):
        tokenizer.chat_template = beginning + "{{ " + date + " + '\n' }}" + PLAIN
        encoder = ChatEncoder(tokenizer, RowFrame.of(tokenizer, causal=True))
        chat = talk("the cat", "sat")
        written.append(encoder._render(Conversation(messages=chat, origin="here"), chat))
    assert written[0] == written[1]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = (
        "{%- macro today(form) %}{{ strftime_now(form) }}{% endmacro -%}"
        "{%- if strftime_now is defined %}{{ today('%A, %-d %B %y') + strftime_now(', %d %b %Y') + '\n' }}{% endif -%}"
    ) + template
    chat = talk("the cat", "sat")
    date = [("Friday, 26 July 24, 26 Jul 2024\n", False)]
    assert encode(tokenizer, chat) == [by_pieces(tokenizer, [*date, *pieces_of(chat)])]


def test_marks_are_those_that_transformers_reads(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = MARKED.replace("{{ '\n' }}", "").replace("+ '<eos>' }}", "+ '<eos>\n' }}")
    chat = talk("what is it", "a cat ", "and that", "", system="be brief")
    whole = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    expected = list(zip(whole["input_ids"], map(bool, whole["assistant_masks"]), strict=True))
    # this template counts the line break after the turn as part of it
    assert expected[-1] == (tokenizer.convert_tokens_to_ids("\n"), True)
    assert encode(tokenizer, chat) == [expected]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_of_prompt_and_completion_the_completion_alone_is_learnt(template: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = template
    chat = talk("one", "two", "three", "four")
    for learnt_from in (0, 2, 3):
        [found] = encode(tokenizer, Conversation(messages=chat, origin="here", learnt_from=learnt_from))
        assert found == by_pieces(tokenizer, pieces_of(chat, learnt_from))


def test_plain_completions_begin_and_end_as_documents(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer("<bos> $A")
    pairs = [("the cat", " sat"), ("the cat\n", "sat on it"), ("", "sat"), ("the cat", ""), ("the cat", " sat<eos>")]
    found = encode(tokenizer, *(Completion(prompt=one, completion=two, origin="here") for one, two in pairs))
    for document, (prompt, completion) in zip(found, pairs, strict=True):
        pieces = [("<bos>", False), (prompt, False), (completion.removesuffix("<eos>"), True), ("<eos>", True)]
        assert document == by_pieces(tokenizer, pieces)


def test_a_token_across_the_border_of_a_prompt_is_learnt(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    [found] = encode(tokenizer, Completion(prompt="the cat ", completion="sat", origin="here"))
    whole = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    before = len(tokenizer("the cat", add_special_tokens=False)["input_ids"])
    assert found == [*((one, at >= before) for at, one in enumerate(whole)), (EOS, True)]


def test_white_space_that_a_tokenizer_leaves_out_of_offsets(causal_tokenizer) -> None:
    """As byte-level tokenizers of the Llama 3 family do: a line break stands for nothing, behind itself."""
    from teacher_cache.corpus.chat import _said

    # "a\n" "b" "\n" "c" "<e>" "\n", of which "b\nc<e>" is learnt
    offsets = np.array([[0, 1], [2, 2], [2, 3], [4, 4], [4, 5], [5, 8], [9, 9]])
    assert _said(offsets, [(2, 8)]).tolist() == [False, False, True, True, True, True, False]


def test_what_is_left_out_or_endless_is_said(causal_tokenizer) -> None:
    tokenizer, notes = causal_tokenizer(), list[str]()
    tokenizer.chat_template = PLAIN
    chats = [talk("one"), talk("one", "two"), talk("zero", "one", "two", first="assistant")]
    found = encode(tokenizer, *chats, notes=notes)
    assert notes == ["1 of 3 conversations have no answer to learn, and are left out"]
    assert found[1] == by_pieces(tokenizer, pieces_of(chats[2]))  # this template can write no messages at all
    tokenizer.chat_template = "{% if messages[0].role == 'user' %}{% endif %}" + PLAIN
    notes.clear()
    [found] = encode(tokenizer, chats[2], notes=notes)
    assert notes == ["1 conversations begin with an answer, which is read and not learnt"]
    assert found == by_pieces(tokenizer, pieces_of(chats[2], learnt_from=1))
    tokenizer.chat_template = PLAIN.replace("'<eos>\n'", "'\n\n'")
    notes.clear()
    [found] = encode(tokenizer, talk("one", "two"), notes=notes)
    assert notes[0].startswith("1 of 1 answers end in no special token")
    assert [said for _, said in found[-3:]] == [True, True, True]  # two line breaks are how a turn ends here


def test_a_turn_that_the_next_message_ends(causal_tokenizer) -> None:
    tokenizer, notes = causal_tokenizer(), list[str]()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ ('<eos>' if message['role'] == 'user' and not loop.first else '') + '<bos>' + "
        "message['role'] + '\n' + message['content'] }}{% endfor %}{{ '<bos>assistant\n' if add_generation_prompt }}"
    )
    [found] = encode(tokenizer, talk("one", "two", "three"), notes=notes)
    pieces = [("<bos>user\n", False), ("one", False), ("<bos>assistant\n", False), ("two", True), ("<eos>", True)]
    assert found == by_pieces(tokenizer, [*pieces, ("<bos>user\n", False), ("three", False)])
    assert notes == []


# ---- what is refused ------------------------------------------------------------------------------------------------

FORGETFUL = PLAIN.replace(
    "message['content'] +", "(('<unk>' if loop.last and message['role'] == 'assistant' else '') + message['content']) +"
)
THINKING = PLAIN.replace("'<bos>assistant\n'", "'<bos>assistant\n<unk>'")


@pytest.mark.parametrize("template", [FORGETFUL, THINKING], ids=["forgetful", "thinking"])
def test_templates_that_rewrite_what_was_said_are_refused(template: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(CorpusError, match=r"here: the chat template .* message 2 otherwise .*'<unk>.*% generation %"):
        encode(tokenizer, talk("one", "two", "three", "four"))


def test_a_template_that_rewrites_but_marks_is_read(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = FORGETFUL.replace("{{ '<bos>'", "{% generation %}{{ '<bos>'", 1).replace(
        "'<eos>\n' }}{% endfor", "'<eos>\n' }}{% endgeneration %}{% endfor", 1
    )
    [found] = encode(tokenizer, talk("one", "two"))
    assert all(said for _, said in found)
    with pytest.raises(CorpusError, match="writes the prompt otherwise once the completion follows"):
        encode(tokenizer, Conversation(messages=talk("one", "two", "a", "b"), origin="here", learnt_from=2))


def test_what_a_template_does_not_write_is_named(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users and assistants') }}" + PLAIN
    with pytest.raises(CorpusError, match=r"here: .*only users and assistants; its roles: user, assistant"):
        encode(tokenizer, talk("one", "two"))
    tokenizer.chat_template = PLAIN
    with pytest.raises(CorpusError, match="here: the chat template .* does not write this conversation"):
        encode(tokenizer, [*talk("one"), {"role": "assistant", "tool_calls": [{"name": "add"}]}])


def test_no_answers_no_template_no_offsets(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    with pytest.raises(TeacherError, match="has no chat template, and here is a conversation"):
        encode(tokenizer, talk("one", "two"))
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(TeacherError, match="has no chat template"):
        encode(tokenizer, talk("one", "two"))
    tokenizer.chat_template = PLAIN
    with pytest.raises(CorpusError, match="none of the 2 conversations of the corpus has an answer"):
        encode(tokenizer, talk("one"), talk("two"))
    with pytest.raises(TeacherError, match="is one in Python"):
        ChatEncoder(ByT5Tokenizer(), RowFrame(prefix=(), suffix=(), separator=1, ending=(1,), padding=0))


@pytest.mark.parametrize("text, words", [("a\0b", "NUL character"), ("a\ud83eb", "half a character")])
def test_text_that_is_none_is_refused(text: str, words: str, causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(CorpusError, match=f"here holds (a )?{words}"):
        encode(tokenizer, talk("one", text))
    with pytest.raises(CorpusError, match=words):
        encode(tokenizer, Completion(prompt=text, completion="b", origin="here"))


def test_tools_reach_the_template(causal_tokenizer) -> None:
    tokenizer = causal_tokenizer()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools[0]['name'] + '\n' }}" + PLAIN}
    chat = talk("one", "two")
    [found] = encode(tokenizer, Conversation(messages=chat, origin="here", tools=[{"name": "add"}]))
    assert found == by_pieces(tokenizer, [("add\n", False), *pieces_of(chat)])
    assert encode(tokenizer, chat) == [by_pieces(tokenizer, pieces_of(chat))]
