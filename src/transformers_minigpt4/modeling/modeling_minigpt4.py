"""
MiniGPT-4 in PyTorch: image features projected into the input embeddings of a frozen language model.

Shapes in the comments: N images, B prompts, T positions, P patches, S tower positions (P + class/register tokens),
K tokens per image, C tower width, D language-model width, V vocabulary.
"""

from dataclasses import dataclass
from functools import wraps
from typing import Any, Self, TypeVar, cast

import torch
import transformers
from packaging import version
from torch import nn
from transformers import AutoModel, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateOutput, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, torch_compilable_check
from transformers.utils.generic import ModelOutput, can_return_tuple

from .checkpoint_checks_minigpt4 import LoadingInfo
from .checkpoint_mixin_minigpt4 import CheckpointMixin
from .configuration_minigpt4 import PATCHES_PER_TOKEN, MiniGPT4Config
from .kept_positions_minigpt4 import kept_positions
from .stop_sequences_minigpt4 import StopSequenceCriteria, WithoutStopSequences
from .trained_modules_minigpt4 import PathLike


_CHUNKS_WITH_IMAGES = version.parse("5.23")  # before, a prompt read in chunks was read without its images
_NEVER = -1e4  # a logit whose share is 0 in every dtype, and finite where all are summed (label smoothing)
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


@dataclass
class MiniGPT4ImageFeatures(BaseModelOutputWithPooling):
    """
    Output of `get_image_features`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(images, S, C)`):
            Output of the vision tower, class and register tokens first.
        pooler_output (`torch.Tensor` of shape `(images, K, D)`):
            The projected tokens that take the placeholders' places in the language model.
        qformer_last_hidden_state (`torch.Tensor` of shape `(images, K, Q-Former width)`, *optional*):
            Output of the Q-Former; `None` without one.
    """

    qformer_last_hidden_state: torch.Tensor | None = None


@dataclass
class MiniGPT4ModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`MiniGPT4Model`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(images, K, D)`, *optional*):
            The projected image tokens; `None` for a call without images.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class MiniGPT4CausalLMOutputWithPast(ModelOutput):
    """
    Output of [`MiniGPT4ForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
            Mean cross-entropy of the next token over all positions whose label is not -100.
        logits (`torch.Tensor` of shape `(B, T, V)`):
            Scores of the vocabulary. The image placeholder, which is not a word, has -10,000.
        past_key_values (`Cache`, *optional*):
            Keys and values of the language model.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Hidden states of the language model, each `(B, T, D)`.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of the language model.
        image_hidden_states (`torch.Tensor` of shape `(images, K, D)`, *optional*):
            The projected image tokens.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class MiniGPT4MultiModalProjector(nn.Module):
    """What stage 1 trains: one linear layer with bias (paper §3), or three (its variant (b), §4.4)."""

    def __init__(self, config: MiniGPT4Config):
        super().__init__()
        if config.qformer_config is not None:
            in_features = config.qformer_config.hidden_size
        else:
            in_features = PATCHES_PER_TOKEN * config.vision_config.hidden_size
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(in_features, width)
        self.linear_2 = nn.Linear(width, width) if config.projector_layers == 3 else None
        self.linear_3 = nn.Linear(width, width) if config.projector_layers == 3 else None
        act = config.projector_hidden_act
        self.act = nn.Identity() if act is None else ACT2FN[act]

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden_states: torch.Tensor = self.linear_1(image_features.to(self.linear_1.weight.dtype))
        if self.linear_2 is not None and self.linear_3 is not None:
            hidden_states = self.linear_3(self.act(self.linear_2(self.act(hidden_states))))
        return hidden_states


