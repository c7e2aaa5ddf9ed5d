"""What a project may keep: bytes and files, summed over the rows whenever something is to be added."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.core.db.tables import File, Project
from api.core.errors import QuotaExceeded
from api.core.files.files import UPLOADABLE
from api.core.settings import get_settings


def require_quota(session: Session, project_id: str, *, adding: int) -> None:
    """Refuse one more file of `adding` bytes if it exceeds the project's quota.

    Only uploads are refused. A running job stores what it made whatever the quota is, because it would otherwise be
    lost.

    Raises:
        QuotaExceeded: its bytes or its files are used up.
    """
    settings = get_settings()
    if settings.project_files and _count_files(session, project_id) >= settings.project_files:
        text = f"This project keeps {settings.project_files} files, as many as it may. Delete one first."
        raise QuotaExceeded(text, code="quota_exceeded", param="file")
    if not settings.project_bytes:
        return
    used = sum_stored_bytes(session, project_id)
    if used + adding > settings.project_bytes:
        text = (
            f"This project stores {used} of at most {settings.project_bytes} bytes; {adding} more do not fit."
            " Delete files or models first."
        )
        raise QuotaExceeded(text, code="quota_exceeded", param="file")


def reserve_quota(session: Session, project_id: str, *, adding: int) -> None:
    """Like `require_quota`, and lock the project until the commit, so that parallel uploads cannot exceed it together.

    Raises:
        QuotaExceeded: its bytes or its files are used up.
    """
    settings = get_settings()
    if settings.project_bytes or settings.project_files:
        session.execute(select(Project.id).where(Project.id == project_id).with_for_update())
        require_quota(session, project_id, adding=adding)


def sum_stored_bytes(session: Session, project_id: str) -> int:
    """Bytes of everything of a project that can be downloaded: uploads, results, adapters, checkpoints."""
    total = select(func.sum(File.bytes)).where(File.project_id == project_id, File.deleted_at.is_(None))
    return int(session.scalar(total) or 0)


def _count_files(session: Session, project_id: str) -> int:
    mine = (File.project_id == project_id, File.deleted_at.is_(None), File.purpose.in_(UPLOADABLE))
    return session.scalar(select(func.count()).select_from(File).where(*mine)) or 0
