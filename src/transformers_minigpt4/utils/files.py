"""Files and folders that are replaced atomically, JSON Lines that survive a kill, and a lock on a folder."""

import contextlib
import ctypes
import glob
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from filelock import FileLock, Timeout

from .disk_full import naming_path
from .text import without_control_characters


PathLike: TypeAlias = "str | os.PathLike[str]"
JsonObject: TypeAlias = dict[str, Any]
LOCK_FILE = ".lock"
# Functions of the C library that exchange two names, with their arguments; None stands for a path. -100 is the
# working folder (AT_FDCWD), 2 the flag (RENAME_EXCHANGE in renameat2(2), RENAME_SWAP in rename(2) of macOS).
_EXCHANGES: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
    "linux": ("renameat2", (-100, None, -100, None, 2)),
    "darwin": ("renamex_np", (None, None, 2)),
}


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """
    Yields a path next to `path`; what is written there takes the name `path` at the end, or vanishes on an error.

    Args:
        path (`str` or `os.PathLike`): The file to write. Its folder must exist.
    """
    path = Path(path)
    scratch = _beside(path, "tmp")
    try:
        with naming_path(path):
            yield scratch
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_atomically(path: PathLike, content: str | bytes, sync: bool = False) -> None:
    """
    Writes a file so that readers see the old content or the new.

    Args:
        path (`str` or `os.PathLike`): The file to write. Its folder must exist.
        content (`str` or `bytes`): Text is written as UTF-8.
        sync (`bool`, *optional*, defaults to `False`): Waits until it is on the disk, so that it survives a power cut.
    """
    with atomic_file(path) as scratch, open(scratch, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: PathLike, content: object) -> None:
    """Writes an indented JSON file in one step."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, (text if _is_unicode(text) else json.dumps(content, indent=1)) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: PathLike, locked: bool = False, overwrite: bool = True) -> Iterator[Path]:
    """
    Yields an empty folder next to `folder`, which replaces it at the end, or vanishes on an error.

    Args:
        folder (`str` or `os.PathLike`): The folder to make or to replace. Its parent is created. See
            [`replace_folder`] for what a kill leaves.
        locked (`bool`, *optional*, defaults to `False`): Whether the caller holds a lock on it, so that what killed
            calls have left next to it can be deleted.
        overwrite (`bool`, *optional*, defaults to `True`): Whether a folder with content is replaced.

    Raises:
        FileExistsError: without `overwrite`, when somebody else has put something into `folder` in the meantime.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover_folder(folder)
    if locked:
        for scratch in _all_beside(folder, "tmp"):
            shutil.rmtree(scratch, ignore_errors=True)
    scratch = _beside(folder, "tmp")
    scratch.mkdir()
    try:
        with naming_path(folder):
            yield scratch
            if overwrite:
                replace_folder(scratch, folder)
            else:
                _fill_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """
    Moves a complete folder to the name `folder`; what had that name is deleted.

    Linux and macOS exchange the two in one step, so at every moment, and after a kill at any, there is one complete
    folder of that name. What a kill leaves to be deleted, the next call deletes. Where the system or the file system
    cannot (Windows, some network drives), the old folder is moved away first; after a kill in between there is none
    until the next call for the same name, which puts the old one back.

    Args:
        new (`Path`): A folder on the same file system.
        folder (`Path`): Its future name. A folder there is put back if `new` cannot be moved.
    """
    old = _beside(folder, "old")  # deleting takes time, and a kill would leave half of it
    exchanged = folder.is_dir() and _exchange(new, folder)
    if folder.exists():
        os.replace(new if exchanged else folder, old)
    try:
        if not exchanged:
            os.replace(new, folder)
    finally:
        _recover_folder(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step, which Python has no function for; `False` where it cannot."""
    if sys.platform not in _EXCHANGES or not first.is_dir():
        return False
    name, arguments = _EXCHANGES[sys.platform]
    function = getattr(ctypes.CDLL(None), name, None)
    if function is None:
        return False
    folders = [os.fsencode(first), os.fsencode(second)]
    failed: int = function(*(folders.pop(0) if argument is None else argument for argument in arguments))
    return not failed


def _fill_folder(new: Path, folder: Path) -> None:
    """Moves a complete folder to a name that is free, or that of an empty folder."""
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        os.rename(new, folder)  # fails for a folder with content
    except OSError as error:
        if not folder.exists():
            raise
        raise FileExistsError(
            f"{folder} was empty at the start, but has content now: another program writes there. It was left as it "
            "is; name another folder."
        ) from error


def _recover_folder(folder: Path) -> None:
    """Gives an old folder its name back if nothing has taken its place, and deletes it otherwise."""
    for old in _all_beside(folder, "old"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, folder)


def flush_folder(folder: Path) -> None:
    """Waits until everything in a folder is on the disk, so that renaming it cannot get ahead of its content."""
    windows = os.name == "nt"  # which opens no folders, and flushes only what is open for writing
    for path in (*folder.rglob("*"), folder):
        if windows and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(path: PathLike) -> None:
    """Deletes what killed calls of [`atomic_file`] for a file have left; nobody else may be writing it."""
    for scratch in _all_beside(Path(path), "tmp"):
        scratch.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _all_beside(path: Path, suffix: str) -> list[Path]:
    """What `_beside` has named."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.{suffix}"))


