"""Tiny random models of every architecture that the recipes name, their processors, and tiny sources of rows."""

import copy
import io
import json
import tarfile
from pathlib import Path

import torch
from golden_model import GOLDEN, golden_config, golden_model
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    T5Config,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4 import (
    LlavaLinearConfig,
    LlavaLinearForConditionalGeneration,
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
    MiniGPT4Processor,
)
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor


SIZE = {"height": 56, "width": 56}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**WIDTHS, "image_size": 56, "patch_size": 14}
LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role.upper() + ': ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text + eos_token }}{% endgeneration %}"
    "{% else %}{{ part.text + ' ' }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
)


def save_minigpt4(folder: Path, golden: dict, *, qformer=True, layers=1, template=None) -> None:
    """The golden model, or a variant of it with random weights."""
    torch.manual_seed(0)
    if qformer and layers == 1:
        model = golden_model(golden["config"])
        with torch.no_grad():
            model.lm_head.weight[1200] = 0
    else:
        config = golden_config(golden["config"]).to_dict()
        config["projector_layers"] = layers
        if not qformer:
            config["qformer_config"] = None
        model = MiniGPT4ForConditionalGeneration(MiniGPT4Config(**config))
    _save_minigpt4(folder, model, template)


def _save_minigpt4(folder: Path, model, template=None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    processor = MiniGPT4Processor(
        BlipImageProcessorPil(size=SIZE),
        tokenizer,
        image_seq_length=model.config.image_seq_length,
        chat_template=template,
    )
    model.generation_config = processor.get_generation_config()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_modern(folder: Path) -> None:
    """A SigLIP tower and a LLaMA of another width, without Q-Former."""
    torch.manual_seed(0)
    config = MiniGPT4Config(
        vision_config=SiglipVisionConfig(**TOWER),
        qformer_config=None,
        text_config=_llama(1201),
        image_token_id=1200,
    )
    _save_minigpt4(folder, MiniGPT4ForConditionalGeneration(config))


def save_chat_model(folder: Path, processor: MiniGPT4Processor) -> None:
    """The modern model with the vocabulary of a processor."""
    torch.manual_seed(0)
    config = MiniGPT4Config(
        vision_config=SiglipVisionConfig(**TOWER),
        qformer_config=None,
        text_config=_llama(len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
    )
    processor = copy.copy(processor)
    processor.image_seq_length = config.image_seq_length
    MiniGPT4ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_llava(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.unk_token
    processor = LlavaProcessor(
        BlipImageProcessorPil(size=SIZE),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=_llama(1201),
        image_token_index=1200,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_linear_llava(folder: Path, prompt_format: str = "llava_v1") -> None:
    """LLaVA with the article's projector, and the processor that writes an authors' prompt format."""
    torch.manual_seed(0)
    processor = LlavaPromptProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIZE),
        AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"),
        patch_size=14,
        prompt_format=prompt_format,
    )
    config = LlavaLinearConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=_llama(1201),
        image_token_index=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
    )
    LlavaLinearForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_blip2(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.pad_token = tokenizer.unk_token
    # T5's tokenizer closes every text with </s>.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    processor = Blip2Processor(BlipImageProcessorPil(size=SIZE), tokenizer, num_query_tokens=8)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**TOWER).to_dict(),
        qformer_config=Blip2QFormerConfig(**WIDTHS, encoder_hidden_size=32).to_dict(),
        text_config=T5Config(
            vocab_size=1201, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
        ).to_dict(),
        num_query_tokens=8,
        image_token_index=1200,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _llama(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, **WIDTHS, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def drawn_image(number: int) -> Image.Image:
    image = Image.new("RGB", (60, 48), (20 * number % 255, 90, 200 - 17 * number % 200))
    image.paste((240, 30 * number % 255, 10), (number % 30, 5, number % 30 + 20, 30))
    return image


CAPTIONS = ("a small dog on the table", "two birds", "the river near the wooden fence", "a red bicycle", "a lamp")


def write_sources(folder: Path, count: int = 12) -> dict[str, str]:
    """A source of each kind that the recipes name, by kind."""
    images = folder / "images"
    images.mkdir(parents=True)
    captions = [f"{CAPTIONS[i % 5]} and {i} more" for i in range(count)]
    for i in range(count):
        drawn_image(i).save(images / f"{i}.jpg")
    aligned = folder / "cc_sbu_align"
    (aligned / "image").mkdir(parents=True)
    for i in range(count):
        drawn_image(i).save(aligned / "image" / f"{i}.jpg")
    annotations = [{"image_id": str(i), "caption": captions[i]} for i in range(count)]
    (aligned / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    turns = [
        {
            "id": str(i),
            "image": f"{i}.jpg",
            "conversations": [
                {"from": "human", "value": "What is this?\n<image>"},
                {"from": "gpt", "value": captions[i]},
            ],
        }
        for i in range(count)
    ]
    (folder / "llava.json").write_text(json.dumps(turns))
    narratives = [{"image_id": str(i), "caption": captions[i]} for i in range(count)]
    (folder / "locnarr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in narratives))
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, count, 4):
                _add(tar, f"{i:06d}.jpg", (images / f"{i}.jpg").read_bytes())
                _add(tar, f"{i:06d}.json", json.dumps({"caption": captions[i]}).encode())
    return {
        "wds": f"wds:{folder}/{{00000..00003}}.tar",
        "cc_sbu_align": f"cc_sbu_align:{aligned}",
        "llava": f"llava:{folder}/llava.json::images={images}",
        "locnarr": f"locnarr:{folder}/locnarr.jsonl::images={images}",
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
