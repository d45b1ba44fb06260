"""Describing in turns: the second turn from the first one's cache, resuming, changed prompts, and lost images."""

import shutil
from dataclasses import replace

import pytest
import torch
from histories import history
from PIL import Image

from transformers_minigpt4.curation import generate
from transformers_minigpt4.curation import turns as in_turns
from transformers_minigpt4.curation.config import CONTINUE_PROMPT, PROMPT, CurationConfig
from transformers_minigpt4.curation.generate import run_generate
from transformers_minigpt4.curation.settings_file import CurationError
from transformers_minigpt4.curation.store import Project
from transformers_minigpt4.curation.turns import answer_lengths, describe_in_turns
from transformers_minigpt4.inference.engines import TransformersEngine


COLORS = ("red", "green", "blue", "white", "black", "yellow", "purple")
AUTHORS_PROMPT = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: "
AUTHORS_CONTINUE = "###Human: Continue ###Assistant: "


def plain(colors=COLORS):
    return [Image.new("RGB", (60, 60), color) for color in colors]


def config(**changes):
    return replace(CurationConfig("folder", "checkpoint", max_new_tokens=12, continue_below=8), **changes)


def ends_early(model):
    """End marks among the ids that the golden model says, of one id and of two, so that answers have many lengths."""
    model.generation_config.eos_token_id = [2, 197, 526, 787]
    model.generation_config.stop_sequences = [[448, 733], [1188, 1040]]


def uncached(image, model, processor, settings):
    """Both turns of one image by itself, the second computed from the start."""
    first = processor(images=[[image]], text=[settings.prompt], return_tensors="pt")
    pixels, prompt = first["pixel_values"], first["input_ids"]
    arguments = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}

    def answer(ids):
        sequences = model.generate(input_ids=ids, pixel_values=pixels, **arguments)
        new = sequences[:, ids.shape[1] :]
        return new[:, : answer_lengths(new, model.generation_config)]

    said = answer(prompt)
    turns = [said]
    if said.shape[1] <= settings.continue_below:
        turn = processor.tokenizer(settings.continue_prompt, add_special_tokens=False, return_tensors="pt")
        turns.append(answer(torch.cat([prompt, said, turn["input_ids"]], dim=1)))
    return tuple(turns)


@pytest.mark.parametrize("prompts", [(PROMPT, CONTINUE_PROMPT), (AUTHORS_PROMPT, AUTHORS_CONTINUE)])
@pytest.mark.parametrize(("most", "below"), [(12, 8), (6, 80)], ids=["some continue", "all continue, some cut off"])
def test_the_cached_second_turn_is_the_uncached_one(model, processor, prompts, most, below, monkeypatch):
    ends_early(model)
    settings = config(prompt=prompts[0], continue_prompt=prompts[1], max_new_tokens=most, continue_below=below)
    expected = [uncached(image, model, processor, settings) for image in plain()]
    lengths = [said[0].shape[1] for said in expected]
    assert len(set(lengths)) > 2, "the batch is to have answers of several lengths"
    assert min(lengths) <= below and (max(lengths) == most)

    said = []  # ids of both turns, as `describe_in_turns` decodes them
    decode = in_turns.decode_answers
    monkeypatch.setattr(in_turns, "decode_answers", lambda _, answers: said.append(answers) or decode(_, answers))
    found = describe_in_turns(plain(), TransformersEngine(model, processor), settings)
    continued = [row for row, turns in enumerate(expected) if len(turns) == 2]
    for row, turns in enumerate(expected):
        assert [turn.shape[1] for turn in turns] == list(found[row].tokens)
        assert said[0][row, : lengths[row]].tolist() == turns[0][0].tolist()
        if len(turns) == 2:
            second = said[1][continued.index(row)]
            assert second[: turns[1].shape[1]].tolist() == turns[1][0].tolist()
    assert [len(description.turns) for description in found] == [len(turns) for turns in expected]


def test_a_batch_goes_through_the_tower_once(model, processor):
    ends_early(model)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    found = describe_in_turns(plain(), TransformersEngine(model, processor), config())
    assert any(len(description.turns) == 2 for description in found)
    assert seen == [len(COLORS)]


def test_the_prompt_is_the_paper_s():
    assert PROMPT.replace("<ImageHere>", "<ImageFeature>") == (
        "###Human: <Img><ImageFeature></Img>Describe this image in detail. Give as many details as possible. "
        "Say everything you see. ###Assistant:"
    )
    assert CONTINUE_PROMPT == "###Human: Continue ###Assistant:"


def test_answer_lengths_stop_at_the_first_mark(model):
    model.generation_config.eos_token_id = 2
    model.generation_config.stop_sequences = [[5, 6]]
    answers = torch.tensor([[9, 5, 6, 0], [9, 9, 9, 9], [2, 0, 0, 0], [5, 9, 2, 0], [9, 9, 9, 5]])
    assert answer_lengths(answers, model.generation_config).tolist() == [1, 4, 0, 2, 4]
    assert answer_lengths(answers[:, :1], model.generation_config).tolist() == [1, 1, 0, 1, 1]


def test_other_families_go_by_their_chat_template(model, processor):
    ends_early(model)
    asked = config(prompt="Describe this image.", continue_prompt="Continue", continue_below=80)
    found = describe_in_turns(plain()[:3], TransformersEngine(model, processor), asked)
    assert all(len(description.turns) == 2 for description in found)
    assert {
        len(d.turns)
        for d in describe_in_turns(plain()[:3], TransformersEngine(model, processor), replace(asked, continue_below=0))
    } == {1}


