"""LLaVA with the article's projector: transformers' model with one linear layer instead of two."""

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_llava import LlavaLinearConfig
from .kept_positions_minigpt4 import kept_positions


_NEVER = -10_000.0  # a logit that takes no share of any softmax and fits into float16


class LlavaLinearModel(LlavaModel):
    """The base model of [`LlavaLinearForConditionalGeneration`], without a language-modeling head."""

    config: LlavaLinearConfig

    def __init__(self, config: LlavaLinearConfig) -> None:
        super().__init__(config)
        layers = config.vision_feature_layer
        width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        bias = config.multimodal_projector_bias
        projector = nn.Linear(width, config.text_config.hidden_size, bias=bias)
        self.multi_modal_projector = projector  # type: ignore[assignment]  # of another class than the parent's
        self.post_init()


class LlavaLinearForConditionalGeneration(LlavaForConditionalGeneration):
    """
    LLaVA of the article: CLIP's patches through one linear layer into a language model.

    Everything else is transformers' [`LlavaForConditionalGeneration`], except that the image token, which the authors'
    vocabulary does not have, takes no share of the softmax, so that losses and answers equal theirs.
    """

    config: LlavaLinearConfig

    def __init__(self, config: LlavaLinearConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # not its parent's, which would build the other model first
        self.model = LlavaLinearModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # transformers' TypedDict names position_ids as well
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[object, ...] | LlavaCausalLMOutputWithPast:
        """
        See [`~LlavaForConditionalGeneration.forward`].

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): Ids, with the image token at every position of an image.
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`): Images in reading order.
            labels (`torch.LongTensor` of shape `(B, T)`): Ids to learn, -100 elsewhere; they are shifted here.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))  # (B, T or kept, V)
        logits[..., self.config.image_token_id] = _NEVER
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["LlavaLinearForConditionalGeneration", "LlavaLinearModel"]
