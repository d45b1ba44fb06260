"""Words of messages that several rooms need."""


def first_line(error: BaseException | str) -> str:
    """The first line that says something, without its full stop; an error's type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def without_surrogates(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which JSON can hold and UTF-8, and so files, cannot."""
    return text.encode("utf-8", "replace").decode()
