"""
Private names of other packages that the package relies on: each exists, and is listed in docs/architecture.md.

A row here fails when an update takes the name away; `pyproject.toml` keeps such an update out until it was tried.
"""

import importlib
import inspect
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils.hub import cached_files


ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
SECTION = "## Private names of other packages"

# (module, attributes from it, as they stand in the docs table)
NAMES = [
    ("transformers", "PreTrainedModel._from_config"),
    ("transformers", "PreTrainedModel._auto_class"),
    ("transformers", "PreTrainedConfig._attn_implementation"),
    ("transformers", "Trainer._get_output_dir"),
    ("transformers", "Trainer._save_checkpoint"),
    ("transformers", "Trainer._save"),
    ("transformers", "Trainer._load_from_checkpoint"),
    ("transformers", "Trainer._load_best_model"),
    ("datasets.iterable_dataset", "_BaseExamplesIterable"),
    ("pycocoevalcap.meteor.meteor", "Meteor._stat"),
    # Without an underscore, but not documented either.
    ("transformers.core_model_loading", "revert_weight_conversion"),
    ("transformers.dynamic_module_utils", "custom_object_save"),
    ("transformers.models.llava.modeling_llava", "LlavaCausalLMOutputWithPast"),
    ("transformers.models.llava.image_processing_pil_llava", "LlavaImageProcessorPil"),
    ("transformers.conversion_mapping", "register_checkpoint_conversion_mapping"),
    ("transformers.conversion_mapping", "get_checkpoint_conversion_mapping"),
    ("transformers.utils.hub", "cached_files"),
    ("transformers.utils.hub", "extract_commit_hash"),
    ("transformers.utils.hub", "get_checkpoint_shard_files"),
    ("transformers.utils", "torch_compilable_check"),
    ("transformers.utils.generic", "can_return_tuple"),
    ("transformers.initialization", "normal_"),
    ("transformers.pipelines", "PIPELINE_REGISTRY.supported_tasks"),
    ("transformers.pipelines", "PIPELINE_REGISTRY.task_aliases"),
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("transformers.models.auto.modeling_auto", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ("bitsandbytes", "supported_torch_devices"),
    ("transformers.cli.serving.chat_completion", "ChatCompletionHandler"),
    ("transformers.cli.serving.model_manager", "ModelManager"),
    ("transformers.cli.serving.server", "build_server"),
    ("transformers.cli.serving.utils", "BaseGenerateManager"),
    ("transformers.cli.serving.utils", "GenerationState"),
    ("transformers.cli.serving.utils", "Modality"),
    ("datasets.info", "DatasetInfosDict"),
    ("datasets.table", "embed_table_storage"),
]


def exists(module: str, name: str) -> bool:
    value = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_the_name_exists(module, name):
    assert exists(module, name), f"{module} has no {name} any more: see docs/architecture.md"


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda value: value)
def test_the_name_is_listed(module, name):
    section = ARCHITECTURE.read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    assert f"`{name}`" in section, f"{name} is missing from the table in docs/architecture.md"


def test_keywords_and_keys():
    """What no attribute shows: a keyword of a function, and a key of a dict."""
    assert "_raise_exceptions_for_missing_entries" in inspect.signature(cached_files).parameters
    assert '"_adapter_model_path"' in inspect.getsource(maybe_load_adapters)
    assert "upload_info" in CommitOperationAdd.__dataclass_fields__