class JsonLinesWriter:
    """
    Appends to a JSON Lines file; after a kill the file holds every record that was appended, and nothing else.

    Use it in a `with` statement. On entry, a last line that a kill cut short is dropped and one that only lacks its
    line break gets it.

    Args:
        path (`str` or `os.PathLike`): Created if it does not exist; its folder must exist.
        check (`Callable`, *optional*): Called on entry with the number (from 1) and the bytes of every line; raises
            `ValueError` for a line that is not a record of this file.
        is_cut (`Callable`, *optional*): Whether the bytes of a last line without line break may be a record cut short,
            and so be dropped. By default every such line that is not JSON.
    """

    def __init__(
        self,
        path: PathLike,
        check: Callable[[int, bytes], None] | None = None,
        is_cut: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.path = Path(path)
        self._check, self._is_cut = check, is_cut or _is_no_json
        self._file: BinaryIO | None = None

    def __enter__(self) -> "JsonLinesWriter":
        self.path.touch()
        file = open(self.path, "r+b")
        try:
            self._mend(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with naming_path(self.path):  # closing writes what a full disk has refused once more
                self._file.close()
            self._file = None

    def _mend(self, file: BinaryIO) -> None:
        end = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and self._is_cut(line):
                file.truncate(end)
                break
            if self._check is not None:
                self._check(number, line)
            end += len(line)
            if not line.endswith(b"\n"):
                file.seek(end)
                file.write(b"\n")
                end += 1
        file.seek(end)

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """
        Writes records; they are on the disk when this returns.

        Raises:
            ValueError: outside of a `with` statement.
        """
        if self._file is None:
            raise ValueError(f"{str(self.path)!r} is not open; use {type(self).__name__} in a with statement")
        with naming_path(self.path):
            self._file.write(b"".join(to_json(record).encode() + b"\n" for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())


def to_json(record: Mapping[str, object]) -> str:
    """One line of JSON: readable UTF-8, or ASCII escapes for invalid Unicode and for what a terminal would obey."""
    text = json.dumps(record, ensure_ascii=False)
    return text if _is_unicode(text) and without_control_characters(text) == text else json.dumps(record)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; file names may have lone surrogates."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _is_no_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


class InUseError(RuntimeError):
    """Another process, or another thread of this one, holds the lock of a file or folder."""


@contextlib.contextmanager
def folder_lock(
    folder: PathLike, refusal: str, purpose: str = "", error: type[Exception] = InUseError
) -> Iterator[None]:
    """
    Keeps other processes, and other threads of this one, out of a folder; the system frees it when the process ends.

    Args:
        folder (`str` or `os.PathLike`): Created if it does not exist; the lock is its file `.lock`.
        refusal (`str`): Message for the one that comes second; `{owner}` in it becomes what the first one is.
        purpose (`str`, *optional*): What the folder is locked for; part of `{owner}`.
        error (`type`, *optional*, defaults to `InUseError`): Class of the error.

    Raises:
        InUseError: (or `error`) with `refusal`, when somebody else has it.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, refusal, purpose, error):
        yield


@contextlib.contextmanager
def file_lock(path: PathLike, refusal: str) -> Iterator[None]:
    """
    Keeps other processes, and other threads of this one, away from a file, whichever name they have for it.

    Args:
        path (`str` or `os.PathLike`): It need not exist, but its folder must; the lock is a hidden file next to it.
        refusal (`str`): As for [`folder_lock`].

    Raises:
        InUseError: with `refusal`, when somebody else has it.
    """
    path = Path(path).resolve()
    with _lock(path.with_name(f".{path.name}{LOCK_FILE}"), refusal, "", InUseError):
        yield


@contextlib.contextmanager
def _lock(path: Path, refusal: str, purpose: str, error: type[Exception]) -> Iterator[None]:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as timeout:
        raise error(refusal.replace("{owner}", _owner(path))) from timeout
    try:
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            path.write_text(", ".join(filter(None, (purpose, f"process {os.getpid()}"))), encoding="utf-8")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "an unknown process"
    except OSError:
        return "another process"
