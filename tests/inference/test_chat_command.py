"""Checks `minigpt4 chat`: piped, in a terminal with and without prompt-toolkit, Ctrl-C, and every slash command."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageGrab
from tiny_models import drawn_image, save_blip2
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from transformers_minigpt4 import cli
from transformers_minigpt4.inference.chat import PRESETS, Chat
from transformers_minigpt4.inference.chat_session import ChatSession
from transformers_minigpt4.inference.loading import load_model_and_processor


@pytest.fixture(autouse=True)
def loud_libraries():
    """Give the other tests the messages back that the command silences."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "my photo.jpg"
    drawn_image(1).save(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


def minigpt4(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


class TestPiped:
    def test_only_answers_are_printed(self, tiny, tiny_checkpoint, photo):
        options = ("--greedy", "--max-new-tokens", 8, "--device", "cpu")
        result = minigpt4("chat", tiny_checkpoint, "--image", photo, *options, stdin="What is it?\n\nAnd now?")
        chat = Chat(*tiny, parameters={**PRESETS["greedy"], "max_new_tokens": 8})
        answers = [chat.ask("What is it?", [photo]), chat.ask("And now?")]
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == "".join(f"{answer}\n" for answer in answers)

    def test_samples_as_the_authors_do_by_default(self, tiny_checkpoint, tmp_path):
        path = tmp_path / "chat.json"
        options = ("--system", "Look.", "--max-new-tokens", 2)
        assert minigpt4("chat", tiny_checkpoint, *options, stdin=f"Hello?\n/save '{path}'").exit_code == 0
        saved = json.loads(path.read_text())
        assert saved["parameters"] == {**PRESETS["authors"], "max_new_tokens": 2} and saved["system"] == "Look."

    def test_stops_at_the_first_error(self, tiny_checkpoint):
        result = minigpt4("chat", tiny_checkpoint, "--max-new-tokens", 2, stdin="/image gone.png\nWhat is it?\n")
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith("minigpt4: cannot load image 'gone.png'") and result.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image", "gone.png"], "cannot load image 'gone.png'"),
            ([], "standard input has no question"),
            (["--device", "gpu"], "cannot use the device 'gpu'"),
        ],
    )
    def test_errors_are_one_line(self, tiny_checkpoint, arguments, message):
        result = minigpt4("chat", tiny_checkpoint, *arguments, stdin="\n")
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"minigpt4: {message}")

    def test_without_a_checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
        result = minigpt4("chat", stdin="What?\n")
        assert result.exit_code == 1 and "run `minigpt4 demo` to create one, or name a checkpoint" in result.stderr

    def test_checkpoint_without_chat_template(self, tmp_path):
        save_blip2(tmp_path)
        result = minigpt4("chat", tmp_path, stdin="What?\n")
        assert result.exit_code == 1 and "Blip2Processor has no chat template" in result.stderr


