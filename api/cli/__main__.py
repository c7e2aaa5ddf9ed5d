"""`python -m api.cli`: the command, also where it is not installed."""

from api.cli import app

app()
