"""Sends files to the Hub in one commit, with retries; nothing half-sent becomes visible, and no token is shown."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx

from transformers_minigpt4.utils.text import first_line


logger = logging.getLogger(__name__)

T = TypeVar("T")
Content = Path | bytes

MAIN = "main"
CARD_FILE = "README.md"
WEIGHTS = ".safetensors"
TRIES = 6
FIRST_WAIT = 1.0  # seconds, doubled after each try
TIMEOUT = 120.0  # seconds without a byte; huggingface_hub 2.4 waits forever

_TRANSIENT_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}  # 409 and 412: another commit came in between


@dataclass
class Publication:
    """
    Everything that one commit will contain.

    Args:
        repo_id: `namespace/name`.
        repo_type: `"model"` or `"dataset"`.
        files: Content by path in the repository, the card among them.
        left_out: Reason by name, of the files in the folder that are not published.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Content]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def card(self) -> str:
        return self.read(CARD_FILE).decode("utf-8")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by path, the largest first."""
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def read(self, name: str) -> bytes:
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def replaces(self, name: str) -> bool:
        """Whether a remote file that is not among `files` belongs to an earlier checkpoint or dataset."""
        if self.repo_type == "dataset":
            return name.startswith("data/") and name.endswith(".parquet")
        # Old weights, adapters or chat templates next to new ones would be loaded with them.
        return "/" not in name and Path(name).suffix in {WEIGHTS, ".json", ".jinja", ".py"}


class _Repository(TypedDict):
    repo_id: str
    repo_type: str


class Published(NamedTuple):
    """Where a publication is now: its page, the commit, and the remote files that the commit removed."""

    url: str
    commit: str
    removed: list[str]


def publish(
    publication: Publication,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    timeout: float = TIMEOUT,
) -> Published:
    """
    Sends a publication in one commit: readers see the old state or the new one, nothing between.

    Large files go ahead of the commit and are invisible until it; those that have arrived, in this call or in one that
    was interrupted, are not sent again. `upload_folder` would make several commits. Files of an earlier checkpoint or
    dataset that are not in this one are removed in the same commit.

    Args:
        publication: From [`prepare`].
        private, revision, commit_message, token: As for [`push_to_hub`].
        timeout: Seconds without a byte after which a request is abandoned and tried again.

    Raises:
        ValueError: for a public repository with `private`, and for a card that the Hub does not accept.
        OSError: when the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    names = _Repository(repo_id=publication.repo_id, repo_type=publication.repo_type)
    additions: dict[str, CommitOperationAdd] = {}
    removed: set[str] = set()  # over all tries: a try may have succeeded and its answer been lost

    def open_repository() -> None:
        api.create_repo(**names, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(**names, timeout=timeout).private:
            raise ValueError(
                f"{publication.repo_id} exists and is public, and --private does not change that; make it private in "
                "its settings, or choose another name"
            )
        if revision not in (None, MAIN) and not str(revision).startswith("refs/"):
            api.create_branch(**names, branch=revision, exist_ok=True)

    def commit() -> Published:
        info = api.repo_info(**names, revision=revision, timeout=timeout)
        old = {file.rfilename for file in getattr(info, "siblings", None) or []} - set(publication.files)
        stale = sorted(name for name in old if publication.replaces(name))
        removed.update(stale)
        for name, content in publication.files.items():
            # New at each try, because the Hub's state counts, not that of the last try; hashes of 15 GB are kept.
            fresh = CommitOperationAdd(name, content)
            if name in additions:
                fresh.upload_info = additions[name].upload_info
            additions[name] = fresh
        operations: list[CommitOperationAdd | CommitOperationDelete] = list(additions.values())
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(
            **names,
            operations=operations,
            commit_message=commit_message or "Upload with transformers_minigpt4",
            revision=revision,
            # The commit applies to exactly what was just read; a commit in between makes it fail and read again.
            parent_commit=info.sha,
        )
        return Published(str(done.repo_url), done.oid, sorted(removed))

    _with_retries(open_repository, publication.repo_id, token, timeout)
    return _with_retries(commit, publication.repo_id, token, timeout)


def _with_retries(action: Callable[[], T], repo_id: str, token: str | None, timeout: float) -> T:
    wait, number = FIRST_WAIT, 1
    while True:
        try:
            with _timeouts(timeout):
                return action()
        except Exception as error:
            transient = _is_transient(error)
            if transient and number < TRIES:
                logger.warning("%s; try %d of %d in %g s", _cause(error, token), number + 1, TRIES, wait)
            elif transient or any(isinstance(one, (HfHubHTTPError, OfflineModeIsEnabled)) for one in _chain(error)):
                # `from None`: the original may quote what the server sent back, which is not ours to print.
                raise OSError(_explain(error, repo_id, token)) from None
            else:
                raise
        time.sleep(wait)
        wait, number = 2 * wait, number + 1


@contextmanager
def _timeouts(seconds: float) -> Iterator[None]:
    session = get_session()
    before, session.timeout = session.timeout, httpx.Timeout(seconds)
    try:
        yield
    finally:
        session.timeout = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from; huggingface_hub wraps failures of threads in a RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_transient(error: BaseException) -> bool:
    for one in _chain(error):
        if isinstance(one, OfflineModeIsEnabled):
            return False
        if isinstance(one, HfHubHTTPError):
            return one.response.status_code in _TRANSIENT_STATUS
        # A gateway's error page in place of JSON; and hf_xet raises Python's own errors.
        if isinstance(one, (httpx.TransportError, json.JSONDecodeError, ConnectionError, TimeoutError)):
            return True
    return False


def _cause(error: BaseException, token: str | None) -> str:
    root = next((one for one in _chain(error) if type(one) is not RuntimeError), error)
    line, name = first_line(root), type(root).__name__
    return _redact(f"{name}: {line}" if line != name else name, token)


def _explain(error: BaseException, repo_id: str, token: str | None) -> str:
    cause = _cause(error, token)
    status = next((one.response.status_code for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be published; unset it"
    if _is_transient(error):
        return f"gave up after {TRIES} tries ({cause}); nothing incomplete is visible, run the command again to resume"
    if status == 401:
        return f"the Hub does not know you ({cause}); log in with `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return f"you may not write to {repo_id} ({cause}); check its name, and that your token may write there"
    return f"the Hub refused ({cause})"


def _redact(text: str, token: str | None) -> str:
    for value in (token, get_token()):
        if value:
            text = text.replace(value, "<TOKEN>")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)  # upload URLs are signed in their query
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "<TOKEN>", text)
