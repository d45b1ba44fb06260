"""What `verify` reports: one line for each check."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from transformers_minigpt4.modeling.modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from transformers_minigpt4.processing.processing_minigpt4 import MiniGPT4Processor


# What can be checked; LLaVA with a linear projector is a class derived from transformers'.
Model: TypeAlias = MiniGPT4ForConditionalGeneration | LlavaForConditionalGeneration
Processor: TypeAlias = MiniGPT4Processor | LlavaProcessor
Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One check: its name, how it went, what was found, and what to do about it."""

    name: str
    status: Status
    detail: str
    advice: str = ""


@dataclass
class Report:
    """What `verify_checkpoint` found."""

    checkpoint: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings and what could not be checked do not count."""
        return all(check.status != "fail" for check in self.checks)

    def __str__(self) -> str:
        lines = [self.checkpoint]
        for check in self.checks:
            lines.append(f"{check.status:<5} {check.name:<17} {check.detail}")
            if check.advice and check.status != "ok":
                lines.append(f"{'':<23} -> {check.advice}")
        counts = Counter[str](check.status for check in self.checks)
        words = {"ok": "ok", "warn": "warn", "fail": "fail", "skip": "not checked"}
        summary = ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
        return "\n".join([*lines, f"{'passed' if self.ok else 'FAILED'}: {summary}"])


__all__ = ["Check", "Model", "Processor", "Report", "Status"]
