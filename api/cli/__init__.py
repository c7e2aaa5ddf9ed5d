"""The `lorainit` command: `commands` lists them; the other files are what they do.

It works with any server of this API. Only `serve`, `demo`, `migrate`, `keys` and `doctor` use the service's own code.
"""

from api.cli.commands import app

__all__ = ["app"]
