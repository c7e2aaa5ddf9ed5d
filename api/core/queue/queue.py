"""The Celery message that wakes a worker: it carries the id of a job and means "there is work".

A message that is lost or sent twice does no harm: the job's row decides, and the reconciler sends lost messages again.
Send it after the commit, never before, because a worker that is faster than the commit would find nothing to claim.
"""

from typing import Any

from celery import Celery

from api.core.settings import get_settings
from api.core.singleton import singleton

TASK = "lorainit.run_job"
QUEUE = "train"


class BrokerUnavailable(Exception):
    """The message could not be sent. The job stays unannounced, and the reconciler sends it later."""


@singleton
def get_celery() -> Celery:
    """The Celery application of this process. Settings are read when it is first used, not here."""
    app = Celery("lorainit", set_as_current=False)
    app.add_defaults(_configuration)
    return app


def _configuration() -> dict[str, Any]:
    return {
        "broker_url": get_settings().broker_url,
        "task_serializer": "json",
        "accept_content": ["json"],  # never pickle, because reading one runs code
        "task_ignore_result": True,  # the job's row has the result; a result backend would be a second copy
        # Redis redelivers late-acknowledged messages, so a long job would start twice. We acknowledge
        # early and let the lease bring a lost job back.
        "task_acks_late": False,
        "task_reject_on_worker_lost": False,
        "worker_disable_prefetch": True,  # so that a busy worker does not keep a message that a free one could take
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": get_settings().worker_slots,  # Celery's own option is refused (worker/pool.py)
        "worker_enable_remote_control": False,  # a worker is stopped by a signal only
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "task_default_queue": QUEUE,
        "task_publish_retry": False,  # the outbox retries
        "broker_connection_max_retries": None,
        "broker_connection_retry_on_startup": True,
        "worker_hijack_root_logger": False,
        "broker_transport_options": {
            "global_keyprefix": "lora:",
            "visibility_timeout": 3600,
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 5,
            "queue_order_strategy": "priority",
        },
    }


def probe() -> None:
    """Ask the broker for a connection.

    Raises:
        BrokerUnavailable: none is configured or it does not answer within a few seconds.
    """
    if get_settings().broker_url is None:
        raise BrokerUnavailable("no broker is configured")
    try:
        with get_celery().connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)
    except Exception as error:  # of many kinds, as in `notify_workers`
        raise BrokerUnavailable(str(error)) from error


def notify_workers(job_id: str, queue: str) -> None:
    """Send one message to the workers that listen on `queue`.

    Raises:
        BrokerUnavailable: no broker is configured or it did not take the message.
    """
    if get_settings().broker_url is None:
        raise BrokerUnavailable("no broker is configured")
    try:
        get_celery().send_task(TASK, args=[job_id], queue=queue, retry=False)
    except Exception as error:
        # kombu raises many kinds (OperationalError, redis errors, socket errors): all mean "not sent".
        raise BrokerUnavailable(str(error)) from error