class TestSlashCommands:
    @pytest.fixture
    def session(self, tiny) -> ChatSession:
        self.shown: list[str] = []
        self.notes: list[str] = []
        chat = Chat(*tiny, parameters={**PRESETS["greedy"], "max_new_tokens": 5}, read_ahead=False)
        return ChatSession(chat, self.shown.append, self.notes.append, prepare=True)

    def test_image(self, session, photo):
        assert session.enter(f"/image '{photo}' \"{photo}\"")
        assert self.notes == ["2 images for the next question"]
        with pytest.raises(ValueError, match="cannot load image"):
            session.enter(f"/image '{photo}' gone.png")
        assert len(session.images) == 2
        session.enter("What are these?")
        assert len(session.chat.turns[0].images) == 2 and session.images == []
        assert "".join(self.shown) == session.chat.turns[0].answer + "\n"

    @pytest.mark.parametrize("kind", ["image", "files", "nothing", "none"])
    def test_image_on_the_clipboard(self, session, photo, monkeypatch, kind):
        def grabbed():
            if kind == "none":
                raise NotImplementedError("wl-paste or xclip is required")
            return {"image": Image.new("RGBA", (4, 4)), "files": [str(photo)], "nothing": None}[kind]

        monkeypatch.setattr(ImageGrab, "grabclipboard", grabbed)
        if kind in ("image", "files"):
            session.enter("/image")
            assert [image.mode for image in session.images] == ["RGB"]
        else:
            with pytest.raises(ValueError, match=r"clipboard.*name files after /image"):
                session.enter("/image")

    def test_regenerate_undo_and_reset(self, session, photo):
        for line in ("Hello?", "/regenerate", "And now?"):
            session.enter(line)
        assert [turn.question for turn in session.chat.turns] == ["Hello?", "And now?"]
        assert self.shown.count("\n") == 3
        session.enter("/undo")
        assert self.notes == ["took back: And now?"] and len(session.chat.turns) == 1
        session.enter(f"/image '{photo}'")
        session.enter("/reset")
        assert session.chat.turns == [] and session.images == []
        for line in ("/undo", "/regenerate"):
            with pytest.raises(ValueError, match="nothing has been asked"):
                session.enter(line)

    def test_system(self, session):
        for line in ("/system", "/system Look closely.", '/system ""'):
            session.enter(line)
        assert [note.partition(": ")[2] for note in self.notes] == [
            "that of the chat template",
            "'Look closely.'",
            "''",
        ]
        assert session.enter("Hello?") and session.chat.messages()[0]["role"] == "system"

    def test_params(self, session):
        session.enter("/params authors temperature=0.5")
        assert session.chat.parameters == {**PRESETS["authors"], "temperature": 0.5}
        assert "temperature=0.5" in self.notes[0]
        for words in ("temperature", "temperature=hot", "beams=3", "'"):
            with pytest.raises(ValueError, match=r"temperature|beams|quotation"):
                session.enter(f"/params {words}")
        assert session.chat.parameters["temperature"] == 0.5

    def test_save_and_load(self, session, photo, tmp_path):
        path = tmp_path / "my chat.json"
        for line in (f"/image '{photo}'", "Hello?", f"/save '{path}'", "And now?", f"/save '{path}'"):
            session.enter(line)
        turns = session.chat.turns
        for line in ("/reset", f"/load '{path}'"):
            session.enter(line)
        assert [turn.question for turn in session.chat.turns] == ["Hello?", "And now?"]
        assert self.notes[-2:] == [
            f"[1 image] > Hello?\n{turns[0].answer}",
            f"> And now?\n{turns[1].answer}",
        ]
        session.enter(f"/save '{path}'")
        before = photo.read_bytes()
        with pytest.raises(ValueError, match="exists already"):
            session.enter(f"/save '{photo}'")
        assert photo.read_bytes() == before
        for line in ("/save", "/save a b", "/load"):
            with pytest.raises(ValueError, match="takes one file"):
                session.enter(line)

    def test_help_names_every_command(self, session):
        session.enter("/help")
        assert all(f"\n{name} " in f"\n{self.notes[0]}" for name in session._commands)

    def test_leaving_and_unknown_commands(self, session):
        assert not session.enter("/quit") and not session.enter("/exit ")
        with pytest.raises(ValueError, match=r"no command /imgae; /help lists"):
            session.enter("/imgae a.png")
        assert session.enter(" /home is what?") and session.chat.turns[0].question == "/home is what?"

    def test_ctrl_c_while_the_next_turn_is_prepared(self, session, monkeypatch):
        monkeypatch.setattr(session.chat, "prepare", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert session.enter("Hello?") and session.chat.turns[0].answer


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("editor", ["prompt_toolkit", "input"])
def test_in_a_terminal(tiny_checkpoint, photo, tmp_path, editor):
    import pexpect

    start = "import sys; from transformers_minigpt4.cli import main; "
    if editor == "input":
        start += "sys.modules['prompt_toolkit'] = None; "
    words = ["chat", tiny_checkpoint, "--greedy", "--image", str(photo), "--device", "cpu"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = pexpect.spawn(
        sys.executable,
        ["-c", f"{start}sys.argv[:] = {['minigpt4', *words]!r}; main()"],
        env=environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 200),
    )
    # What each prompt begins with; keys that are pressed before may be lost.
    prompt = "2004h" if editor == "prompt_toolkit" else "> "

    def enter(line: str, reply: str) -> None:
        terminal.expect(prompt)
        terminal.sendline(line)
        terminal.expect(reply)

    try:
        terminal.expect("Ctrl-D leaves")
        enter("/params min_new_tokens=1500 max_new_tokens=1500", "repetition_penalty=1.0, min_new_tokens=1500")
        for _ in range(2):  # the second Ctrl-C must not end the program either
            enter("What is it?", r"What is it\?[^\n]*\n.*\w+ \w+ ")
            terminal.sendintr()
            terminal.expect("stopped; /regenerate answers again")
        enter("/params min_new_tokens=1 max_new_tokens=3", "repetition_penalty=1.0, min_new_tokens=1, ")
        enter("/gone", "minigpt4: there is no command /gone")
        enter(f"/save '{tmp_path / 'chat.json'}'", "saved in")
        terminal.expect(prompt)
        # Python's `input` can miss a Ctrl-C at the moment when it begins to wait.
        for _ in range(5):
            terminal.sendintr()
            if terminal.expect(["Ctrl-D or /quit leaves", pexpect.TIMEOUT], timeout=5) == 0:
                break
        else:
            pytest.fail("Ctrl-C at the prompt shows nothing")
        terminal.expect(prompt)
        terminal.sendeof()
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert (terminal.exitstatus, terminal.signalstatus) == (0, None)
    finally:
        terminal.close(force=True)
    turns = json.loads((tmp_path / "chat.json").read_text())["turns"]
    assert [len(turn["images"]) for turn in turns] == [1, 0] and all(turn["answer"] for turn in turns)
    history = tmp_path / "minigpt4-chat" / "history"
    assert history.exists() == (editor == "prompt_toolkit")
    assert editor == "input" or "+What is it?" in history.read_text().splitlines()
