"""Versions of packages and the git revision, as results, runs and cards record them."""

import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


PACKAGE = __package__.partition(".")[0]
CORE_PACKAGES = (
    PACKAGE,
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
)


def package_version(name: str) -> str:
    """Version of an installed package, or `"not installed"`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def package_versions(names: Iterable[str] = CORE_PACKAGES) -> dict[str, str]:
    """Versions of Python and of packages, by name."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def git_revision(tracked: Path | None = None) -> str | None:
    """
    Commit of the working folder's repository, with `+changes` if it has uncommitted ones; `None` outside of git.

    Args:
        tracked (`Path`, *optional*): A file whose folder is looked at instead. `None` is returned if git does not
            track it, as for a package that is installed somewhere inside another repository.
    """
    folder = Path.cwd() if tracked is None else tracked.parent
    try:
        if tracked is not None:
            _git(folder, "ls-files", "--error-unmatch", str(tracked))
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", *([] if tracked is None else ["."]))
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
