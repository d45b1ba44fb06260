"""Builds MiniGPT-4 and its peers in transformers with equal towers and language models, and checks that they agree."""

from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    CLIPVisionConfig,
    GenerationConfig,
    InstructBlipConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_minigpt4 import MiniGPT4Config


OURS = "MiniGPT-4"
PEERS = ("BLIP-2", "InstructBLIP", "LLaVA")
MODELS = (OURS, *PEERS)

IMAGE_TOKEN_ID = 32000
NUM_QUERY_TOKENS = 32
TEXT_TOKENS = 32  # `<s>` and a template with one question: what a first turn holds besides the image
INSTRUCTION_TOKENS = 8  # what InstructBLIP's Q-Former reads besides its queries
CHECK_TOKENS = 16


@dataclass(frozen=True)
class Size:
    """Configs of the modules that all models share, and how many tokens to decode after the first."""

    vision: dict
    qformer: dict
    text: dict
    decode_tokens: int


SIZES = {
    "tiny": Size(
        vision={"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        qformer={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        text={"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
        decode_tokens=4,
    ),
    # About the proportions of the paper's model at a fiftieth of its size.
    "small": Size(
        vision={"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        qformer={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3},
        text={"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
        decode_tokens=32,
    ),
    # The paper's model: ViT-g/14 of EVA-CLIP, BERT-base as Q-Former, Vicuna-7B (the defaults of the configs).
    "7b": Size(
        vision={"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
        qformer={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        decode_tokens=64,
    ),
}
IMAGE = {"image_size": 224, "patch_size": 14}


def build_config(name: str, size: Size, image_token_id: int = IMAGE_TOKEN_ID) -> PreTrainedConfig:
    """Config of the model called `name` (one of `MODELS`) with the modules of `size`; the image token is the last."""
    # No end token, so that every model decodes as many tokens as it is asked for.
    text = LlamaConfig(**size.text, vocab_size=image_token_id + 1, eos_token_id=None, pad_token_id=0)
    # The towers' default of 1e-10 makes random weights that compute nothing, and slowly: denormal numbers.
    vision = {**size.vision, **IMAGE, "initializer_range": 0.02}
    if name == "LLaVA":
        tower = CLIPVisionConfig(**vision, hidden_act="gelu")
        patches = (IMAGE["image_size"] // IMAGE["patch_size"]) ** 2
        return LlavaConfig(
            vision_config=tower, text_config=text, image_token_index=image_token_id, image_seq_length=patches
        )
    modules = {
        "vision_config": vision,
        "qformer_config": {**size.qformer, "encoder_hidden_size": size.vision["hidden_size"]},
        "text_config": text,
        "num_query_tokens": NUM_QUERY_TOKENS,
    }
    if name == OURS:
        # BLIP-2's epsilon, for the check of equal tokens; it costs the same as our own.
        return MiniGPT4Config(**modules, image_token_id=image_token_id, vision_post_layernorm_eps=1e-6)
    return {"BLIP-2": Blip2Config, "InstructBLIP": InstructBlipConfig}[name](
        **modules, image_token_index=image_token_id
    )


def build_model(name: str, size: Size, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model called `name` with random weights, in the dtypes that `from_pretrained(dtype=dtype)` would give."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(build_config(name, size), dtype=dtype)
    # `from_pretrained` keeps these modules in float32 when it loads in bfloat16, `from_config` does not.
    if dtype == torch.bfloat16:
        for parameter_name, parameter in model.named_parameters():
            if model._keep_in_fp32_modules_strict & set(parameter_name.split(".")):
                parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def image_seq_length(model: PreTrainedModel) -> int:
    """Positions that one image takes in the language model."""
    config = model.config
    return config.image_seq_length if hasattr(config, "image_seq_length") else config.num_query_tokens


def language_decoder(model: PreTrainedModel) -> LlamaModel:
    """The language model without its head, wherever the model keeps it."""
    return next(module for module in model.modules() if isinstance(module, LlamaModel))


def build_inputs(model: PreTrainedModel, batch_size: int) -> dict[str, torch.Tensor]:
    """One image and one prompt of `TEXT_TOKENS` text tokens per row; the same pixels and text for every model."""
    generator = torch.Generator().manual_seed(batch_size)
    side = IMAGE["image_size"]
    pixel_values = torch.randn(batch_size, 3, side, side, generator=generator)
    text = torch.randint(3, IMAGE_TOKEN_ID, (batch_size, TEXT_TOKENS), generator=generator)
    image = torch.full((batch_size, image_seq_length(model)), IMAGE_TOKEN_ID)
    input_ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
    inputs = {
        "pixel_values": pixel_values.to(model.dtype),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }
    if model.config.model_type == "instructblip":
        instruction = torch.randint(1000, 30000, (batch_size, INSTRUCTION_TOKENS), generator=generator)
        inputs |= {"qformer_input_ids": instruction, "qformer_attention_mask": torch.ones_like(instruction)}
    return {key: value.to(model.device) for key, value in inputs.items()}


def encode(model: PreTrainedModel, inputs: dict[str, torch.Tensor]):
    """Image encoding up to the language model's embeddings, through each model's own public call."""
    features = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return model.get_image_features(**features, return_dict=True)


def generate(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    on_token: StoppingCriteria | None = None,
) -> torch.LongTensor:
    """
    Exactly `new_tokens` greedy tokens per row, without the prompt: shape `(B, new_tokens)`.

    `on_token` is called after every step of the batch.
    """
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        # Ours never generates the image placeholder; the others could, and would then differ from ours.
        suppress_tokens=[IMAGE_TOKEN_ID],
    )
    criteria = StoppingCriteriaList([on_token] if on_token is not None else [])
    ids = model.generate(**inputs, generation_config=config, stopping_criteria=criteria)
    return ids[:, inputs["input_ids"].shape[1] :]


def share_weights(ours: PreTrainedModel, peer: PreTrainedModel) -> None:
    """
    Gives a peer our weights wherever it has the same module.

    The language model's are shared rather than copied, so that all models read the same bytes and four of them fit
    into little memory.
    """
    state = ours.state_dict()
    renamed = {}
    for key, value in state.items():
        if peer.config.model_type != "llava":
            key = key.removeprefix("model.").replace("vision_tower.", "vision_model.")
            key = key.replace("multi_modal_projector.linear_1.", "language_projection.")
            key = key.replace("language_model.", "language_model.model.").replace(
                "lm_head.", "language_model.lm_head."
            )
        renamed[key] = value
    wanted = peer.state_dict()
    language = {key: value for key, value in renamed.items() if "language_model." in key or "lm_head." in key}
    if not language.keys() <= wanted.keys():
        raise RuntimeError(f"No place in {type(peer).__name__} for {sorted(language.keys() - wanted.keys())[:3]}.")
    others = {
        key: value
        for key, value in renamed.items()
        if key not in language and key in wanted and wanted[key].shape == value.shape
    }
    peer.load_state_dict(others, strict=False)
    peer.load_state_dict(language, strict=False, assign=True)


def check_equal_work(size: Size, device: str) -> str:
    """
    Checks in float32 that ours and BLIP-2 with the same weights give the same image features and the same tokens.

    Returns:
        One sentence that says what was compared.

    Raises:
        RuntimeError: if they differ, because the timings would then compare different work.
    """
    ours, blip2 = (build_model(name, size, torch.float32, device) for name in (OURS, "BLIP-2"))
    share_weights(ours, blip2)
    inputs = build_inputs(ours, 2)
    with torch.inference_mode():
        features = [encode(model, inputs).pooler_output for model in (ours, blip2)]
        tokens = [generate(model, inputs, CHECK_TOKENS) for model in (ours, blip2)]
    gap = (features[0] - features[1]).abs().max().item() / features[1].abs().max().item()
    if gap > 1e-4 or torch.equal(features[0][0], features[0][1]) or not torch.equal(*tokens):
        raise RuntimeError(
            f"MiniGPT-4 and BLIP-2 with the same weights differ (image features by {gap:.1e} of their largest value, "
            f"tokens {tokens[0].tolist()} and {tokens[1].tolist()}), so that timings would compare different work."
        )
    difference = "are equal bit for bit" if gap == 0 else f"differ by at most {gap:.0e} of the largest value"
    return (
        f"With the same weights in float32, MiniGPT-4 and BLIP-2 gave the same {CHECK_TOKENS} greedy tokens for each "
        f"of 2 images; their image features {difference}."
    )
