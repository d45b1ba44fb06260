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


def git_revision(folder: Path | None = None, tracked: Path | None = None) -> str | None:
    """
    Commit of a folder, with `+changes` where it has uncommitted ones; `None` outside of git.

    Args:
        folder (`Path`, *optional*): By default the folder of `tracked`, else the working folder.
        tracked (`Path`, *optional*): A file without which the commit says nothing: `None` if git does not track it,
            as for a package that is installed somewhere inside another repository.
    """
    try:
        if tracked is not None:
            folder = folder or tracked.parent
            _git(folder, "ls-files", "--error-unmatch", str(tracked))
        commit, changes = (_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", ".")))
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(folder: Path | None, *words: str) -> str:
    command = ["git", "-C", str(folder or Path.cwd()), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
