"""A small chat model in a folder: the demo's language model with a chat template and an end mark."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minigpt4 import demo


LANGUAGE_MODEL = Path(demo.__file__).parent / "base" / "language_model"
TEMPLATE = (
    "<s>{% for message in messages %}###{% if message.role == 'user' %}Human: {% else %}Assistant: {% endif %}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
)


def save_chat_model(folder: Path) -> str:
    """It writes descriptions of the toy world's images, whatever it is asked."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(LANGUAGE_MODEL),
        AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL),
    )
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("##")  # what `###` begins with
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
