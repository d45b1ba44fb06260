"""Trains the demo's tokenizer and language model, ahead of time and on text only."""

import json
import random
import string
from dataclasses import dataclass

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_minigpt4.inference.generation import generate_ids

from .make_vision import NUM_QUERY_TOKENS, warmup_cosine
from .scoring import right_attributes
from .texts import (
    DETAIL_PROMPTS,
    IMAGE_TOKEN,
    INSTRUCTIONS,
    QUESTIONS,
    SHORT_PROMPT,
    STAGE_2_TEMPLATE,
    SYSTEM,
    answer,
    detailed_description,
    short_description,
    web_caption,
)
from .world import Scene, held_out_scenes, training_scenes


VOCABULARY = 760
NOISE = 0.5  # largest deviation of the noise on a slot, in units of the embeddings' own


@dataclass
class Example:
    """Ids of one text; `slots` are the positions of the image embeddings, `start` is where the answer begins."""

    ids: list[int]
    slots: range
    start: int


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """
    A LLaMA-1 style tokenizer: BPE with byte fallback, `▁` before every text, no pre-tokenizer, ids 0 to 2 for `<unk>`,
    `<s>`, `</s>`, then 256 bytes, then pieces, and the image token last.
    """
    rng = random.Random(seed)
    scenes = training_scenes()
    corpus = [text for _ in range(4) for scene in scenes for text in _corpus_texts(scene, rng)]
    lesson = Tokenizer(models.BPE())
    lesson.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # During training, pieces neither span words nor mix letters with punctuation; afterwards only the merges decide.
    lesson.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 259 - 6,
        min_frequency=2,
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation],
        show_progress=False,
    )
    lesson.train_from_iterator(corpus, trainer)
    learned = lesson.get_vocab()
    marks = [("#", "#"), ("▁", "##"), ("▁##", "#")]  # as in LLaMA: `▁###` is one piece, `###` inside a text is two
    merges = marks + [pair for pair in _merges(lesson) if "#" not in "".join(pair)]
    pieces = sorted((piece for piece in learned if len(piece) == 1 or "#" not in piece), key=learned.__getitem__)
    pieces += [piece for piece in ("##", "▁##", "▁###") if piece not in pieces]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The learned merges, first learned first; `tokenizers` shows them only in its JSON."""
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _corpus_texts(scene: Scene, rng: random.Random) -> list[str]:
    question = rng.choice(QUESTIONS)
    prompt = rng.choice([*INSTRUCTIONS, *DETAIL_PROMPTS, SHORT_PROMPT])
    return [
        web_caption(scene, rng),
        detailed_description(scene, rng),
        short_description(scene, rng),
        answer(question, scene, rng),
        "###Human: <Img>",
        f"</Img> {prompt} ###Assistant: ",
        f"{SYSTEM}###Human: <Img>",
        f"</Img> {question}###Assistant: ",
        "Human: Continue ###Assistant: ",
    ]


class Writer:
    """Writes the language model's lessons: lists of words in place of the image, and the texts that belong to them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of one text segment, with its own `▁` and without `<s>`."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def slots(self, words: list[str]) -> list[int]:
        """Words in any order, the remaining places filled with repetitions and with pieces that mean nothing here."""
        ids = [self.encode(word)[0] for word in words]
        while len(ids) < NUM_QUERY_TOKENS:
            filler = self.rng.random() < 0.4
            ids.append(
                self.rng.randrange(259, len(self.tokenizer) - 1) if filler else self.encode(self.rng.choice(words))[0]
            )
        self.rng.shuffle(ids)
        return ids

    def example(self, before: str | None, slots: list[int], after: str | None, target: str) -> Example:
        """One text: `<s>`, the text before the image, the image's slots, the text after it, the answer."""
        ids = [self.tokenizer.bos_token_id, *(self.encode(before) if before else [])]
        place = range(len(ids), len(ids) + len(slots))
        ids += slots + (self.encode(after) if after else [])
        return Example(ids + self.encode(target), place, len(ids))

    def caption(self, scene: Scene) -> Example:
        """The format of stage 1: no prompt; the list may leave out what the caption does not say."""
        text = web_caption(scene, self.rng)
        words = list(scene.words)
        if self.rng.random() < 0.3:
            words = [word for word in words if word in text.split()]
        return self.example(None, self.slots(words), None, text + "\n")

    def instruction(self, scene: Scene) -> Example:
        """The format of stage 2, `###Human: <Img>...</Img> instruction ###Assistant: `."""
        prompt, target = self._request(scene)
        before, after = STAGE_2_TEMPLATE.format(image="\0", text=prompt).split("\0")
        if prompt == DETAIL_PROMPTS[-1] and self.rng.random() < 0.5:  # the curation's own spacing
            after = f"</Img>{prompt} ###Assistant:"
        return self.example(before, self.slots(list(scene.words)), after, target + "###")

    def chat(self, scene: Scene) -> Example:
        """The format of the chat, with one or two turns; earlier answers are part of the prompt."""
        before = f"{SYSTEM}###Human: <Img>"
        prompt, target = self._request(scene, questions=0.8)
        after = f"</Img> {prompt}###Assistant: "
        if self.rng.random() < 0.35:
            second, second_target = self._request(scene, questions=0.9)
            after += f"{target}###Human: {second}###Assistant: "
            target = second_target
        return self.example(before, self.slots(list(scene.words)), after, target + "###")

    def _request(self, scene: Scene, questions: float = 0.1) -> tuple[str, str]:
        if self.rng.random() < questions:
            question = self.rng.choice(QUESTIONS)
            return question, answer(question, scene, self.rng)
        if self.rng.random() < 0.1:
            return SHORT_PROMPT, short_description(scene, self.rng)
        return self.rng.choice([*INSTRUCTIONS, *DETAIL_PROMPTS]), detailed_description(scene, self.rng)


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `labels` (answers only) and `slots` (positions with noise), each `(B, T)`."""
    length = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    slots = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, example.start : len(example.ids)] = torch.tensor(example.ids[example.start :])
        slots[row, example.slots.start : example.slots.stop] = True
    return {"input_ids": ids, "labels": labels, "slots": slots}


def noisy_embeddings(model: LlamaForCausalLM, ids: torch.Tensor, slots: torch.Tensor, noise: float) -> torch.Tensor:
    """Embeddings `(B, T, D)` with scaled and noisy slots, since no projector will hit a word's embedding exactly."""
    embeddings = model.model.embed_tokens(ids)
    size = model.model.embed_tokens.weight[3:].detach().std()
    shape = (*ids.shape, 1)
    if not noise:
        return embeddings
    scale = torch.exp(0.4 * torch.randn(shape))
    disturbed = scale * embeddings + noise * torch.rand(shape) * size * torch.randn_like(embeddings)
    return torch.where(slots.unsqueeze(-1), disturbed, embeddings)


