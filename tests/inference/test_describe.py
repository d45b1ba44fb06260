"""Checks captioning of many images: order, bad files, load-ahead, other model families, streaming and resume."""

import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_model import GOLDEN
from PIL import Image
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    GenerationConfig,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from transformers_minigpt4.inference.describe import describe
from transformers_minigpt4.inference.engines import TransformersEngine
from transformers_minigpt4.inference.generation import answer_prompts, caption_images
from transformers_minigpt4.inference.loading import load_model_and_processor
from transformers_minigpt4.inference.sources import expand_sources
from transformers_minigpt4.inference.streaming import CaptionStreamer


GREEDY = {"do_sample": False, "max_new_tokens": 6}
COLORS = ("red", "green", "blue", "white", "black")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load_model_and_processor(tiny_checkpoint, device="cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five images that load and, third in order, one that does not."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40 + number, 50), color).save(folder / f"{number}.png")
    (folder / "1b.jpg").write_bytes(b"not an image")
    return folder


class TestExpandSources:
    def test_folders_files_and_urls(self, folder):
        (folder / "sub" / ".hidden").mkdir(parents=True)
        for name in ("sub/z.JPG", "sub/a.webp", ".hidden.png", "sub/.hidden/b.png", "notes.txt", "sub/phone.heic"):
            (folder / name).touch()
        found = expand_sources([f"{folder}/sub/../3.png", "https://host/x?y=1", str(folder), "./gone.png"])
        inside = [
            *("0.png", "1.png", "1b.jpg", "2.png", "3.png", "4.png"),
            *("sub/a.webp", "sub/phone.heic", "sub/z.JPG"),
        ]
        assert found == [
            f"{folder}/sub/../3.png",
            "https://host/x?y=1",
            *(f"{folder}/{n}" for n in inside),
            "gone.png",
        ]

    def test_list_on_stdin(self, folder):
        stdin = io.StringIO(f"b.png\n\nname with blanks.png\r\n{folder}\nhttp://host/a.png")
        found = expand_sources(["a.png", "-", "b.png"], stdin)
        assert found[:3] == ["a.png", "b.png", "name with blanks.png"]
        assert len(found) == 3 + 6 + 1 and found[-1] == "http://host/a.png"

    def test_each_image_once(self, folder):
        assert len(expand_sources([str(folder), str(folder), f"{folder}/0.png"])) == 6

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match="holds no image"):
            expand_sources([str(tmp_path)])

    def test_dash_without_stdin(self):
        with pytest.raises(ValueError, match="standard input"):
            expand_sources(["-"])


