"""Makes the steps of a recipe cheaper: cached features in place of a tower, packed rows, logits at labels only."""

from transformers import PreTrainedModel, ProcessorMixin

from transformers_minigpt4.utils.families import family_of

from .arguments import StageArguments, StageConfig
from .collator import Collator, ImageTextCollator
from .feature_cache import FeatureCache
from .features import FeatureCollator, take_features, train_from_features
from .loss import LabelledCollator, keep_labeled
from .packing import pack
from .towerless import has_tower


def optimize(
    stage: StageArguments,
    config: StageConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    collator: ImageTextCollator,
) -> Collator:
    """
    Wraps a collator, and changes a prepared model, with the optimizations that recipe and model allow.

    Logits are computed at labels only wherever that is possible: not for an encoder-decoder, which has its own labels,
    and not on several GPUs in one process, among which torch would split the batch by rows.

    Raises:
        DataError: for a cache of other weights, if the model has its tower; without one, see [`source_digest`].
        ValueError: for rows of a model that cannot be packed.
    """
    wrapped: Collator = collator
    if stage.feature_cache is not None:
        if has_tower(model):
            cache = train_from_features(model, processor.image_processor, stage.feature_cache)
        else:
            take_features(model)
            cache = FeatureCache(stage.feature_cache)
        wrapped = FeatureCollator(collator, cache)
    if stage.pack_rows:
        wrapped = pack(model, wrapped, stage.pack_tokens)
    if not family_of(model.config).encoder_decoder and config.n_gpu <= 1:
        keep_labeled(model)
        wrapped = LabelledCollator(wrapped)
    return wrapped
