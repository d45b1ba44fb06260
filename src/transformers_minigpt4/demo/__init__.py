"""The small world of coloured shapes on which `minigpt4 demo` trains and shows the two stages."""

from .run import run_demo


__all__ = ["run_demo"]