class TestDescribe:
    def test_bad_file_keeps_its_place_and_spoils_nothing(self, loaded, folder):
        sources = sorted(folder.iterdir())
        records = list(describe(sources, TransformersEngine(*loaded, batch_size=4), **GREEDY))
        assert [record["image"] for record in records] == [str(source) for source in sources]
        assert [set(record) for record in records] == [{"image", "caption"}] * 2 + [{"image", "error"}] + [
            {"image", "caption"}
        ] * 3
        assert "1b.jpg" in records[2]["error"] and "not an image" in records[2]["error"]
        alone = [next(describe([source], TransformersEngine(*loaded, batch_size=1), **GREEDY)) for source in sources]
        assert alone == records

    def test_batch_of_bad_files_only(self, loaded, tmp_path):
        records = list(
            describe([tmp_path / "a.png", tmp_path / "b.png"], TransformersEngine(*loaded, batch_size=1), **GREEDY)
        )
        assert [set(record) for record in records] == [{"image", "error"}] * 2

    def test_no_images(self, loaded):
        assert list(describe([], TransformersEngine(*loaded))) == []

    def test_prompt_reaches_the_model(self, loaded, folder):
        first, second = (
            next(describe([folder / "0.png"], TransformersEngine(*loaded), prompt=prompt, **GREEDY))["caption"]
            for prompt in ("Describe this image in detail.", "what?")
        )
        assert first != second

    def test_caption_is_the_new_text_alone(self, loaded, folder):
        (record,) = describe([folder / "0.png"], TransformersEngine(*loaded), **GREEDY)
        assert "Describe" not in record["caption"] and "###" not in record["caption"]
        assert record["caption"] == record["caption"].strip()

    def test_sources_without_a_name_are_numbered(self, loaded, folder):
        sources = [folder / "0.png", (folder / "1.png").read_bytes(), Image.new("L", (1, 1))]
        records = list(describe(sources, TransformersEngine(*loaded), **GREEDY))
        assert [record["image"] for record in records] == [str(folder / "0.png"), "#1", "#2"]

    def test_endless_sources_are_read_one_batch_ahead(self, loaded, folder):
        taken = []
        sources = (taken.append(number) or folder / "0.png" for number in count())
        records = describe(sources, TransformersEngine(*loaded, batch_size=2), **GREEDY)
        assert taken == []
        assert len(list(islice(records, 3))) == 3
        assert len(taken) == 6

    def test_stopping_early_does_not_wait_for_a_hanging_download(self, loaded, folder):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
            records = describe([folder / "0.png", url], TransformersEngine(*loaded, batch_size=1), timeout=3, **GREEDY)
            next(records)
            started = time.monotonic()
            records.close()
            assert time.monotonic() - started < 1

    def test_time_out_is_passed_on(self, loaded):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
            (record,) = describe([url], TransformersEngine(*loaded), timeout=0.3)
        assert "longer than 0.3 seconds" in record["error"]

    def test_checkpoints_without_a_length_get_the_authors_limit(self, loaded, folder):
        model, processor = loaded
        limit, model.generation_config.max_new_tokens = model.generation_config.max_new_tokens, None
        streamer = CaptionStreamer(processor, lambda text: None)
        try:
            caption_images([Image.open(folder / "0.png")], model, processor, do_sample=False, streamer=streamer)
        finally:
            model.generation_config.max_new_tokens = limit
        assert 20 < len(streamer.tokens) <= 300

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_bad_batch_size(self, loaded, batch_size):
        with pytest.raises(ValueError, match="at least one image"):
            describe([], TransformersEngine(*loaded, batch_size=batch_size))

    def test_several_answers_a_image_are_refused(self, loaded, folder):
        with pytest.raises(ValueError, match="num_return_sequences"):
            list(
                describe(
                    [folder / "0.png"],
                    TransformersEngine(*loaded),
                    num_return_sequences=2,
                    do_sample=True,
                    max_new_tokens=2,
                )
            )

    def test_more_than_the_answers_is_refused(self, loaded, folder):
        with pytest.raises(ValueError, match="leave out return_dict_in_generate"):
            list(describe([folder / "0.png"], TransformersEngine(*loaded), return_dict_in_generate=True, **GREEDY))


def tiny_llava(tokenizer, image_processor):
    tokenizer.add_tokens("<image>", special_tokens=True)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=56, patch_size=28),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    template = (
        "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image>\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=28,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return LlavaForConditionalGeneration(config), processor


def tiny_blip2(tokenizer, image_processor, text_config):
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "image_size": 56, "patch_size": 28},
        qformer_config={**sizes, "encoder_hidden_size": 32, "vocab_size": 100},
        text_config={**text_config.to_dict(), "vocab_size": len(processor.tokenizer)},
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Blip2ForConditionalGeneration(config), processor


class TestOtherFamilies:
    """Models of other families, saved and loaded through the Auto classes."""

    @pytest.mark.parametrize("family", ["llava", "blip2-opt", "blip2-t5"])
    def test_captions(self, family, folder, tmp_path):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
        tokenizer.pad_token = tokenizer.unk_token
        image_processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if family == "llava":
            model, processor = tiny_llava(tokenizer, image_processor)
        elif family == "blip2-opt":
            sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            text_config = OPTConfig(**sizes, word_embed_proj_dim=32, **special)
            model, processor = tiny_blip2(tokenizer, image_processor, text_config)
        else:
            text_config = T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
            model, processor = tiny_blip2(tokenizer, image_processor, text_config)
        model.save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)

        loaded = load_model_and_processor(str(tmp_path / family), device="cpu")
        records = list(
            describe(
                sorted(folder.iterdir()), TransformersEngine(*loaded, batch_size=4), max_new_tokens=5, do_sample=False
            )
        )
        assert [("error" in record) for record in records] == [False, False, True, False, False, False]
        captions = [record["caption"] for record in records if "caption" in record]
        assert not any("Describe" in caption or "USER" in caption for caption in captions)
        alone = list(
            describe([folder / "0.png"], TransformersEngine(*loaded, batch_size=1), max_new_tokens=5, do_sample=False)
        )
        assert alone[0]["caption"] == captions[0] != ""