class IdsEngine:
    """An engine that, like the one with vLLM, takes ids and gives ids with their end mark; one image at a time."""

    batch_size, device, dtype = 2, "cpu", "float32"

    def __init__(self, model, processor):
        self.model, self.processor, self.generation_config = model, processor, model.generation_config
        self.options = []

    def answer_ids(self, requests, **options):
        self.options.append(options)
        for request in requests:
            inputs = self.processor(images=list(request.images), text=PROMPT, return_tensors="pt")
            token, count = self.processor.image_token_id, self.processor.image_seq_length
            ids = [one for id_ in request.ids for one in ([token] * count if id_ == token else [id_])]
            arguments = {name: value for name, value in options.items() if name != "seed"}
            ids = self.model.generate(input_ids=torch.tensor([ids]), pixel_values=inputs["pixel_values"], **arguments)[
                0, len(ids) :
            ]
            yield ids.tolist()


@pytest.mark.parametrize("prompts", [(PROMPT, CONTINUE_PROMPT), (AUTHORS_PROMPT, AUTHORS_CONTINUE)])
def test_an_engine_that_takes_ids_gives_the_same(model, processor, prompts):
    ends_early(model)
    settings = config(prompt=prompts[0], continue_prompt=prompts[1])
    engine = IdsEngine(model, processor)
    found = describe_in_turns(plain(), engine, settings)
    assert found == describe_in_turns(plain(), TransformersEngine(model, processor), settings)
    assert {len(description.turns) for description in found} == {1, 2}
    assert len(describe_in_turns(plain()[:2], engine, replace(settings, continue_below=0))) == 2
    describe_in_turns(plain()[:1], engine, replace(settings, do_sample=True, seed=7))
    assert [options.get("seed") for options in engine.options[-2:]] == [7, 7]
    assert not any("seed" in options for options in engine.options[:-2])


@pytest.fixture
def folder(tmp_path):
    """Seven images."""
    made = tmp_path / "images"
    made.mkdir()
    for color, image in zip(COLORS, plain()):
        image.save(made / f"{color}.png")
    return made


@pytest.fixture
def settings(folder, tiny_checkpoint):
    return CurationConfig(
        str(folder), tiny_checkpoint, images=7, batch_size=3, max_new_tokens=4, continue_below=2, dtype="float32"
    )


def texts(project):
    return {pair.key: text for pair, text in project.texts("filter")}


def test_a_stopped_run_resumes_with_the_batch_it_was_at(settings, tmp_path, monkeypatch):
    with Project.create(tmp_path / "whole", settings) as project:
        assert "7 images sampled, 7 of them now\n7 described" in str(run_generate(project, settings, False))
        whole = texts(project)

    described = generate.describe_in_turns
    calls = []

    def stopped(*arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return described(*arguments)

    monkeypatch.setattr(generate, "describe_in_turns", stopped)
    with Project.create(tmp_path / "stopped", settings) as project:
        with pytest.raises(KeyboardInterrupt):
            run_generate(project, settings, False)
        assert len(texts(project)) == 3
        run_generate(project, settings, False)
        assert calls == [3, 3, 3, 1]
        assert texts(project) == whole
        monkeypatch.setattr(generate, "load_engine", None)  # nothing to do loads no model
        assert run_generate(project, settings, False).described == 0


def test_the_engine_of_a_run(settings, tmp_path, monkeypatch):
    loaded = []
    load = generate.load_engine

    def stand_in(name, checkpoint, *, batch_size, **options):
        loaded.append((name, batch_size))
        engine = load("transformers", checkpoint, batch_size=batch_size, **options)
        return IdsEngine(engine.model, engine.processor)

    with Project.create(tmp_path / "expected", settings) as project:
        run_generate(project, settings, False)
        expected = texts(project)
    monkeypatch.setattr(generate, "load_engine", stand_in)
    with Project.create(tmp_path / "project", settings) as project:
        run_generate(project, settings, False, "vllm")
        assert texts(project) == expected
        assert loaded == [("vllm", None)]
        assert run_generate(project, settings, False).described == 0  # another engine's answers are the same


def test_a_changed_prompt_touches_all_and_a_changed_batch_size_none(settings, tmp_path):
    with Project.create(tmp_path / "project", settings) as project:
        run_generate(project, settings, False)
        assert run_generate(project, replace(settings, batch_size=5), False).described == 0
        assert run_generate(project, replace(settings, prompt=AUTHORS_PROMPT), False).described == 7
        (pair, *_) = project.pairs()
        assert [step for step, _ in history(project, pair.id)] == ["generate", "generate"]


def test_a_retrained_checkpoint_in_place_is_another_one(settings, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(settings.checkpoint, copy)
    before = generate.generate_settings(replace(settings, checkpoint=str(copy)))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert generate.generate_settings(replace(settings, checkpoint=str(copy))) != before


def test_an_image_deleted_or_damaged_between_the_steps(settings, tmp_path):
    with Project.create(tmp_path / "project", settings) as project:
        generate.sample_images(project, settings, False)
        first, second, *_ = project.pairs()
        project.image_path(first).unlink()
        spoilt = project.image_path(second).read_bytes()
        project.image_path(second).write_bytes(b"no image")
        done = run_generate(project, settings, False)
        assert (done.described, done.failed) == (5, 2)
        assert project.funnel().steps[0].reasons == {"failed": {"missing image": 1, "unreadable image": 1}}
        project.image_path(second).write_bytes(spoilt)
        again = run_generate(project, settings, False)
        assert (again.described, again.failed) == (1, 1)


def test_a_prompt_that_does_not_fit_the_model(settings, model, processor, monkeypatch):
    monkeypatch.setattr(processor, "image_token", "<image>")
    with pytest.raises(CurationError, match="does not know <ImageHere>"):
        describe_in_turns(plain()[:1], TransformersEngine(model, processor), settings)
