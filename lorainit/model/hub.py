"""Fetches a base model from a model hub: the one place that does, with huggingface_hub's own client and cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to it. Needs no torch, and reads no file of a
model. A revision is pinned to its commit where it is written down, so that a base stays what it was when it was
inspected, and is not looked up again.
"""

import errno
from pathlib import Path

from lorainit.errors import UnsupportedModel
from lorainit.sources import HUB, is_hub_id

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# The same weights in formats of others: below folders, and Mistral's.
OTHERS = ["*/*", "consolidated*"]
_SNAPSHOTS = "snapshots"  # of the cache: models--OWNER--NAME/snapshots/COMMIT


def fetch(repository: str, revision: str | None) -> Path:
    """The folder with the model's files, downloaded unless the cache has them.

    Args:
        revision: a branch, a tag or a commit; None = the main branch.

    Raises:
        UnsupportedModel: it cannot be had, with the reason and what would help.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=FILES, ignore_patterns=OTHERS))
    except Exception as error:  # the client's own, or those of the HTTP client below it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UnsupportedModel(_why(error, repository, revision), param="model") from error
    if not folder.is_dir():
        raise UnsupportedModel(f"The hub's model {repository} holds no file of a base model.", param="model")
    return folder


def pinned(repository: str, folder: Path) -> str:
    """The source that means exactly what was fetched to `folder`."""
    return f"{HUB}{repository}@{folder.name}" if folder.parent.name == _SNAPSHOTS else f"{HUB}{repository}"


def id_of(folder: Path) -> str | None:
    """The hub id of a folder that lies in the cache of a hub; None of any other."""
    kind, _, name = folder.parent.parent.name.partition("--")
    found = name.replace("--", "/")
    return found if folder.parent.name == _SNAPSHOTS and kind == "models" and is_hub_id(found) else None


def _why(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    match error:
        case GatedRepoError():
            advice = "accept its terms on its page, and give HF_TOKEN of an account that has"
            return f"The hub's model {repository} ({hub}) is gated: {advice}."
        case RepositoryNotFoundError():
            token = "the token may not see it" if get_token() else "it is private and HF_TOKEN is not set"
            return f"The hub ({hub}) has no model {repository}, or {token}."
        case RevisionNotFoundError():
            return f"The hub's model {repository} ({hub}) has no revision {revision!r}."
        case LocalEntryNotFoundError() if isinstance(error.__cause__, OfflineModeIsEnabled):
            where = f"HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) lacks files of it"
            return f"The hub's model {repository} cannot be fetched: {where}."
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return f"The hub's model {repository} cannot be fetched from {hub}: {' '.join(str(cause).split())[:300]}"