@auto_docstring
class MiniGPT4PreTrainedModel(CheckpointMixin):
    config: MiniGPT4Config
    config_class = MiniGPT4Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["MiniGPT4MultiModalProjector"]
    # The authors keep Q-Former, `ln_vision` and projector in fp32 under autocast. fp16 would overflow in the first
    # two; the projector also learns, and a step of 1e-4 is lost in the 8 bits of bf16. Quantizers, which match full
    # paths and skip what is listed here, leave them alone too.
    _keep_in_fp32_modules = ["query_tokens", "post_layernorm", "qformer", ".*qformer", ".*multi_modal_projector"]
    _keep_in_fp32_modules_strict = ["multi_modal_projector"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model; in fp16 the first parameters of the model stay fp32."""
        weight = cast(torch.Tensor, self.get_input_embeddings().weight)  # a view, not a parameter, inside FSDP
        return weight.dtype

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniGPT4Model) and module.query_tokens is not None:
            # BLIP-2 draws its queries from N(0, 0.02); zeros would make all of them the same query forever.
            init.normal_(module.query_tokens, mean=0.0, std=self.config.qformer_config.initializer_range)


@auto_docstring(
    custom_intro="MiniGPT-4 without language-modeling head: vision tower, Q-Former, projector, and language model."
)
class MiniGPT4Model(MiniGPT4PreTrainedModel):
    def __init__(self, config: MiniGPT4Config, image_modules: bool = True, ignore_head: bool = False):
        r"""
        image_modules (`bool`, *optional*, defaults to `True`):
            Whether to build the vision tower and the Q-Former. A model without them trains from cached features.
        ignore_head (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint that is about to be loaded may have a head. [`~MiniGPT4Model.from_pretrained`] sets
            it. A class attribute would say it for models built from a config too, and vLLM, which builds its model in
            this way and puts its own head on it, would not load the head's weights.
        """
        super().__init__(config)
        # Without image modules, for training from cached features: neither built nor loaded.
        self.vision_tower = _build_vision_tower(config) if image_modules else None
        ignored = [r"^lm_head\."] if ignore_head else []
        if not image_modules:
            ignored.append(r"(^|\.)(vision_tower|qformer)\.")
        self._keys_to_ignore_on_load_unexpected = ignored
        if config.qformer_config is not None:
            width = config.qformer_config.hidden_size
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
            qformer = _build(Blip2QFormerModel, config.qformer_config) if image_modules else None
            self.qformer: Blip2QFormerModel | None = qformer
        else:
            self.register_parameter("query_tokens", None)
            self.qformer = None
        self.multi_modal_projector = MiniGPT4MultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @classmethod
    def _load(cls, name: PathLike | None, *model_args: object, **kwargs: Any) -> tuple[Self, LoadingInfo]:
        return super()._load(name, *model_args, ignore_head=True, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> MiniGPT4ImageFeatures:
        """
        Encodes images and projects them into the language model's embedding space.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`):
                Normalized images of the size that `config.vision_config` names.

        Returns:
            [`MiniGPT4ImageFeatures`] whose `pooler_output` has shape `(images, K, D)`; a tuple of its values with
            `return_dict=False`.

        Raises:
            ValueError: for images of another size or rank.
        """
        if self.vision_tower is None:
            raise RuntimeError(
                "This model was loaded without image modules. Give it image features, or load the complete model."
            )
        expected = self.config.image_height_width
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but this checkpoint takes (images, 3, "
                f"{expected[0]}, {expected[1]}). Prepare images with the checkpoint's own processor."
            )
        tower_output = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        hidden_states = tower_output.last_hidden_state  # (N, S, C)

        qformer_states = None
        if self.qformer is not None:
            # No mask: every query sees every patch.
            qformer_states = self.qformer(
                query_embeds=self.query_tokens.expand(hidden_states.shape[0], -1, -1),
                encoder_hidden_states=hidden_states,
                return_dict=True,
            ).last_hidden_state  # (N, K, Q-Former width)
            tokens = qformer_states
        else:
            # Class and register tokens come before the patches in every tower of transformers.
            patches = hidden_states[:, -self.config.num_patches :]  # (N, P, C)
            tokens = patches.reshape(patches.shape[0], -1, PATCHES_PER_TOKEN * patches.shape[-1])  # (N, P / 4, 4 C)

        return MiniGPT4ImageFeatures(
            last_hidden_state=hidden_states,
            pooler_output=self.multi_modal_projector(tokens),  # (N, K, D)
            hidden_states=tower_output.hidden_states,
            attentions=tower_output.attentions,
            qformer_last_hidden_state=qformer_states,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Boolean mask of shape `(B, T, 1)` of the positions that image tokens take.

        Raises:
            ValueError: when the number of placeholders differs from the number of image tokens.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask: torch.Tensor = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        count = mask.sum()
        torch_compilable_check(
            count * image_features.shape[-1] == image_features.numel(),
            f"The prompts contain {count} image placeholders, but the images give {image_features.shape[0]} x "
            f"{image_features.shape[1]} tokens. Give one image per <ImageHere>, do not truncate the prompt, and use a "
            f"processor with image_seq_length={image_features.shape[1]}.",
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _check_length(self, length: int) -> None:
        text_config = self.config.text_config
        context = getattr(text_config, "max_position_embeddings", None)
        rope_type = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type", "default")
        if length == 0:
            raise ValueError("The prompt is empty. Give at least one token or one image.")
        if context is not None and length > context and rope_type == "default":
            raise ValueError(
                f"The prompt has {length} positions ({self.config.image_seq_length} per image), but the language "
                f"model was trained with {context}. Shorten the text or give fewer images."
            )

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]  # transformers' TypedDict names position_ids as well
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[object, ...] | MiniGPT4ModelOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`, *optional*):
            Images of all prompts of the batch, in reading order.
        mm_encoder_outputs (`dict[str, ModelOutput]`, *optional*):
            `{"image": features}` with features of `get_image_features`, in place of `pixel_values`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs, not both.")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        # Training may pack several rows, each with positions from 0, into one. vLLM does: without mask and cache.
        packed = position_ids is not None and attention_mask is None and kwargs.get("use_cache") is False
        if not self.training and not packed:
            self._check_length(inputs_embeds.shape[1])

        image_features: torch.Tensor | None = None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
        elif mm_encoder_outputs is not None and mm_encoder_outputs.get("image") is not None:
            found: Any = mm_encoder_outputs["image"].pooler_output  # from `generate`, one tensor per image
            image_features = found if isinstance(found, torch.Tensor) else torch.stack(list(found))

        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MiniGPT4ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


@auto_docstring(custom_intro="MiniGPT-4 with a language-modeling head: answers in text about images and text.")
class MiniGPT4ForConditionalGeneration(MiniGPT4PreTrainedModel, GenerationMixin):
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MiniGPT4Config, image_modules: bool = True):
        r"""
        image_modules (`bool`, *optional*, defaults to `True`):
            Whether to build the vision tower and the Q-Former. A model without them trains from cached features.
        """
        super().__init__(config)
        self.model = MiniGPT4Model(config, image_modules)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()  # `embed_tokens` in most language models, `wte` in some
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> MiniGPT4ImageFeatures:
        """See [`MiniGPT4Model.get_image_features`]."""
        features: MiniGPT4ImageFeatures = self.model.get_image_features(pixel_values, **kwargs)
        return features

    @can_return_tuple
    @auto_docstring
    def forward(  # type: ignore[misc]  # transformers' TypedDict names position_ids as well
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[object, ...] | MiniGPT4CausalLMOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`, *optional*):
            Images of all prompts of the batch, in reading order.
        mm_encoder_outputs (`dict[str, ModelOutput]`, *optional*):
            `{"image": features}` with features of `get_image_features`, in place of `pixel_values`.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor

        >>> folder = "minigpt4-demo/checkpoint"  # what `minigpt4 demo --output minigpt4-demo` writes
        >>> model = MiniGPT4ForConditionalGeneration.from_pretrained(folder)
        >>> processor = MiniGPT4Processor.from_pretrained(folder)
        >>> inputs = processor(
        ...     images=Image.open("image.png"),
        ...     text="###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant: ",
        ...     return_tensors="pt",
        ... )
        >>> ids = model.generate(**inputs, do_sample=False)
        >>> processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = kept_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)  # (B, T or kept, V)
        # The authors' vocabulary has no image token: it must take no share of the softmax and never be said.
        logits[..., self.config.image_token_id] = _NEVER

        loss = None
        if labels is not None:
            learned = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=learned, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return MiniGPT4CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature says which arguments `generate` accepts
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """See [`~GenerationMixin.prepare_inputs_for_generation`]; image features are for the first step."""
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)  # transformers 5.16 and 5.17 would keep them
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        return inputs

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """
        See [`~GenerationMixin.generate`]; rows also end at the `stop_sequences` of the generation config.

        A `streamer` gets the ids of one answer without the sequence or token that ends it.

        Raises:
            ValueError: for `prefill_chunk_size` with images, where the installed transformers would not see these.
        """
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        stop_sequences = _setting("stop_sequences", kwargs, configs) or []
        if stop_sequences:
            criteria = [*(stopping_criteria or []), StopSequenceCriteria(stop_sequences, self.device)]
            stopping_criteria = StoppingCriteriaList(criteria)
        streamer = kwargs.get("streamer")
        if streamer is not None:
            end_tokens = _setting("eos_token_id", kwargs, configs)
            tokens = torch.as_tensor([] if end_tokens is None else end_tokens).reshape(-1, 1).tolist()
            kwargs["streamer"] = WithoutStopSequences(streamer, [*stop_sequences, *tokens])
        chunk_size = _setting("prefill_chunk_size", kwargs, configs)
        images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs") is not None
        if chunk_size is not None and images and version.parse(transformers.__version__) < _CHUNKS_WITH_IMAGES:
            raise ValueError(
                f"prefill_chunk_size={chunk_size} with images needs transformers {_CHUNKS_WITH_IMAGES} or later, and "
                f"{transformers.__version__} is installed. Leave prefill_chunk_size out, or update transformers."
            )
        return super().generate(  # type: ignore[misc]  # its self type exists for type checkers only
            inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs
        )


def _setting(name: str, given: dict[str, Any], configs: list[GenerationConfig]) -> Any:
    """A setting of `generate`: what was given, else of the first config that has it."""
    known = [found for config in configs if (found := getattr(config, name, None)) is not None]
    return given.get(name, known[0] if known else None)


def _build_vision_tower(config: MiniGPT4Config) -> PreTrainedModel:
    if not isinstance(config.vision_config, Blip2VisionConfig):
        tower: PreTrainedModel = AutoModel.from_config(config.vision_config)
        return tower
    # `AutoModel` does not list BLIP-2's tower.
    blip2_tower = _build(Blip2VisionModel, config.vision_config)
    blip2_tower.post_layernorm.eps = config.vision_post_layernorm_eps
    return blip2_tower


def _build(model_class: type[AnyModel], config: PreTrainedConfig) -> AnyModel:
    """What `AutoModel.from_config` does, for classes that it does not list."""
    model: AnyModel = model_class._from_config(config)
    return model


__all__ = ["MiniGPT4ForConditionalGeneration", "MiniGPT4Model", "MiniGPT4PreTrainedModel"]
