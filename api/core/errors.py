"""The errors that core functions raise for a request. `api.errors` gives each class its HTTP status.

Refusal
├── NotFound          the object named in the path is unknown, or another project's
├── BadReference      an object named in the body does not exist or cannot be used
├── WrongState        the object's state forbids the call
├── InvalidValue      a value outside its range or catalogue
├── TooLarge          more bytes than are accepted
├── StorageFull       no disk space for the bytes; a quick retry does not help
├── QuotaExceeded     the project has used up what it may have
├── Forbidden         the key lacks the right
├── InProgress        the same request is being carried out right now
└── Unavailable       try again in a few seconds
"""


class Refusal(Exception):
    """A refusal with a code from the closed list, a sentence, and the field it is about."""

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class NotFound(Refusal):
    """Unknown here. Another project's object looks exactly the same."""


class BadReference(Refusal):
    """The body names something that does not exist or cannot be used for this."""


class WrongState(Refusal):
    """The object's state forbids the call."""


class InvalidValue(Refusal):
    """A value outside its range or its catalogue."""


class TooLarge(Refusal):
    """More bytes than are accepted."""


class StorageFull(Refusal):
    """No disk space for the bytes; trying again at once does not help."""


class QuotaExceeded(Refusal):
    """The project has used up what it may have; trying again at once does not help."""


class Forbidden(Refusal):
    """The key is valid, but may not do this."""


class InProgress(Refusal):
    """The same request is being carried out right now; a retry finds its result."""


class Unavailable(Refusal):
    """Not now; a retry in a few seconds may help."""
