"""LLaVA made of the demo's tower and language model, and its answers."""

from typing import Any

import torch
from PIL.Image import Image as PILImage
from transformers import AutoTokenizer, Blip2VisionModel, GenerationConfig, LlamaForCausalLM, ViTConfig, set_seed
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_minigpt4.inference.generation import generate_ids
from transformers_minigpt4.modeling.configuration_llava import LlavaLinearConfig
from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration
from transformers_minigpt4.processing.processing_llava import LlavaPromptProcessor

from .run import BASE
from .world import IMAGE_SIZE


# The names of ViTModel's tensors, which computes what the demo's tower does, for what that one calls them.
_TOWER_NAMES = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.": "patch_embeddings.projection.",
    "encoder.layers": "layers",
    "self_attn.projection": "attention.o_proj",
    "layer_norm1": "layernorm_before",
    "layer_norm2": "layernorm_after",
    "post_layernorm": "layernorm",
}
NEW_TOKENS = 128  # the longest answer of the stand-in has 99
_PATCH_SIZE = 8  # of the demo's tower
# Keys of its config that ViTConfig has as well.
_SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
    *("hidden_act", "layer_norm_eps", "qkv_bias"),
)
_QKV = "self_attn.qkv"


def build_llava(
    seed: int = 0, vision_feature_layer: int = -2
) -> tuple[LlavaLinearForConditionalGeneration, LlavaPromptProcessor]:
    """The demo's tower and language model with a randomly initialised linear layer between them."""
    set_seed(seed)
    tower = Blip2VisionModel.from_pretrained(BASE / "vision_tower", dtype=torch.float32)
    language_model = LlamaForCausalLM.from_pretrained(BASE / "language_model", dtype=torch.float32)
    processor = LlavaPromptProcessor(
        LlavaImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        AutoTokenizer.from_pretrained(BASE / "language_model"),
        patch_size=_PATCH_SIZE,
        prompt_format="llava_v0",
    )
    language_model.resize_token_embeddings(len(processor.tokenizer))
    language_model.config.name_or_path = ""  # a path of this machine, which would be saved with the checkpoint
    config = LlavaLinearConfig(
        vision_config=ViTConfig(**{name: getattr(tower.config, name) for name in _SAME}),
        text_config=language_model.config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        vision_feature_layer=vision_feature_layer,
    )
    model = LlavaLinearForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(_tower_weights(tower), strict=False)  # its pooler is not used
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    ends = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=ends.bos_token_id, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
    )
    return model.eval(), processor


def _tower_weights(tower: Blip2VisionModel) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in tower.state_dict().items():
        for old, new in _TOWER_NAMES.items():
            name = name.replace(old, new)
        if _QKV not in name:
            weights[name] = tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3)):
            weights[name.replace(_QKV, f"attention.{letter}_proj")] = part
    return weights


def answer_questions(
    model: LlavaLinearForConditionalGeneration,
    processor: LlavaPromptProcessor,
    images: list[PILImage],
    questions: list[str],
) -> tuple[list[str], list[bool]]:
    """Greedy answers, and whether each reached its stop string within 128 new tokens."""
    prompts = []
    for question in questions:
        turn: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompts.append(processor.apply_chat_template([turn], add_generation_prompt=True))
    inputs = processor(images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt")
    new = generate_ids(
        model,
        inputs,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        stop_strings=processor.stop_strings,
        tokenizer=processor.tokenizer,
    )
    ended = ["###" in text or "</s>" in text for text in processor.tokenizer.batch_decode(new)]
    return processor.post_process_image_text_to_text(new), ended
