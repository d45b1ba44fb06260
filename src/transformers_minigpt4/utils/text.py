"""What several rooms do to texts: for messages, for files, for spreadsheets."""

# Spreadsheets take a cell that begins like this for a formula. With a leading apostrophe they show it as text.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
# C0 and C1 without tab and line feed. A terminal obeys what follows an escape or U+009B.
_CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")})


def first_line(error: BaseException | str) -> str:
    """The first line that says something, without its full stop; an error's type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def without_surrogates(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which JSON can hold and UTF-8, and so files, cannot."""
    return text.encode("utf-8", "replace").decode()


def without_control_characters(text: str) -> str:
    """The text without control characters, except tabs and line feeds; for terminals, which would obey them."""
    return text.translate(_CONTROL)


def spreadsheet_cell(text: str) -> str:
    """A text for a CSV file, so that spreadsheets show it and do not evaluate it as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_spreadsheet_cell(cell: str) -> str:
    """The text that [`spreadsheet_cell`] made a cell of."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
