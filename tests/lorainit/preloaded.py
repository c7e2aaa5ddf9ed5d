"""What `tests.lorainit.forked` loads once, before it forks a run for a test."""

import gc

from lorainit import warm
from tests.lorainit import forked  # noqa: F401

warm._import_libraries()
gc.collect()
gc.freeze()
