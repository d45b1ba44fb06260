"""Conversations of the web page without the page: memory, limits, several models, votes."""

import json
import struct
import zlib

import pytest
from tiny_models import save_llava
from web_parts import GREEDY, ask, image_files, served_model

from transformers_minigpt4.inference.chat import Chat
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.serving import web_conversations
from transformers_minigpt4.serving.web_conversations import Conversations
from transformers_minigpt4.serving.web_feedback import Feedback
from transformers_minigpt4.serving.web_images import Limits
from transformers_minigpt4.serving.web_server import WebSettings


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def loaded_llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return load_model_and_processor(str(folder), device="cpu")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.fixture
def files(tmp_path):
    return image_files(tmp_path, 3)


@pytest.fixture
def conversations(loaded, folder):
    return Conversations([served_model(loaded, "tiny")], folder, memory=2**30)


def talk(conversation, files) -> list[str]:
    return [
        *ask(conversation, "What is this?", files[:2]),
        *ask(conversation, "And this?", files[2:]),
        *ask(conversation, "Why?"),
    ]


def test_answers_are_those_of_the_chat(loaded, conversations, files):
    chat = Chat(*loaded, parameters=GREEDY)
    expected = [chat.ask("What is this?", files[:2]), chat.ask("And this?", files[2:]), chat.ask("Why?")]
    assert talk(conversations.new(), files) == expected


def test_what_is_dropped_is_read_again(loaded, folder, files):
    """With no memory at all each question reads everything again, and the answers stay the same."""
    kept = talk(Conversations([served_model(loaded, "tiny")], folder, memory=2**30).new(), files)
    small = Conversations([served_model(loaded, "tiny")], folder, memory=0)
    conversation, answers = small.new(), []
    for question, images in (("What is this?", files[:2]), ("And this?", files[2:]), ("Why?", [])):
        answers += ask(conversation, question, images)
        assert conversation.memory > 0
        small.shrink()
        assert conversation.memory == 0
    assert answers == kept
    for _ in conversation.regenerate(GREEDY):
        pass
    assert conversation.exchanges[-1].answers == kept[2:]


def test_the_conversation_that_was_idle_the_longest_is_dropped(conversations, files):
    first, second = conversations.new(), conversations.new()
    for conversation in (first, second):
        ask(conversation, "What is this?", files[:1])
    conversations.memory = first.memory + second.memory
    conversations.shrink()
    assert first.memory and second.memory
    assert conversations.find(first.key) is first
    conversations.memory -= 1
    conversations.shrink()
    assert first.memory and not second.memory


def test_the_oldest_of_too_many_is_forgotten(conversations, files, monkeypatch):
    monkeypatch.setattr(web_conversations, "_MOST", 2)
    first = conversations.new()
    ask(first, "What is this?", files[:1])
    assert any(first.folder.iterdir())
    conversations.new()
    conversations.new()
    assert conversations.find(first.key) is None and not first.folder.exists()


def test_a_question_is_taken_back_and_answered_again(conversations, files):
    conversation = conversations.new()
    answers = talk(conversation, files)
    assert conversation.take_back().question == "Why?"
    assert ask(conversation, "Why?") == answers[2:]
    taken = [conversation.take_back() for _ in range(3)]
    assert taken[2].files[0].read_bytes() == files[0].read_bytes()
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        conversation.take_back()
    assert talk(conversation, files) == answers


def test_stopping_keeps_what_was_said(conversations, files):
    conversation = conversations.new()
    asking = conversation.ask("What is this?", files[:1], {**GREEDY, "max_new_tokens": 400, "min_new_tokens": 400})
    for _ in asking:
        if conversation.exchanges[0].answers[0]:
            conversation.stop()
            with pytest.raises(RuntimeError, match="wait, or stop"):
                conversation.take_back()
    said = conversation.exchanges[0].answers[0]
    assert said and not conversation.is_answering and len(said.split()) < 400
    assert ask(conversation, "Why?")[0]
    leaving = conversation.ask("And now?", [], {**GREEDY, "max_new_tokens": 400, "min_new_tokens": 400})
    next(leaving)
    leaving.close()  # the tab was closed
    assert not conversation.is_answering


def test_several_models_answer_next_to_each_other(loaded, loaded_llava, folder, files):
    served = [served_model(loaded, "tiny"), served_model(loaded_llava, "llava")]
    conversation = Conversations(served, folder, memory=2**30).new()
    first, second = ask(conversation, "What is this?", files[:1]), ask(conversation, "Why?")
    for number, (model, processor) in enumerate((loaded, loaded_llava)):
        chat = Chat(model, processor, parameters=GREEDY)
        assert [chat.ask("What is this?", files[:1]), chat.ask("Why?")] == [first[number], second[number]]


