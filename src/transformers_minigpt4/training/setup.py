"""Sets up the trainer of a recipe: stage, adapters, collator, optimizations, sanity checks and run info."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import set_seed
from trl import ModelConfig, get_peft_config

from transformers_minigpt4.modeling.modeling_llava import LlavaLinearForConditionalGeneration
from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4PreTrainedModel
from transformers_minigpt4.utils.families import LLAVA, PROJECTOR, QFORMER, family_of

from .arguments import StageArguments, StageConfig
from .collator import Collator, ImageTextCollator, make_collator
from .feature_cache import FeatureCache
from .features import FeatureCollator, take_features, train_from_features
from .loading import LoadedRows
from .loss import LabeledCollator, keep_image_token_out, keep_labeled
from .packing import pack
from .run_info import RunInfoCallback, recipe_settings, run_info
from .run_page import RunPageCallback
from .samples import SampleCallback
from .sanity_checks import SanityCheckCallback
from .stages import prepare_stage, trainable_parameters
from .towerless import complete, has_tower
from .trainer import StageSFTTrainer, StageTrainer


def make_trainer(
    stage: StageArguments,
    config: StageConfig,
    model_args: ModelConfig,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: LoadedRows,
) -> StageSFTTrainer | StageTrainer:
    """
    The prepared trainer; `SFTTrainer`, or `Trainer` for a model with its own loss.

    Raises:
        DataError: for a feature cache of other weights.
        ValueError: for modules that the model does not have, and for rows that cannot be packed.
    """
    settings = recipe_settings([stage, config, model_args])  # before TRL changes some for itself
    set_seed(config.seed)  # adapters are drawn at random
    prepare_stage(model, stage.trainable_modules)
    if family_of(model.config) is LLAVA and not isinstance(model, LlavaLinearForConditionalGeneration):
        keep_image_token_out(model)
    collator = _with_features(stage, model, processor, _collator(stage, model, processor))
    common = {
        "model": model,
        "args": config,
        "train_dataset": rows.dataset,
        "eval_dataset": rows.held_out.evaluation or None,
        "data_collator": _optimize(stage, config, model, collator),
        "processing_class": processor,
        "epoch_rows": rows.length,
    }
    trainer: StageSFTTrainer | StageTrainer
    if family_of(model.config).encoder_decoder:
        trainer = StageTrainer(**common)
    else:
        trainer = StageSFTTrainer(**common, peft_config=_adapters(model_args, stage))
    trainer.add_callback(SanityCheckCallback(stage.check_first_loss))
    trainable = trainable_parameters(trainer.model)
    info = run_info(settings, rows.dataset, trainable, rows.fingerprint)
    info |= {"device": str(config.device), "changed_for_the_cpu": config.changes}
    info["evaluation_rows"] = len(rows.held_out.evaluation)
    trainer.add_callback(RunInfoCallback(info, rows.skipped))
    samples = None
    if rows.held_out.samples and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        context = trainer.compute_loss_context_manager
        samples = SampleCallback(rows.held_out, collator, processor, stage.max_completion_length, context)
        trainer.add_callback(samples)
    trainer.add_callback(RunPageCallback(info, rows.skipped, samples))
    return trainer


def _collator(stage: StageArguments, model: PreTrainedModel, processor: ProcessorMixin) -> ImageTextCollator:
    return make_collator(model, processor, stage.max_completion_length, max_row_length=stage.max_row_length)


def _with_features(
    stage: StageArguments, model: PreTrainedModel, processor: ProcessorMixin, collator: ImageTextCollator
) -> Collator:
    """
    Wraps a collator, and changes a prepared model, so that cached features take the place of a tower.

    Raises:
        DataError: for a cache of other weights, if the model has its tower; without one, see [`source_digest`].
    """
    if stage.feature_cache is None:
        return collator
    if has_tower(model):
        cache = train_from_features(model, processor.image_processor, stage.feature_cache)
    else:
        take_features(model)
        cache = FeatureCache(stage.feature_cache)
    return FeatureCollator(collator, cache)


def _optimize(stage: StageArguments, config: StageConfig, model: PreTrainedModel, collator: Collator) -> Collator:
    """
    Wraps a collator, and changes a prepared model, so that steps are cheaper: packed rows, logits at labels only.

    Logits are computed at labels only wherever that is possible: not for an encoder-decoder, which has its own labels,
    and not on several GPUs in one process, among which torch would split the batch by rows.

    Raises:
        ValueError: for rows of a model that cannot be packed.
    """
    wrapped = collator
    if stage.pack_rows:
        wrapped = pack(model, wrapped, stage.pack_tokens)
    if not family_of(model.config).encoder_decoder and config.n_gpu <= 1:
        keep_labeled(model)
        wrapped = LabeledCollator(wrapped)
    return wrapped


def save_final(trainer: StageSFTTrainer | StageTrainer, revision: str = "main") -> None:
    """Leaves a checkpoint in the output folder that loads by its name: MiniGPT-4's trained modules, else all."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, MiniGPT4PreTrainedModel) or hasattr(model, "peft_config"):
        trainer.save_model()
        return
    if trainer.args.should_save:
        folder = str(trainer.args.output_dir)
        (model if has_tower(model) else complete(model, revision)).save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        torch.save(trainer.args, Path(folder) / TRAINING_ARGS_NAME)
    trainer.accelerator.wait_for_everyone()


def _adapters(model_args: ModelConfig, stage: StageArguments) -> PeftConfig | None:
    """PEFT freezes what is not an adapter; the stage's other modules train completely and are saved with them."""
    peft_config = get_peft_config(model_args)
    if not isinstance(peft_config, LoraConfig):
        return peft_config
    modules = {PROJECTOR: "multi_modal_projector", QFORMER: "qformer"}
    chosen = [modules[name] for name in stage.trainable_modules if name in modules]
    peft_config.modules_to_save = [*(peft_config.modules_to_save or []), *chosen] or None
    # `q_proj` and `v_proj` occur in vision towers too, which stay frozen.
    targets = peft_config.target_modules
    if isinstance(targets, str) and targets.isidentifier():  # TRL passes on a single name without its list
        targets = [targets]
    if isinstance(targets, (list, set)) and targets:
        names = "|".join(sorted(targets))
        peft_config.target_modules = rf".*language_model.*\.({names})"
    return peft_config
