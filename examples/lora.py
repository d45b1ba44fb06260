"""
Train LoRA adapters on the language model together with the projector, then merge them.

    minigpt4 demo                        # once, to have a checkpoint
    python examples/lora.py

Plain TRL and PEFT. The recipes `minigpt4_stage2_lora` and `minigpt4_stage2_qlora` do this at full size.
"""

import argparse
from pathlib import Path

from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from trl import SFTConfig, SFTTrainer

from transformers_minigpt4.training.collator import make_collator


parser = argparse.ArgumentParser(description="Train LoRA adapters together with the projector, then merge them.")
parser.add_argument("checkpoint", nargs="?", default="minigpt4-demo/checkpoint", help="folder or Hub id")
parser.add_argument("--output", default="examples-output/lora", help="folder for the adapters and the merged model")
args = parser.parse_args()

# The demo's images, and a question about each with the answer from its file name.
rows = []
for path in sorted((Path(args.checkpoint).parent / "images").glob("*.png")):
    size, color, shape, *_ = path.stem.split("-")
    question, answer = f"Is the {shape} large or small?", f"The {color} {shape} is {size}."
    rows.append(
        {
            "images": [str(path)],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
    )
dataset = Dataset.from_list(rows).cast_column("images", List(Image()))

processor = AutoProcessor.from_pretrained(args.checkpoint)
model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="float32")

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        args.output,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=5e-3,  # for this tiny model
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
    peft_config=LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        # The vision tower has layers of the same names, hence the pattern.
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    ),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model()  # adapters and projector, in PEFT's own format

base = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="float32")
merged = PeftModel.from_pretrained(base, args.output).merge_and_unload()
merged.save_pretrained(f"{args.output}/merged")  # loads without PEFT; `minigpt4 merge` does the same
processor.save_pretrained(f"{args.output}/merged")

pipe = pipeline("image-text-to-text", model=f"{args.output}/merged")
image, question = rows[0]["images"][0], rows[0]["messages"][0]["content"]
chat = [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}]
answer = pipe(text=chat, return_full_text=False, generate_kwargs={"do_sample": False})[0]["generated_text"]
print(question, "->", answer.strip())
print(f"adapters in {args.output}, complete model in {args.output}/merged")
