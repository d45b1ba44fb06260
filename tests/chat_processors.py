"""Processors with the chat templates of real language models, and tokenizers of their kinds."""

import functools
from pathlib import Path

import trl
from golden_model import GOLDEN
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BlipImageProcessorPil, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transformers_minigpt4 import MiniGPT4Processor
from transformers_minigpt4.processing.chat_templates_minigpt4 import with_images


_OWN = Path(__file__).parent / "chat_templates"
TRLS = Path(trl.__file__).parent / "chat_templates"
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
_PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

# By name: the template's file, special tokens of a byte-level tokenizer or of a sentencepiece one, and `bos`, `eos`.
TEMPLATES = {
    "qwen3": (TRLS / "qwen3.jinja", "bytes", _CHATML, (None, "<|im_end|>")),
    "qwen2_5": (TRLS / "qwen2_5.jinja", "bytes", _CHATML, (None, "<|im_end|>")),
    "smollm2": (_OWN / "smollm2.jinja", "bytes", _CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": (TRLS / "llama3.jinja", "bytes", _LLAMA_3, ("<|begin_of_text|>", "<|eot_id|>")),
    "llama3_2": (TRLS / "llama3_2.jinja", "bytes", _LLAMA_3, ("<|begin_of_text|>", "<|eot_id|>")),
    "phi3": (TRLS / "phi3.jinja", "pieces", _PHI_3, ("<s>", "<|endoftext|>")),
    "gemma3": (TRLS / "gemma3.jinja", "pieces", _GEMMA, ("<s>", "</s>")),
    "mistral": (_OWN / "mistral.jinja", "pieces", (), ("<s>", "</s>")),
    "vicuna_v1": (_OWN / "vicuna_v1.jinja", "pieces", (), ("<s>", "</s>")),
    "llama2_chat": (_OWN / "llama2_chat.jinja", "pieces", (), ("<s>", "</s>")),
    # A base that was made before its template's marks became special tokens.
    "chatml_in_words": (TRLS / "qwen2_5.jinja", "pieces", (), ("<s>", "</s>")),
}


@functools.cache
def chat_processor(name: str) -> MiniGPT4Processor:
    """A processor with a real template; `vicuna_v0` and `llama_2` are the authors' own."""
    if name not in TEMPLATES:
        return _processor(_pieces((), ("<s>", "</s>")), chat_template=name)
    path, kind, special, ends = TEMPLATES[name]
    tokenizer = _bytes(special, ends) if kind == "bytes" else _pieces(special, ends)
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return _processor(tokenizer)


def framed(template: str, name: str = "vicuna_v1") -> MiniGPT4Processor:
    """A processor for another template, with the tokenizer of a named one."""
    return _processor(chat_processor(name).tokenizer, chat_template=with_images(template))


def _processor(tokenizer: PreTrainedTokenizerBase, **options) -> MiniGPT4Processor:
    images = BlipImageProcessorPil(size={"height": 56, "width": 56})
    return MiniGPT4Processor(images, tokenizer, image_seq_length=4, **options)


def _bytes(special, ends) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(["user\nWhat is this? assistant\n\nA red car. It is blue."] * 9, trainer)
    backend.add_special_tokens([AddedToken(token) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=ends[0], eos_token=ends[1], pad_token="<|endoftext|>"
    )


def _pieces(special, ends) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    # Phi-3's and Gemma's tokens of turns: Phi-3's take the white space after them.
    tokenizer.add_tokens([AddedToken(token, rstrip=token in _PHI_3, special=True) for token in special])
    tokenizer.bos_token, tokenizer.eos_token = ends
    return tokenizer
