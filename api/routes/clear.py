"""Deletes the bytes of deleted objects, after the answer was sent."""

from obstore.exceptions import BaseError as StoreError

from api.core.files.storage import Storage
from api.core.logs import get_logger
from api.http.threads import run_in_storage_thread


async def clear(storage: Storage, key: str) -> None:
    """Remove an object that no row needs. If storage does not answer, the reconciler does it later."""
    try:
        await run_in_storage_thread(storage.delete, key)
    except (StoreError, OSError) as error:
        get_logger(__name__).warning("left_for_the_reconciler", key=key, error=str(error))
