"""Loads an image-text-to-text model of any family for inference, with its processor."""

import os
from typing import Literal, TypeAlias, get_args

from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, ProcessorMixin
from transformers.utils import is_bitsandbytes_available

from transformers_minigpt4.modeling.trained_modules_minigpt4 import adapter_base
from transformers_minigpt4.utils.checkpoint_files import loading_from
from transformers_minigpt4.utils.models import GenerativeModel, check_is_folder, usable_device
from transformers_minigpt4.utils.text import first_line

from .engines import DEFAULT_BATCH_SIZE, EngineName, TransformersEngine
from .vllm_engine import VllmEngine


Quantization: TypeAlias = Literal["bnb-4bit", "bnb-8bit"]
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_model_and_processor(
    checkpoint: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> tuple[GenerativeModel, ProcessorMixin]:
    """
    Load an image-text-to-text model of any family for inference, with its processor.

    Args:
        checkpoint (`str`): a folder or a Hub id; also the folder of a PEFT adapter.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` for the checkpoint's own, or `"float32"` and so on.
        device (`str`, *optional*): such as `"cpu"` or `"cuda:1"`; `"auto"` spreads the model over all accelerators.
            By default the first accelerator if there is one, else the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run code from the checkpoint.
        quantization (`str`, *optional*): `"bnb-4bit"` or `"bnb-8bit"`, to quantize with bitsandbytes while loading.
            What a model's class keeps in fp32, such as MiniGPT-4's Q-Former and projector, and its head stay as they
            are.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: the model in evaluation mode, and its processor.

    Raises:
        ValueError: if the checkpoint cannot be found or is of another kind, torch has no such device, or the
            checkpoint or the device cannot be quantized.
    """
    device = usable_device(device)
    check_is_folder(checkpoint)
    # Only if it is wanted: None would make transformers forget how a checkpoint is quantized already.
    options = {} if quantization is None else {"quantization_config": _quantization_config(quantization, device)}
    try:
        with loading_from(checkpoint):
            processor = AutoProcessor.from_pretrained(_with_processor(checkpoint), trust_remote_code=trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(
                checkpoint,
                dtype=dtype,
                device_map=device,
                trust_remote_code=trust_remote_code,
                **options,
            )
    except (OSError, ValueError) as error:
        message = f"cannot load {checkpoint!r} as an image-text-to-text model on {device!r}: {first_line(error)}"
        if os.path.isdir(checkpoint):
            raise ValueError(message) from error
        raise ValueError(f"{message}; give a folder or Hub id that holds such a model and its processor") from error
    if quantization is not None and not getattr(model, f"is_loaded_in_{quantization.removeprefix('bnb-')}", False):
        raise ValueError(
            f"{checkpoint} is quantized in another way already, and cannot be in {quantization}; leave --quantization "
            "out, or take the checkpoint that it was made from"
        )
    return model.eval(), processor


def _with_processor(checkpoint: str) -> str:
    """The checkpoint, or the base of a PEFT adapter that was saved without a processor."""
    if not os.path.isfile(os.path.join(checkpoint, "adapter_config.json")):
        return checkpoint
    if any(os.path.isfile(os.path.join(checkpoint, name)) for name in _PROCESSOR_FILES):
        return checkpoint
    return adapter_base(checkpoint)


def _quantization_config(quantization: str, device: str) -> BitsAndBytesConfig:
    """
    What transformers needs to quantize with bitsandbytes.

    Raises:
        ValueError: for an unknown method, without bitsandbytes, and for a device that it does not support.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"there is no quantization {quantization!r}; choose from {', '.join(get_args(Quantization))}")
    if not is_bitsandbytes_available():
        raise ValueError(
            f"--quantization {quantization} needs the package bitsandbytes; install it with `pip install bitsandbytes`"
        )
    from bitsandbytes import supported_torch_devices

    kind = device.partition(":")[0]
    if kind not in {"auto", *supported_torch_devices}:
        known = ", ".join(sorted(supported_torch_devices))
        raise ValueError(
            f"bitsandbytes cannot quantize on the device {device!r}, only on {known}; leave --quantization or "
            "--device out"
        )
    if quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # As in `transformers serve`. Layers compute in the dtype of what they get, except that for fp16 they must be told.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float16",
    )


def load_engine(
    name: EngineName,
    checkpoint: str,
    *,
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    images_per_prompt: int = 1,
) -> TransformersEngine | VllmEngine:
    """
    Load a checkpoint into an engine.

    Args:
        name (`str`): `"transformers"` or `"vllm"`.
        checkpoint (`str`): a folder or a Hub id.
        batch_size (`int`, *optional*): requests that are worked on at once; by default 8, and with vLLM as many as
            its own default allows.
        dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` for the checkpoint's own, or `"float32"` and so on.
        device (`str`, *optional*): As of [`~inference.loading.load_model_and_processor`]. vLLM runs on what it was
            built for; `"auto"` spreads its model over all GPUs (tensor parallel).
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run code from the checkpoint.
        quantization (`str`, *optional*): As of [`~inference.loading.load_model_and_processor`]; not with vLLM.
        images_per_prompt (`int`, *optional*, defaults to 1): the most images of a request, which vLLM keeps room for.

    Raises:
        ValueError: if the checkpoint cannot be found or is of another kind, the engine has no such device, or vLLM is
            not installed.
    """
    if name == "vllm":
        if quantization is not None:
            raise ValueError(
                f"the engine vllm does not quantize in {quantization} while it loads; give it a checkpoint that is "
                "quantized already, or leave --quantization out"
            )
        return VllmEngine(
            checkpoint,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            images_per_prompt=images_per_prompt,
        )
    model, processor = load_model_and_processor(checkpoint, dtype, device, trust_remote_code, quantization)
    return TransformersEngine(model, processor, batch_size or DEFAULT_BATCH_SIZE)
