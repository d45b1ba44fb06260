"""
What the commands of all rooms share: options that mean the same everywhere, the look of help, errors in one line.

Light on purpose: typer is all that it imports, so that help is quick.
"""

import contextlib
import logging as std_logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import dedent, indent
from typing import Annotated, Any, Literal, TypeAlias

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from .disk_full import is_disk_full
from .interrupts import INTERRUPTED, Message, stoppable, text_of
from .text import without_control_characters


EXAMPLES = "\nExamples:\n"  # heading in a command's docstring; what follows is printed verbatim at the end of its help

# Typer bundles its own copy of click and exports none of its types.
ClickContext: TypeAlias = Any
ClickParameters: TypeAlias = list[Any]
ClickFormatter: TypeAlias = Any

BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="NUMBER",
        help="Inputs that go through the model at once. By default 8; vLLM chooses by itself.",
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Such as cpu or cuda:1; auto spreads the model over all GPUs. By default the first GPU, else the CPU.",
    ),
]
DType: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Data type of the weights; auto is the one they are stored in."),
]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")]
EngineOption: TypeAlias = Annotated[
    Literal["transformers", "vllm"],
    typer.Option("--engine", help="What runs the model: transformers, or vLLM, which needs its own environment."),
]
Host: TypeAlias = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; the default is this machine only.")
]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace --output if it exists.")]
Port: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--port", min=1, max=65535, metavar="PORT", help="Port to listen on.", show_default="first free one from 7860"
    ),
]
PromptFormat: TypeAlias = Annotated[
    Literal[
        "stage1",
        "stage2",
        "stage2_llama2",
        "messages",
        "llava_plain",
        "llava_v0",
        "llava_v1",
        "llava_v0_mmtag",
        "llava_v1_mmtag",
        "llava_llama_2",
    ],
    typer.Option("--prompt-format", help="Format of the training rows."),
]
Quantization: TypeAlias = Annotated[
    Literal["bnb-4bit", "bnb-8bit"] | None,
    typer.Option(
        "--quantization", help="Quantize while loading, with bitsandbytes: a quarter or half of the memory of 16 bits."
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, metavar="NUMBER", help="Seed for everything that is drawn at random.")
]
TrustRemoteCode: TypeAlias = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code that comes with the checkpoint to run.")
]


def echo(text: str = "", nl: bool = True, err: bool = False) -> None:
    """
    Writes text that others wrote, such as a model, to stdout.

    Control characters are left out, so that no text can move the cursor or change a terminal's title.

    Args:
        text (`str`): What to write.
        nl (`bool`, *optional*, defaults to `True`): Whether to end the line.
        err (`bool`, *optional*, defaults to `False`): Write to stderr instead.
    """
    typer.echo(without_control_characters(text), nl=nl, err=err)


def complain(message: str) -> None:
    """Writes one line to stderr, with the name of the program in front."""
    echo(f"minigpt4: {message}", err=True)


@contextlib.contextmanager
def interruptible(message: Message) -> Iterator[None]:
    """
    Turns Ctrl-C into one line on stderr and exit status 130.

    Every command is in such a block already, whose line says that nothing can be resumed; a block inside of it takes
    precedence.

    Args:
        message (`str` or `Callable`): What has been kept and, from [`this_command`], how to resume; or a function that
            returns it.
    """
    with stoppable(message):
        try:
            yield
        except BaseException as error:
            if not _is_interrupt(error):
                raise
            complain(text_of(message))
            raise typer.Exit(INTERRUPTED) from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or what a library that was being imported made of it."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, typer.Exit)):
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


_running: list[str] = []  # the words of the command that runs in this process


def this_command(*options: str) -> str:
    """
    The command line that is being run, as one types it in a shell.

    Args:
        options (`str`): An option and its value, such as `"--resume-from-checkpoint", "true"`, added to the command or
            in place of that option's value.
    """
    words, found = iter(_running), []
    for word in words:
        name, equals, _ = word.partition("=")
        if options and name.startswith("--") and name.replace("_", "-") == options[0]:
            if not equals:
                next(words, None)
        else:
            found.append(word)
    return shlex.join(["minigpt4", *found, *options])


def restart() -> str:
    """What to say at Ctrl-C where nothing can be resumed."""
    return f"nothing can be resumed, `{this_command()}` starts again from the beginning"