def test_if_one_model_fails_the_question_was_not_asked(loaded, loaded_llava, folder, files, monkeypatch):
    served = [served_model(loaded, "tiny"), served_model(loaded_llava, "llava")]
    conversation = Conversations(served, folder, memory=2**30).new()
    first = ask(conversation, "What is this?", files[:1])
    with monkeypatch.context() as patch:
        patch.setattr(loaded_llava[0], "generate", lambda **kwargs: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            ask(conversation, "Why?")
        with pytest.raises(RuntimeError, match="no memory"):
            list(conversation.regenerate(GREEDY))
    assert [exchange.question for exchange in conversation.exchanges] == ["What is this?"]
    assert conversation.exchanges[0].answers == first
    again = Conversations(served, folder, memory=2**30).new()
    ask(again, "What is this?", files[:1])
    assert ask(conversation, "Why?") == ask(again, "Why?")


def test_a_blind_conversation_is_with_two_of_the_models(loaded, folder):
    served = [served_model(loaded, name) for name in ("a", "b", "c")]
    conversations = Conversations(served, folder, memory=0, blind=True)
    drawn = {tuple(one.name for one in conversations.new().served) for _ in range(200)}
    assert len(drawn) == 6  # each pair, in both orders
    assert not conversations.new().revealed and conversations.columns == 2


# --- limits ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    "name,content,told",
    [
        ("bomb.png", png_header(40_000, 40_000), "'bomb.png'.* more than .* pixels"),
        ("large.png", png_header(8_000, 8_000), "'large.png' has 64,000,000 pixels, but 50 million is the most"),
        ("short.png", png_header(100, 100), "'short.png' cannot be used: the file is broken or cut short"),
        ("<b>\u202egnp.exe", b"MZ", "'<b>gnp.exe' cannot be used: it is not an image"),
        ("empty.png", b"", "it is empty"),
    ],
)
def test_images_beyond_the_limits_are_refused_by_name(conversations, tmp_path, name, content, told):
    conversation = conversations.new()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as raised:
        ask(conversation, "What is this?", [tmp_path / name])
    assert str(tmp_path) not in str(raised.value)
    assert conversation.exchanges == [] and not conversation.is_answering


def test_other_limits(loaded, folder, files):
    limits = Limits(images=2, characters=50, pixels=10_000, all_pixels=3 * 60 * 48, new_tokens=3)
    conversation = Conversations([served_model(loaded, "tiny")], folder, 2**30, limits=limits).new()
    for question, images, told in (
        (" ", (), "the message has no text"),
        ("?" * 51, (), "has 51 characters, but 50"),
        ("Which?", files, "has 3 images, but 2"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(conversation, question, images)
    ask(conversation, "What is this?", files[:2], max_new_tokens=1_000)
    assert conversation.exchanges[0].parameters["max_new_tokens"] == 3
    with pytest.raises(ValueError, match="11,520 pixels together"):
        ask(conversation, "What is this?", files[:2])
    with pytest.raises(ValueError, match="temperature cannot be"):
        ask(conversation, "Why?", temperature=float("nan"))
    assert len(conversation.exchanges) == 1


# --- votes and settings ---


def test_votes_and_flags_are_records_with_images(conversations, files, tmp_path):
    conversation = conversations.new()
    answers = talk(conversation, files)
    feedback = Feedback(tmp_path / "feedback")
    feedback.vote(conversation, "A")
    feedback.flag(conversation, "wrong \ud800 colour")
    vote, flag = (json.loads(line) for line in (tmp_path / "feedback" / "feedback.jsonl").read_text().splitlines())
    assert (vote["type"], vote["best"], vote["blind"]) == ("vote", "A", False)
    assert vote["models"] == {"A": "checkpoints/tiny"}
    assert [turn["question"] for turn in vote["turns"]] == ["What is this?", "And this?", "Why?"]
    assert [turn["answers"]["A"] for turn in vote["turns"]] == answers
    assert vote["turns"][0]["parameters"]["do_sample"] is False
    assert (flag["type"], flag["reason"]) == ("flag", "wrong ? colour")
    for name, path in zip([*vote["turns"][0]["images"], *vote["turns"][1]["images"]], files):
        assert (tmp_path / "feedback" / name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "feedback" / "images").iterdir())) == 3


@pytest.mark.parametrize(
    "settings,checkpoints,told",
    [
        ({"everywhere": True}, ["a"], "--listen lets other machines use the page and needs a password"),
        ({"credentials": "anna"}, ["a"], "--auth is not USER:PASSWORD"),
        ({"credentials": ":x"}, ["a"], "--auth is not USER:PASSWORD"),
        ({"blind": True}, ["a"], "--blind compares two checkpoints or more, but 1 was given"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, checkpoints, told):
    with pytest.raises(ValueError, match=told):
        WebSettings(tmp_path, **settings).check(checkpoints)
