"""
Fine-tune the projector on your own pairs of image and text with TRL's `SFTTrainer`.

    minigpt4 demo                        # once, to have a checkpoint
    python examples/finetune_own_pairs.py

Starts from the demo's stage-1 checkpoint, which has hardly learned sizes and places yet. The pairs are the demo's
images with a description made from each file name; replace `pairs` with yours. `minigpt4 train` does the same from a
recipe, with the authors' schedule, exact resume and sanity checks.
"""

import argparse
from pathlib import Path

from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from trl import SFTConfig, SFTTrainer

from transformers_minigpt4.training.collator import make_collator
from transformers_minigpt4.training.stages import prepare_stage


parser = argparse.ArgumentParser(description="Fine-tune the projector on your own pairs of image and text.")
parser.add_argument("checkpoint", nargs="?", default="minigpt4-demo/stage1", help="folder or Hub id")
parser.add_argument("--output", default="examples-output/finetuned", help="folder for the trained projector")
args = parser.parse_args()

PROMPT = "Describe this image in detail."


def description(path: Path) -> str:
    """What `large-yellow-triangle-bottom-left.png` shows, in words."""
    size, color, shape, *place = path.stem.split("-")
    return f"The picture shows a {size} {color} {shape}. It is in the {' '.join(place)} of the image."


def describe(checkpoint: str, path: Path) -> str:
    pipe = pipeline("image-text-to-text", model=checkpoint)
    chat = [{"role": "user", "content": [{"type": "image", "url": str(path)}, {"type": "text", "text": PROMPT}]}]
    return pipe(text=chat, return_full_text=False, generate_kwargs={"do_sample": False})[0]["generated_text"].strip()


images = Path(args.checkpoint).parent / "images"
pairs = [(path, description(path)) for path in sorted(images.glob("*.png"))]
rows = [
    {
        "images": [str(path)],
        "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}],
    }
    for path, text in pairs
]
dataset = Dataset.from_list(rows).cast_column("images", List(Image()))

processor = AutoProcessor.from_pretrained(args.checkpoint)
model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="float32")
prepare_stage(model, ["projector"])  # everything else is frozen

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        args.output,
        max_steps=40,
        per_device_train_batch_size=6,
        learning_rate=2e-2,  # for this tiny model; the paper's stage 2 has 3e-5
        lr_scheduler_type="cosine",
        max_length=None,  # truncation would cut image tokens
        activation_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=False,
    ),
    train_dataset=dataset,
    data_collator=make_collator(model, processor),
    processing_class=processor,
)
trainer.train()

# A few megabytes: the projector, and a record of the checkpoint that it was trained on.
model.save_pretrained(args.output, trained_only=True)
processor.save_pretrained(args.output)

path, text = pairs[0]
print("before:", describe(args.checkpoint, path))
print("after: ", describe(args.output, path))
print("wanted:", text)
