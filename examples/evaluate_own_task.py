"""
Evaluate a checkpoint on a task of your own.

    minigpt4 demo                        # once, to have a checkpoint
    python examples/evaluate_own_task.py

A task reads questions and scores answers. Batching, resume, confidence intervals and `minigpt4 evaluate compare` work
for it as for the built-in tasks.
"""

import argparse
from pathlib import Path

from transformers_minigpt4.evaluation.evaluator import Metric, Question, Task, mean
from transformers_minigpt4.evaluation.run import evaluate


class ColorAndShape(Task):
    """Asks what color and what shape, and takes the truth from file names such as `small-red-cross-top-left.png`."""

    name, paper, dataset = "color_and_shape", "none", "demo-images"
    description, data = "color and shape of one object", "a folder of images named after what they show"
    prompts = {"color": "What color is it?", "shape": "What shape is it?"}
    generation = {"max_new_tokens": 20}
    metrics = (
        Metric("accuracy", True, "%", mean("correct", scale=100)),
        Metric("accuracy/color", True, "%", mean("correct", scale=100, where=("asked", "color"))),
        Metric("accuracy/shape", True, "%", mean("correct", scale=100, where=("asked", "shape"))),
    )
    primary = "accuracy"

    def questions(self, data, limit=None):
        questions = []
        for path in sorted(data.glob("*.png")):
            _, color, shape, *_ = path.stem.split("-")
            for asked, truth in (("color", color), ("shape", shape)):
                questions.append(
                    Question(f"{path.stem}/{asked}", self.prompts[asked], (path,), truth, {"asked": asked})
                )
        return questions[:limit]

    def score(self, questions, answers, judge=None):
        # A question that failed has no answer, and counts as wrong.
        return [{"correct": q.reference in answers.get(q.id, "").lower().rstrip(".").split()} for q in questions]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint on a task of your own.")
    parser.add_argument("checkpoint", nargs="?", default="minigpt4-demo/checkpoint", help="folder or Hub id")
    parser.add_argument("--output", default="examples-output/evaluation", help="folder for results and answers")
    args = parser.parse_args()

    images = Path(args.checkpoint).parent / "images"
    results = evaluate(args.checkpoint, [ColorAndShape()], images, args.output, batch_size=8)
    result = results["tasks"]["color_and_shape"]
    for name, value in result["metrics"].items():
        low, high = result["intervals"][name]
        print(f"{name}: {value:.1f} % (95 % interval {low:.1f} to {high:.1f})")
    print(f"every answer: {args.output}/answers/color_and_shape.jsonl")
