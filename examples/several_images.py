"""
Chat about several images over several turns, with nothing but transformers' chat template.

    minigpt4 demo                        # once, to have a checkpoint
    python examples/several_images.py

Each turn may bring images; the model sees all images and all earlier turns. The demo's tiny model has only ever been
trained on one image and one question, so its answers in later turns show how it works, not how good a real one is.
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_minigpt4  # noqa: F401  (registers MiniGPT-4 with transformers)


parser = argparse.ArgumentParser(description="Chat about several images over several turns.")
parser.add_argument("checkpoint", nargs="?", default="minigpt4-demo/checkpoint", help="folder or Hub id")
args = parser.parse_args()

processor = AutoProcessor.from_pretrained(args.checkpoint)
model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto", device_map="auto")

images = Path(args.checkpoint).parent / "images"
triangle = Image.open(images / "large-yellow-triangle-bottom-left.png")
star = Image.open(images / "small-blue-star-middle-right.png")
circle = Image.open(images / "small-green-circle-top-right.png")
turns = [
    [{"type": "image", "image": triangle}, {"type": "text", "text": "What color is it?"}],
    [{"type": "image", "image": star}, {"type": "image", "image": circle}, {"type": "text", "text": "Where is it?"}],
    [{"type": "text", "text": "What shape is it?"}],  # about what has been shown before
]

chat = []
for content in turns:
    chat.append({"role": "user", "content": content})
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    answer = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])[0].strip()
    chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    seen = sum(part["type"] == "image" for message in chat for part in message["content"])
    print(f"[{seen} image(s), {inputs['input_ids'].shape[1]} prompt tokens] {content[-1]['text']} -> {answer}")
