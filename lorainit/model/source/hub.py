"""Downloads a base model from a model hub with huggingface_hub's client and cache. Nothing else here contacts a hub.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as usual. Loads no torch and reads no file of a model. A revision
is stored as its commit, so that a base stays the one that was inspected and the hub need not be asked again.
"""

import errno
from pathlib import Path

from lorainit.config.errors import HubUnavailable, LorainitError, UnsupportedModel
from lorainit.config.sources import HUB, is_hub_id
from lorainit.system.host_failure import is_host_failure

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Not downloaded: subfolders and Mistral's `consolidated` files, because they hold the same weights in other formats.
OTHERS = ["*/*", "consolidated*"]
# The HTTP clients that versions of huggingface_hub use. Errors of their classes are errors of the network.
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
_SNAPSHOTS = "snapshots"  # of the cache: models--OWNER--NAME/snapshots/COMMIT


def fetch(repository: str, revision: str | None) -> Path:
    """The folder with the model's files, downloaded unless the cache has them.

    Args:
        revision: a branch, a tag or a commit; None = the main branch.

    Raises:
        UnsupportedModel: it cannot be downloaded; the message gives the reason and what would help.
        HubUnavailable: the hub cannot be reached or reports a fault of its own, so a later attempt may succeed.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=FILES, ignore_patterns=OTHERS))
    except Exception as error:  # the client's own, or those of the HTTP client below it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or is_host_failure(error):
            raise
        raise _refusal(error, repository, revision) from error
    if not folder.is_dir():
        raise UnsupportedModel(f"The hub's model {repository} holds no file of a base model.", param="model")
    return folder


def pin_source(repository: str, folder: Path) -> str:
    """The source that names exactly the commit that was downloaded to `folder`."""
    return f"{HUB}{repository}@{folder.name}" if folder.parent.name == _SNAPSHOTS else f"{HUB}{repository}"


def id_of(folder: Path) -> str | None:
    """The hub id of a folder in a hub's cache; None for any other folder."""
    kind, _, name = folder.parent.parent.name.partition("--")
    found = name.replace("--", "/")
    return found if folder.parent.name == _SNAPSHOTS and kind == "models" and is_hub_id(found) else None


def _refusal(error: Exception, repository: str, revision: str | None) -> LorainitError:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    # If the hub refuses, the client looks into its cache and raises an error about that. The hub's error is the cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    cause = cause if isinstance(cause, Exception) else error
    if why := _final(cause, repository, revision):
        return UnsupportedModel(why, param="model")
    text = f"The hub's model {repository} cannot be fetched from {constants.ENDPOINT}: "
    text += " ".join(str(cause).split())[:300] or type(cause).__name__
    return HubUnavailable(text, param="model") if _may_pass(cause) else UnsupportedModel(text, param="model")


def _may_pass(error: Exception) -> bool:
    """Whether a later attempt may succeed: the hub asks to wait, reports its own fault, or does not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    network = any(kind.__module__.partition(".")[0] in _HTTP_CLIENTS for kind in type(error).__mro__)
    return network or isinstance(error, ConnectionError | TimeoutError)


def _final(error: Exception, repository: str, revision: str | None) -> str:
    """A sentence for an error that another attempt cannot change; "" for all others."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
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
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"The hub ({hub}) refuses the token for {repository}: HF_TOKEN is wrong or has expired."
        case HfHubHTTPError() if error.response.status_code == 403:
            return f"The hub ({hub}) forbids {repository} to the account of this HF_TOKEN, or to everybody without one."
        case OfflineModeIsEnabled():
            where = f"HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) lacks files of it"
            return f"The hub's model {repository} cannot be fetched: {where}."
    return ""