class TestSharedProcessor:
    """Answers of one batch start in one column; the processor that other threads use too stays as it is."""

    @pytest.fixture
    def tokenizer(self):
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer", padding_side="right")
        tokenizer.pad_token = tokenizer.unk_token
        return tokenizer

    def test_two_threads(self, tokenizer, folder):
        torch.manual_seed(0)
        model, processor = tiny_llava(tokenizer, BlipImageProcessorPil(size={"height": 56, "width": 56}))
        image = Image.open(folder / "0.png")
        answer = lambda *_: answer_prompts(  # noqa: E731
            [[image]] * 2, ["what?", "Describe this image in detail."], model, processor, **GREEDY
        )
        expected, sides = answer(), set()
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(answer) for _ in range(6)]
            while not all(future.done() for future in running):
                sides.add(processor.tokenizer.padding_side)
        assert [future.result() for future in running] == [expected] * 6
        assert sides == {"right"}

    def test_the_second_tokenizer_keeps_its_side(self, tokenizer, folder):
        """InstructBLIP's Q-Former counts positions from the left."""
        second = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer", padding_side="right", pad_token="<unk>")
        image_processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
        processor = InstructBlipProcessor(image_processor, tokenizer, second, num_query_tokens=2)
        inputs = {}

        def generate(**kwargs):
            inputs.update(kwargs)
            return torch.ones(2, 1, dtype=torch.long)

        model = SimpleNamespace(
            device="cpu", dtype=torch.float32, generation_config=GenerationConfig(), generate=generate
        )
        image = Image.open(folder / "0.png")
        answer_prompts([[image]] * 2, ["what?", "Describe this image in detail."], model, processor)
        assert inputs["qformer_attention_mask"][0, 0] == 1 and inputs["qformer_attention_mask"][0, -1] == 0
        first = inputs["attention_mask"][0, 2:]  # behind the image's two tokens, which are never padded
        assert first[0] == 0 and first[-1] == 1
        assert processor.tokenizer.padding_side == second.padding_side == "right"


@pytest.mark.parametrize("device", ["gpu", "cuda:63", "mps:9"])
def test_a_device_that_is_not_there(tiny_checkpoint, device):
    with pytest.raises(ValueError, match=f"cannot use the device '{device}': .*leave it out"):
        load_model_and_processor(tiny_checkpoint, device=device)


class TestCaptionStreamer:
    def test_pieces_make_up_the_caption(self, loaded, folder):
        model, processor = loaded
        pieces: list[str] = []
        streamer = CaptionStreamer(processor, pieces.append)
        (record,) = describe(
            [folder / "0.png"],
            TransformersEngine(model, processor),
            streamer=streamer,
            do_sample=False,
            max_new_tokens=40,
        )
        assert "".join(pieces) == record["caption"] != ""

    @pytest.mark.parametrize("answer", ["A red dog.###", "A red dog. ###", "A red dog.\n###", "###", "A # red dog"])
    def test_stop_string_is_never_shown(self, loaded, answer):
        processor = loaded[1]
        pieces: list[str] = []
        streamer = CaptionStreamer(processor, pieces.append)
        streamer.put(torch.tensor([[1, 5, 6]]))
        for token in processor.tokenizer.encode(answer, add_special_tokens=False):
            streamer.put(torch.tensor([token]))
        early = "".join(pieces)
        streamer.end()
        assert "".join(pieces).rstrip() == answer.removesuffix("###").rstrip()
        assert "##" not in early
        if " " in answer:
            assert early.startswith("A ")

    def test_text_without_spaces_is_not_held_back(self, loaded):
        processor = loaded[1]
        pieces: list[str] = []
        streamer = CaptionStreamer(processor, pieces.append)
        streamer.put(torch.tensor([[1]]))
        for token in processor.tokenizer.encode("红色的狗", add_special_tokens=False):
            streamer.put(torch.tensor([token]))
        assert "".join(pieces) == "红色的狗"


def test_empty_prompt():
    with pytest.raises(ValueError, match="prompt is empty"):
        describe(["a.png"], None, prompt=" ")
