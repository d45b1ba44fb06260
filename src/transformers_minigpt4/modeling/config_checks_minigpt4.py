"""What a config must be before anything is built from it: the sizes that it names, and why it could not be read."""

import os
from collections.abc import Mapping

from huggingface_hub.errors import StrictDataclassError


# What classes of configs raise for values that they do not expect.
CONFIG_ERRORS = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

# The largest value of each size; the smallest is 1, of experts 0. These are several times what released models have,
# and small enough that building a model without memory for its weights, which shows all its shapes, takes seconds.
LARGEST = {
    "num_hidden_layers": 1_000,  # 126 in Llama 3.1 405B; building 1,000 takes 2 s
    "hidden_size": 2**17,  # 16,384 in Llama 3.1 405B
    "encoder_hidden_size": 2**17,
    "intermediate_size": 2**20,  # 53,248 in Llama 3.1 405B
    "num_attention_heads": 2**12,  # 128 in Llama 3.1 405B
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,  # 256 in Gemma
    "num_experts": 2**16,  # 16,384 in Doge
    "num_local_experts": 2**16,  # 0 in the dense Granite 4.0
    "n_routed_experts": 2**16,
    "vocab_size": 2**22,  # 262,208 in Gemma 3
    "max_position_embeddings": 2**31,  # 10 * 2**20 in Llama 4 Scout; positions are counted, not stored
    "image_size": 2**13,  # pixels; 1,024 in the largest towers, and every image is resized to it
    "patch_size": 2**13,
    "num_channels": 2**8,
    "cross_attention_frequency": 1_000,
}
_LONGEST = 240  # characters of a library's message
_PAIRS = ("image_size", "patch_size")  # a number, or height and width
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_sizes(section: str, values: Mapping[str, object]) -> None:
    """
    Checks the sizes in (a section of) a config.

    Args:
        section (`str`): Its key, such as `text_config`; empty for the outermost.
        values (`Mapping`): Its content; what is absent or `None` is left to its own class.

    Raises:
        ValueError: for a size that is not a whole number, or out of range; names key, value and range.
    """
    for key, largest in LARGEST.items():
        value = values.get(key)
        if value is None:
            continue
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if key in _PAIRS and isinstance(value, (list, tuple)) and len(numbers) != 2:
            raise ValueError(
                f"{_full_name(section, key)} is {_short(value)}; it must be one number, or height and width."
            )
        smallest = 0 if key in _EXPERTS else 1
        if not numbers or not all(type(number) is int and smallest <= number <= largest for number in numbers):
            raise ValueError(
                f"{_full_name(section, key)} is {_short(value)}; it must be a whole number from {smallest} to "
                f"{largest:,}."
            )
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            f"{_full_name(section, 'num_attention_heads')}={heads} is not a multiple of num_key_value_heads={shared}."
        )


def sizes_of(config: object) -> dict[str, object]:
    """The sizes of a config by their general names, whatever its class calls them."""
    return {key: value_of(config, key) for key in LARGEST}


def value_of(config: object, key: str) -> object:
    """The value of a key, or `None`; some configs, such as Gemma 4's, give none where it differs between layers."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def config_file(name_or_path: str | os.PathLike[str] | None) -> str:
    """What the config of a folder or Hub id is called in messages; empty for one that came from neither."""
    if not name_or_path:
        return ""
    name = str(name_or_path)
    return os.path.join(name, "config.json") if os.path.isdir(name) else name


def reason(error: BaseException) -> str:
    """Why a config was refused, in one line; the error's type too where its own words do not explain it."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # which names the field; what precedes it takes a line
        explains = True
    else:
        explains = type(error) is ValueError
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"  # some list every model of transformers
    return text if explains and text else f"{type(error).__name__}: {text}"


def _full_name(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
