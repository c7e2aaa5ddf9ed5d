"""API keys as OpenAI's organization API shows them; the secret exists in one answer only."""

from typing import Annotated, Literal

from pydantic import Field

from api.core.access.keys import PREFIX, Role
from api.core.db.tables import ApiKey
from api.schemas.wire import Element, Wire, to_unix, to_unix_or_none
from lorainit.config.schema import Strict

LONGEST = 10 * 365 * 86400


class KeyRequest(Strict):
    """A new key."""

    name: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]+$")]
    role: Role = "member"
    expires_in_seconds: Annotated[int, Field(ge=60, le=LONGEST)] | None = None


class KeyHolder(Wire):
    """The holder of a key. There are no accounts yet, so a key is its own holder."""

    id: str
    name: str
    created_at: int
    role: Role


class KeyOwner(Wire):
    """To whom a key belongs."""

    type: Literal["service_account"] = "service_account"
    service_account: KeyHolder
    user: None = None


class KeyObject(Element):
    """A key without its secret."""

    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    role: Role = Field(description="What the key may do (extension).")
    redacted_value: str
    created_at: int
    last_used_at: None = Field(None, description="Not recorded, because every request would have to write it.")
    expires_at: int | None
    owner_project_access: Literal["active"] = "active"
    owner: KeyOwner


class NewKeyObject(KeyObject):
    """A key just made: the only answer that holds its secret."""

    value: str


def make_key_object(key: ApiKey) -> KeyObject:
    """A row as an admin sees it."""
    return KeyObject.model_validate(_fields(key))


def make_new_key_object(key: ApiKey, secret: str) -> NewKeyObject:
    """The same with the secret."""
    return NewKeyObject.model_validate({**_fields(key), "value": secret})


def _fields(key: ApiKey) -> dict[str, object]:
    holder = {"id": key.id, "name": key.name, "created_at": to_unix(key.created_at), "role": key.role}
    return {
        **holder,
        "redacted_value": f"{PREFIX}...{key.hint}",
        "expires_at": to_unix_or_none(key.expires_at),
        "owner": {"service_account": holder},
    }
