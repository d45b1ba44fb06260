"""
Caption a folder of images and save the result as a dataset.

    minigpt4 demo                        # once, to have a checkpoint
    python examples/caption_folder.py

Works with any image-text-to-text checkpoint that has a chat template. `minigpt4 describe` does the same from the
command line, with resume and one record per unreadable file.
"""

import argparse
from pathlib import Path

from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_minigpt4  # noqa: F401  (registers MiniGPT-4 with transformers)


parser = argparse.ArgumentParser(description="Caption a folder of images and save the result as a dataset.")
parser.add_argument("checkpoint", nargs="?", default="minigpt4-demo/checkpoint", help="folder or Hub id")
parser.add_argument("--images", help="folder of images (default: `images` next to the checkpoint)")
parser.add_argument("--output", default="examples-output/captions", help="folder for the dataset")
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.checkpoint)
model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto", device_map="auto")


def caption(batch: dict) -> dict:
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image.convert("RGB")},
                    {"type": "text", "text": "Describe this image in detail."},
                ],
            }
        ]
        for image in batch["image"]
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, dtype=model.dtype)
    ids = model.generate(**inputs, do_sample=False)
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    return {"caption": [text.strip() for text in processor.post_process_image_text_to_text(new_ids)]}


folder = Path(args.images or Path(args.checkpoint).parent / "images")
files = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
dataset = Dataset.from_dict({"image": files}).cast_column("image", Image())
dataset = dataset.map(caption, batched=True, batch_size=8)

dataset.save_to_disk(args.output)  # or: dataset.push_to_hub("me/my-captions")
print(f"{len(dataset)} captions in {args.output}. The first: {dataset[0]['caption']}")
