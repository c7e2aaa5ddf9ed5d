"""The command of a run, and its environment variables."""

import os
import sys

from api.core.devices import devices
from api.core.settings import get_settings
from lorainit.system import gpus, watchdog

PROGRAM = (sys.executable, "-m", "lorainit")


def make_environment_without_secrets() -> dict[str, str]:
    """The environment for a child that reads users' files: without the service's settings, which hold its secrets."""
    hidden = ("LORAINIT_", "AWS_", "POSTGRES_", "PG", "REDIS_", "VALKEY_", "OPENAI_", "CELERY_", "OTEL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def make_run_environment(names: str | None) -> dict[str, str]:
    """The environment variables of a run.

    Args:
        names: the only GPUs that it sees, by their names in CUDA; None = as this process.
    """
    chosen = {} if names is None else {gpus.VISIBLE: names}
    needed = {gpus.NEEDED: "1"} if devices.device() == "gpu" else {}
    return {
        **make_environment_without_secrets(),
        **chosen,
        **needed,
        watchdog.VARIABLE: str(get_settings().silence_seconds),
        "TOKENIZERS_PARALLELISM": "false",
    }
