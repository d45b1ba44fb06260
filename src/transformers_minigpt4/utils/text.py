"""Words of messages that several rooms need."""


def first_line(error: BaseException | str) -> str:
    """The first line that says something, without its full stop; an error's type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)
