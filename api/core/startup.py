"""What every process of the service checks before it does anything: its settings, and the catalogue."""

import sys

from api.core import catalogue
from api.core.catalogue_file import BadCatalogue
from api.core.settings import BadSettings, get_settings


def check_or_exit() -> None:
    """Read both; end this process with one line and exit code 1 if one of them cannot be used."""
    try:
        get_settings()
        catalogue.entries()
    except (BadSettings, BadCatalogue) as error:
        sys.exit(f"error: {error}")
