"""What the database noticed: triggers that write down each row of a run that came with an old token.

They see the order in which writes were committed, which nobody outside can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import dict_row

_TRIGGERS = """
CREATE TABLE chaos_stale (job_id text, relation text, token int, owner int, status text);

CREATE FUNCTION chaos_judge(job text, relation text, token int) RETURNS void AS $$
    INSERT INTO chaos_stale SELECT id, relation, token, lease_token, jobs.status FROM jobs
    WHERE id = job AND (lease_token <> token OR jobs.status <> 'running')
$$ LANGUAGE sql;

CREATE FUNCTION chaos_metric() RETURNS trigger AS $$ BEGIN
    PERFORM chaos_judge(NEW.job_id, 'metrics', NEW.lease_token); RETURN NEW;
END $$ LANGUAGE plpgsql;

CREATE FUNCTION chaos_checkpoint() RETURNS trigger AS $$ BEGIN
    PERFORM chaos_judge(NEW.job_id, 'checkpoints', substring(NEW.state_key from 'attempt-([0-9]+)/')::int);
    RETURN NEW;
END $$ LANGUAGE plpgsql;

CREATE TRIGGER chaos_metric AFTER INSERT OR UPDATE ON metrics FOR EACH ROW EXECUTE FUNCTION chaos_metric();
CREATE TRIGGER chaos_checkpoint AFTER INSERT ON checkpoints FOR EACH ROW EXECUTE FUNCTION chaos_checkpoint();
"""


class Ledger:
    """Short questions to the database of the run."""

    def __init__(self, url: str) -> None:
        self._url = url

    def watch(self) -> None:
        """From now on, write down every stale write."""
        with self._connected() as connection:
            connection.execute(_TRIGGERS)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """All rows, by column name."""
        with self._connected() as connection:
            return list(connection.execute(query))

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        with psycopg.connect(self._url, autocommit=True, row_factory=dict_row) as connection:
            yield connection