def _words_of(ctx: ClickContext, args: list[str]) -> list[str]:
    """The words of a command line after `minigpt4`, without the options of the program."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name)
        ctx = ctx.parent
    return [*names, *args]


class Command(TyperCommand):
    """
    A subcommand: errors are one line, libraries are quiet, `--batch_size` is `--batch-size`, metavars are capitals.

    Examples in the docstring of its function come at the end of its help as they are.
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.help, self.examples = _without_examples(self.help)
        for parameter in self.params:
            if parameter.metavar is None and isinstance(parameter, (TyperArgument, TyperOption)):
                parameter.metavar = _metavar(parameter)

    def parse_args(self, ctx: ClickContext, args: list[str]) -> list[str]:
        """Parses the words of a command line; underscores in the names of options are read as dashes."""
        _running[:] = _words_of(ctx, args)
        return super().parse_args(ctx, _with_dashes(args, self.params))

    def invoke(self, ctx: ClickContext) -> object:
        """Runs the command."""
        with one_line_errors(ctx):
            quieten_libraries(ctx.obj)
            with interruptible(self.when_stopped):
                return super().invoke(ctx)

    def when_stopped(self) -> str:
        """What Ctrl-C says outside of the command's own blocks, see [`interruptible`]."""
        return f"stopped; {restart()}"

    def get_params(self, ctx: ClickContext) -> ClickParameters:
        """Arguments and options, `--help` among them."""
        return _off_by_default(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: ClickContext) -> list[str]:
        """What follows the command's name in its usage line."""
        arguments = [parameter for parameter in self.params if isinstance(parameter, TyperArgument)]
        shown = [str(argument.metavar) if argument.required else f"[{argument.metavar}]" for argument in arguments]
        return [*shown, self.options_metavar or ""]

    def format_options(self, ctx: ClickContext, formatter: ClickFormatter) -> None:
        """Writes arguments and options, the latter in groups where they name one (`rich_help_panel`)."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(parameter, TyperArgument):
                sections["Arguments"].append((str(parameter.metavar), record[1]))
            else:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: ClickContext, formatter: ClickFormatter) -> None:
        """Writes the examples."""
        formatter.write(self.examples)


class Group(TyperGroup):
    """Subcommands; `panels` says in which groups help lists them, and all others are under `Commands`."""

    panels: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.help, self.examples = _without_examples(self.help)

    def format_epilog(self, ctx: ClickContext, formatter: ClickFormatter) -> None:
        """Writes the examples."""
        formatter.write(self.examples)

    def get_params(self, ctx: ClickContext) -> ClickParameters:
        """Arguments and options, `--help` among them."""
        return _off_by_default(super().get_params(ctx))

    def format_commands(self, ctx: ClickContext, formatter: ClickFormatter) -> None:
        """Writes the subcommands with the first sentence of their help."""
        names = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        limit = formatter.width - 6 - max(map(len, names))
        grouped = {name for group in self.panels.values() for name in group}
        rest = tuple(name for name in names if name not in grouped)
        for title, group in {**self.panels, **({"Commands": rest} if rest else {})}.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit)) for name in group])


def _without_examples(help: str | None) -> tuple[str, str]:
    """A help text, and its examples as they are printed."""
    text, heading, examples = (help or "").partition(EXAMPLES)
    return text, heading + indent(dedent(examples), "  ") + "\n" if heading else ""


def _off_by_default(parameters: ClickParameters) -> ClickParameters:
    """Gives typer's own flags, such as `--help`, `False` for `None`, for which it would import pydantic."""
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag and not parameter.secondary_opts:
            parameter.default = parameter.default or False
    return parameters


def _with_dashes(words: list[str], parameters: ClickParameters) -> list[str]:
    """The words of a command line with dashes in the names of options, and with values as they were."""
    options = {
        name: parameter
        for parameter in parameters
        if isinstance(parameter, TyperOption)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    found: list[str] = []
    is_value = False
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if word == "--":
            return found + words[number:]
        if not is_value and dashed in options:
            found.append(dashed + equals + value)
            is_value = not equals and not options[dashed].is_flag
        else:
            found.append(word)
            is_value = False
    return found


def _metavar(parameter: TyperArgument | TyperOption) -> str:
    kind = parameter.type_descriptor
    if isinstance(parameter, TyperArgument):
        return parameter.name.upper()
    if kind.choices is not None:
        return f"[{'|'.join(map(str, kind.choices))}]"
    names: dict[object, str] = {int: "NUMBER", float: "NUMBER", Path: "PATH"}
    return names.get(kind.annotation, "TEXT")


@contextlib.contextmanager
def one_line_errors(context: ClickContext) -> Iterator[None]:
    """Turns whatever goes wrong into one line on stderr and exit status 1; with `--debug`, lets the trace through."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if context.obj is True:
            raise
        complain(_one_line(error))
        raise typer.Exit(1) from error


@contextlib.contextmanager
def usage_errors(context: ClickContext) -> Iterator[None]:
    """Turns a `ValueError` about what was typed into one line on stderr and exit status 2, as for unknown options."""
    try:
        yield
    except ValueError as error:
        if context.obj is True:
            raise
        complain(_one_line(error))
        raise typer.Exit(2) from error


# Raised with a message of one's own, rather than by the system with a file name.
_EXPLAINED = (ValueError, OSError, FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError)


def _one_line(error: BaseException) -> str:
    """The first line of an error that explains itself, preceded by its type if it may not."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name, because torch need not be imported yet
        return "the device is out of memory; lower --batch-size, set --dtype bfloat16, or spread with --device auto"
    explained = type(error) in _EXPLAINED or type(error).__module__.startswith("transformers_minigpt4")
    if is_disk_full(error) and (not explained or getattr(error, "errno", None) is not None):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return (
            f"{where}no space is left on the disk; free some, or choose a place on another disk, and run the command "
            "again. What was written completely is kept"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if explained:
        return line or type(error).__name__
    return f"{type(error).__name__}: {line} (`minigpt4 --debug ...` shows the trace)"


def quieten_libraries(debug: bool) -> None:
    """Silences what libraries log, but not the progress bars of downloads."""
    if debug is True:
        return
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    # One line for each matrix product in 8 bits.
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)
    logging.disable_progress_bar()
    # That silenced downloads too, and ten gigabytes without a sign of life look like a hang.
    enable_progress_bars()


def to_stdout_in_utf8() -> None:
    """Makes standard output UTF-8 whatever the locale: JSON is, and no caption's character may end a run."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8")