def train_language(
    tokenizer: PreTrainedTokenizerFast, steps: int = 1000, batch: int = 32, lr: float = 2e-3, seed: int = 0
) -> LlamaForCausalLM:
    """Trains the language model in fp32 on the three formats, caption, instruction and chat, in turn."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.05,
        )
    )
    writer = Writer(tokenizer, rng)
    formats = [writer.caption, writer.instruction, writer.instruction, writer.chat]
    scenes = training_scenes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 100, steps))
    for step in range(steps):
        make = formats[step % len(formats)]
        rows = collate([make(rng.choice(scenes)) for _ in range(batch)])
        embeddings = noisy_embeddings(model, rows["input_ids"], rows["slots"], NOISE)
        loss = model(inputs_embeds=embeddings, labels=rows["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 >= 96:
            print(f"language step {step + 1}/{steps} {make.__name__} loss {loss.item():.4f}", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"language step {step + 1}: held-out {describe_lists(model, tokenizer, seed)}", flush=True)
    return model.eval()


@torch.no_grad()
def describe_lists(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 64) -> str:
    """Share of attributes right when the model describes lists of held-out combinations, without and with noise."""
    shares = []
    for noise in (0.0, NOISE):
        writer = Writer(tokenizer, random.Random(seed + 5))
        scenes = writer.rng.sample(held_out_scenes(), count)
        before, after = STAGE_2_TEMPLATE.format(image="\0", text=INSTRUCTIONS[0]).split("\0")
        examples = [writer.example(before, writer.slots(list(scene.words)), after, "") for scene in scenes]
        rows = collate([Example(example.ids[: example.start], example.slots, 0) for example in examples])
        embeddings = noisy_embeddings(model, rows["input_ids"], rows["slots"], noise)
        attention = torch.ones(rows["input_ids"].shape, dtype=torch.long)
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention}
        ids = generate_ids(model, inputs, max_new_tokens=80, do_sample=False)
        texts = [text.split("###")[0] for text in tokenizer.batch_decode(ids)]
        right = [sum(right_attributes(text, scene).values()) for text, scene in zip(texts, scenes)]
        shares.append(f"{sum(right) / (4 * count):.3f}")
    return f"right {shares[0]}, with noise {shares[1]}; {texts[0]!r}"
