"""What a core function may refuse. No HTTP here: `api.errors` gives each class its status.

Refusal
├── NotFound          the object named in the path is unknown, or another project's
├── BadReference      an object named in the body does not exist or cannot be used
├── WrongState        the object's state forbids the call
├── InvalidValue      a value outside its range or catalogue
├── TooLarge          more bytes than we take
├── StorageFull       no room for the bytes; a quick retry does not help
├── QuotaExceeded     the project has used up what it may have
├── Forbidden         the key lacks the right
├── InProgress        the same order is being carried out right now
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
    """More bytes than we take."""


class StorageFull(Refusal):
    """No room for the bytes; trying again at once does not help."""


class QuotaExceeded(Refusal):
    """The project has used up what it may have; trying again at once does not help."""


class Forbidden(Refusal):
    """The key is good, and lacks the right."""


class InProgress(Refusal):
    """The same order is being carried out right now; a retry finds its result."""


class Unavailable(Refusal):
    """Not now; a retry in a few seconds may help."""
