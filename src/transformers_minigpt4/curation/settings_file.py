"""The YAML file with a project's settings: read with one clear error, written with the defaults as comments."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from transformers_minigpt4.llm.types import ChatSettings
from transformers_minigpt4.utils.settings import Dataclass, field_values
from transformers_minigpt4.utils.text import first_line, without_surrogates


Config = TypeVar("Config", bound=Dataclass)


class CurationError(ValueError):
    """A project or step that cannot continue; the message says what was given, why it fails and what to do."""


@dataclass(frozen=True)
class SettingsFile(Generic[Config]):
    """
    How one kind of project keeps its settings: every field of a dataclass is a key, and so is every field of the
    `ChatSettings` in it.

    Args:
        name: Of the file in the project's folder.
        config: The dataclass. Fields without a default are keys that the file must have.
        chat: Its field that holds `ChatSettings`, or `None`.
        prefix: What precedes the names of the fields of `ChatSettings`.
        guide: The page that explains the settings.
        init: The command that creates a project; `{folder}` becomes the folder's name.
    """

    name: str
    config: type[Config]
    chat: str
    prefix: str
    guide: str
    init: str

    def read(self, path: Path) -> Config:
        """
        The settings in a file.

        Raises:
            CurationError: for a file that is missing or not YAML, and for unknown keys or values that cannot work.
        """
        values = self._values(path)
        try:
            chat = ChatSettings.from_options(values, self.prefix)
            return self.config(**field_values(self.config, values), **{self.chat: chat})
        except CurationError:
            raise
        except ValueError as error:
            raise CurationError(f"{path}: {error}") from error

    def text(self, config: Config) -> str:
        """The file's content: settings that differ from the defaults, and all others as comments."""
        lines = [f"# Settings of a project; {self.guide} explains them. The commented ones are defaults."]
        for name, value, default in self._flat(config):
            lines.append(_line(name, value) if value != default else f"# {_line(name, value)}")
        return "\n".join(lines) + "\n"

    def _values(self, path: Path) -> dict[str, Any]:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            create = self.init.format(folder=path.parent)
            raise CurationError(f"there is no {path}; create a project with `{create}`") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CurationError(f"{path} is not YAML: {first_line(error)}") from error
        except RecursionError:
            raise CurationError(f"{path} is nested too deeply; write one `key: value` per line") from None
        if not isinstance(values, dict):
            raise CurationError(f"{path} holds no settings; write lines such as `seed: 42`")
        known = [name for name, _, _ in self._flat()]
        if unknown := [str(key) for key in values if key not in known]:
            raise CurationError(f"{path} has unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
        needed = [own.name for own in fields(self.config) if own.default is own.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise CurationError(f"{path} lacks {' and '.join(missing)}")
        if broken := [name for name, value in values.items() if isinstance(value, str) and not _encodes(value)]:
            raise CurationError(
                f"{path}: {broken[0]} contains half a surrogate pair, which is no character; remove it"
            )
        optional = {own.name for own in fields(self.config) if own.default_factory is not MISSING}
        # `rules:` without a value means the default.
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def _flat(self, config: Config | None = None) -> Iterator[tuple[str, object, object]]:
        """The file's keys, each with its value in a configuration and its default (`None` without one)."""
        chat = getattr(config, self.chat, None)
        for part in fields(self.config):
            if part.name == self.chat:
                for own in fields(ChatSettings):
                    default = None if own.default is MISSING else own.default
                    yield self.prefix + own.name, getattr(chat, own.name, default), default
            else:
                default = part.default_factory() if callable(part.default_factory) else part.default
                yield part.name, getattr(config, part.name, default), default


def _line(name: str, value: object) -> str:
    # `None`: a list or a flat object on one line, so that it can be a comment.
    flow = None if isinstance(value, (list, dict)) else False
    text = yaml.safe_dump({name: value}, allow_unicode=True, width=10_000, sort_keys=False, default_flow_style=flow)
    return str(text).strip()


def _encodes(text: str) -> bool:
    return without_surrogates(text) == text
