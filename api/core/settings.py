"""Every setting of the service, in one class. `make docs` writes docs/settings.md from it.

Settings are read from environment variables with the prefix `LORAINIT_` when `get_settings()` is first called. An empty
variable counts as not set. No secret has a default.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from api.core.singleton import singleton

PREFIX = "LORAINIT_"


class BadSettings(ValueError):
    """Some variables have wrong values. The message names them without the values, which may be secrets."""


def _with_scheme(*known: str) -> AfterValidator:
    def check(url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in known:
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in known)}")
        try:
            parts.port  # noqa: B018  (reading it checks it)
        except ValueError:
            raise ValueError("is a URL whose port is not a number; is a password in it percent-encoded?") from None
        return url

    return AfterValidator(check)


def _storage_url(url: str | None) -> str | None:
    parts = urlsplit(url or "")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError("must name a folder by its whole path, with three slashes: file:///folder")
    if parts.scheme == "s3" and not parts.netloc:
        raise ValueError("must name a bucket: s3://bucket/prefix")
    return url


def _database_url(url: str | None) -> str | None:
    parts = urlsplit(url or "")
    if parts.scheme == "sqlite" and parts.path.strip("/") in ("", ":memory:"):
        raise ValueError("must name a file: sqlite:////folder/lorainit.db")
    return url


def _queue_names(names: str) -> str:
    queues = [name.strip() for name in names.split(",") if name.strip()]
    if not queues:
        raise ValueError("must name at least one queue")
    if not all(re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name) for name in queues):
        raise ValueError("must be names of small letters, digits, _ and -, as the `device` of a job is")
    return ",".join(queues)


def _folder(path: Path | None) -> Path | None:
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError("must be a folder, and there is a file of this name")
    return path


# The upper bounds are there because a larger value is a mistake, and does not fit into dates and columns. Where "for
# ever" or "no limit" is possible, it is 0.
MANY = 10**9
Seconds = Annotated[float, Field(gt=0, le=86_400)]
SecondsOrNone = Annotated[float, Field(ge=0, le=86_400)]
WholeSeconds = Annotated[int, Field(ge=1, le=86_400)]
DaysOrNone = Annotated[float, Field(ge=0, le=36_500)]
Count = Annotated[int, Field(ge=1, le=MANY)]
CountOrNone = Annotated[int, Field(ge=0, le=MANY)]
Bytes = Annotated[int, Field(ge=1, le=2**62)]
BytesOrNone = Annotated[int, Field(ge=0, le=2**62)]


class Settings(BaseSettings):
    """The service's settings; times are seconds, sizes are bytes."""

    # Errors do not show the value, because it may be a URL with a password.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    state_dir: Annotated[Path, AfterValidator(_folder)] = Field(
        Path(".state"), description="Folder of the embedded default: database, files, caches."
    )
    database_url: Annotated[
        str | None, _with_scheme("postgresql", "postgresql+psycopg", "sqlite"), AfterValidator(_database_url)
    ] = Field(None, description="SQLAlchemy URL; empty = SQLite (WAL) in the state folder.")
    broker_url: Annotated[str | None, _with_scheme("redis", "rediss")] = Field(
        None, description="Redis or Valkey URL; empty = `lorainit serve` starts its own."
    )
    storage_url: Annotated[str | None, _with_scheme("file", "s3"), AfterValidator(_storage_url)] = Field(
        None, description="`file:///folder` or `s3://bucket/prefix`; empty = a folder in the state folder."
    )
    s3_endpoint: Annotated[str | None, _with_scheme("http", "https")] = Field(
        None, description="Endpoint of an S3-compatible store; empty = AWS."
    )
    s3_region: str = Field("us-east-1", description="Region of the bucket.")
    s3_access_key_id: str | None = Field(None, description="Access key of the bucket.")
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret of the bucket.")
    catalogue: Path | None = Field(None, description="TOML file of base models; empty = the built-in SmolLM2 entry.")

    host: Annotated[str, Field(pattern=r"^\S+$")] = Field("127.0.0.1", description="Address the API listens on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port of the API; 0 = any free one.")
    # Limited to these characters, because it is part of a header and of model names.
    organization: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        "local", description="Name in `organization_id` and in fine-tuned model names."
    )
    max_upload_bytes: Bytes = Field(512 * 2**20, description="Largest file `POST /v1/files` takes.")
    max_body_bytes: Bytes = Field(2 * 2**20, description="Largest JSON body.")
    body_seconds: Seconds = Field(
        30.0, description="A request's body may keep us waiting this long, and a second more per 16 KiB received."
    )
    head_seconds: Seconds = Field(
        30.0, description="A connection that sends no whole request head in this time is closed."
    )
    max_head_bytes: Annotated[int, Field(ge=1024, le=2**30)] = Field(
        64 * 1024, description="Largest request line and headers together."
    )
    keep_alive_seconds: WholeSeconds = Field(
        15, description="A connection without a further request after an answer is closed after this."
    )
    stall_seconds: WholeSeconds = Field(
        60, description="A client that receives none of the bytes that wait for it for this long is disconnected."
    )
    download_bytes: BytesOrNone = Field(
        64 * 2**20, description="Memory of a process for downloads, in addition to 256 KiB for each."
    )
    connections: Count = Field(
        1000, description="Open connections of an API process; if there are more, the oldest idle one is closed."
    )
    requests_at_once: Count = Field(
        512,
        validate_default=True,
        description="Requests that an API process answers at once, downloads and streams included.",
    )
    address_at_once: Count = Field(256, description="Of these, from one client address (IPv6: from one /64 network).")
    key_at_once: Count = Field(128, description="Of these, with one API key.")
    requests_per_minute: CountOrNone = Field(
        0, description="Requests per API key and minute, counted in the broker; 0 = no limit."
    )
    project_bytes: BytesOrNone = Field(
        0, description="Bytes a project may store (files, adapters, checkpoints); 0 = no limit."
    )
    project_files: CountOrNone = Field(0, description="Uploaded files a project may keep; 0 = no limit.")
    log_format: Literal["json", "console"] = Field("json", description="`json` or `console`.")
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(str.lower)] = Field(
        "info", description="Lowest level written."
    )

    worker_slots: Count = Field(
        1, description="Runs one worker holds at once, a process for each; one per GPU at most."
    )
    worker_device: Literal["auto", "gpu", "cpu"] = Field(
        "auto",
        description="What runs of this worker compute on: `gpu`, `cpu`, or `auto` (GPUs if there are any).",
    )
    base_models_here: bool = Field(
        False, description="A changed catalogue is refused if a base model is not on this host; `serve` sets it itself."
    )
    worker_scratch: Annotated[Path | None, AfterValidator(_folder)] = Field(
        None, description="Where runs work; empty = a folder in the state folder."
    )
    keep_warm: bool = Field(
        True,
        description="A slot without GPUs that has run a job keeps a process with torch loaded (300 MB) for the next.",
    )
    worker_queues: Annotated[str, AfterValidator(_queue_names)] = Field(
        "train", description="Queues (device classes) this worker takes jobs from, comma-separated."
    )
    model_cache: Annotated[Path | None, AfterValidator(_folder)] = Field(
        None, description="Converted base models; empty = a folder in the state folder."
    )
    init_cache_bytes: BytesOrNone = Field(
        8 * 2**30,
        description="Initializations and tokenized files kept for later runs, in the model cache; 0 = none.",
    )
    lease_seconds: Seconds = Field(
        30.0, description="A worker that does not renew its lease for this long loses its job."
    )
    beat_seconds: Seconds = Field(
        1.0, validate_default=True, description="Lease renewal and cancel check interval; at most half a lease."
    )
    stop_grace_seconds: SecondsOrNone = Field(
        10.0, description="For a run that is paused or drained: to write a checkpoint before it is killed."
    )
    silence_seconds: Seconds = Field(
        1800.0,
        description="A run in which nothing happens for this long (four times that while its base is loaded) is"
        " ended and tried again, because a device hangs.",
    )
    group_size: Count = Field(
        8, description="Most jobs trained together when they ask for it; 1 = every job runs alone."
    )
    devices_per_job: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Most devices a job may ask for; a worker slot must see as many."
    )
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = Field(
        3,
        description="Runs a job may lose (dead worker, temporary failure) without a new checkpoint; then it fails.",
    )
    retry_seconds: SecondsOrNone = Field(
        10.0,
        description="Wait after the second such run, doubled by each further one, at most 300; none after the first.",
    )
    priority_seconds: Annotated[float, Field(gt=0, le=MANY)] = Field(
        3600.0, description="Waiting that weighs as much as one level of priority or one running job of the project."
    )
    project_running: CountOrNone = Field(0, description="Jobs of one project that run at once; 0 = any number.")
    project_queued: CountOrNone = Field(
        0, description="Jobs of one project that wait (validating, queued, paused); 0 = any number."
    )
    reconcile_seconds: Seconds = Field(0.5, description="Pause between two searches of the reconciler for work.")
    keep_checkpoints: Count = Field(3, description="Checkpoints kept beside the best one.")

    min_free_bytes: BytesOrNone = Field(
        2**30, description="A worker takes no job, and an upload is refused, where less would be left on a disk."
    )
    checkpoint_days: DaysOrNone = Field(
        30.0, description="Checkpoints of ended jobs are removed after this many days; 0 = kept for ever."
    )
    job_days: DaysOrNone = Field(
        0.0,
        description="Ended jobs without a model are removed after this many days, with events and metrics; 0 = never.",
    )
    orphan_days: DaysOrNone = Field(
        1.0, description="Stored objects that no row names are removed after this many days; 0 = kept for ever."
    )
    metrics_token: SecretStr | None = Field(
        None, description="Bearer token of `GET /metrics`; empty = it answers this host only."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_blank(cls, value: object) -> object:
        if isinstance(value, str) and not value.strip():
            raise ValueError("is blank")
        return value

    @field_validator("beat_seconds")
    @classmethod
    def _beats_twice_a_lease(cls, beat: float, info: ValidationInfo) -> float:
        if beat > info.data.get("lease_seconds", beat * 2) / 2:
            raise ValueError("must be at most half of LORAINIT_LEASE_SECONDS, or living workers would lose their jobs")
        return beat

    @field_validator("requests_at_once")
    @classmethod
    def _leaves_connections_for_health(cls, requests: int, info: ValidationInfo) -> int:
        if requests >= info.data.get("connections", requests + 1):
            raise ValueError("must be less than LORAINIT_CONNECTIONS, so that health checks always find a connection")
        return requests

    def database(self) -> str:
        """The SQLAlchemy URL in effect."""
        return self.database_url or f"sqlite:///{self.state_dir.resolve()}/lorainit.db"

    def storage(self) -> str:
        """The storage URL in effect."""
        return self.storage_url or (self.state_dir.resolve() / "storage").as_uri()

    def scratch(self) -> Path:
        """The folder runs work in."""
        return (self.worker_scratch or self.state_dir / "runs").resolve()

    def queues(self) -> tuple[str, ...]:
        """The queues this worker takes jobs from."""
        return tuple(self.worker_queues.split(","))

    def models(self) -> Path:
        """The folder of converted base models."""
        return (self.model_cache or self.state_dir / "models").resolve()


@singleton
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        BadSettings: one of them has a wrong value.
    """
    try:
        return Settings()
    except ValidationError as error:
        faults = (
            f"{PREFIX}{'_'.join(map(str, fault['loc'])).upper()}: {_words(fault['msg'])}" for fault in error.errors()
        )
        raise BadSettings(f"wrong settings in the environment: {'; '.join(faults)}.") from None


def find_unknown_variables(names: Iterable[str]) -> list[str]:
    """A message for each of these environment variables that looks like a setting and is none.

    A misspelled variable would otherwise be ignored, and its setting would silently have the default.
    """
    known = [name.upper() for name in Settings.model_fields]
    ours = {name: name.upper().removeprefix(PREFIX) for name in sorted(names) if name.upper().startswith(PREFIX)}
    near = ((name, get_close_matches(rest, known, n=1)) for name, rest in ours.items() if rest not in known)
    return [f"{name} is no setting" + (f" ({PREFIX}{close[0]}?)" if close else "") for name, close in near]


def _words(message: str) -> str:
    """Pydantic's message as the end of a sentence."""
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return message.partition(", unable to parse")[0]
