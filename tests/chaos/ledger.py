"""What the database noticed: triggers that write down each row of a run that came with an old token.

They see the order in which writes were committed, which nobody outside can.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
from psycopg.rows import dict_row

_POSTGRESQL = """
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


_SQLITE = """
CREATE TABLE chaos_stale (job_id text, relation text, token int, owner int, status text);

CREATE TRIGGER chaos_metric_new AFTER INSERT ON metrics BEGIN
    INSERT INTO chaos_stale SELECT id, 'metrics', NEW.lease_token, lease_token, status FROM jobs
    WHERE id = NEW.job_id AND (lease_token <> NEW.lease_token OR status <> 'running');
END;

CREATE TRIGGER chaos_metric_again AFTER UPDATE ON metrics BEGIN
    INSERT INTO chaos_stale SELECT id, 'metrics', NEW.lease_token, lease_token, status FROM jobs
    WHERE id = NEW.job_id AND (lease_token <> NEW.lease_token OR status <> 'running');
END;

CREATE TRIGGER chaos_checkpoint AFTER INSERT ON checkpoints BEGIN
    INSERT INTO chaos_stale
    SELECT id, 'checkpoints', CAST(substr(NEW.state_key, instr(NEW.state_key, 'attempt-') + 8) AS INTEGER),
           lease_token, status FROM jobs
    WHERE id = NEW.job_id AND (status <> 'running' OR
        lease_token <> CAST(substr(NEW.state_key, instr(NEW.state_key, 'attempt-') + 8) AS INTEGER));
END;
"""
_SQLITE_PREFIX = "sqlite:///"
_JSON = ("data", "values", "error", "recipe", "trained_with")  # SQLite keeps them as text


class Ledger:
    """Short questions to the database of the run."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._sqlite = url.removeprefix(_SQLITE_PREFIX) if url.startswith(_SQLITE_PREFIX) else None

    def watch(self) -> None:
        """From now on, write down every stale write."""
        if self._sqlite is not None:
            with closing(sqlite3.connect(self._sqlite, timeout=60)) as connection:
                connection.executescript(_SQLITE)
            return
        with self._connected() as server:
            server.execute(_POSTGRESQL)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """All rows, by column name."""
        if self._sqlite is None:
            with self._connected() as server:
                return list(server.execute(query))
        with closing(sqlite3.connect(self._sqlite, timeout=60)) as connection:
            connection.row_factory = sqlite3.Row
            return [_decoded(dict(row)) for row in connection.execute(query)]

    @contextmanager
    def _connected(self) -> Iterator[psycopg.Connection[dict[str, Any]]]:
        with psycopg.connect(self._url, autocommit=True, row_factory=dict_row) as connection:
            yield connection


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.loads(value) if name in _JSON and value else value for name, value in row.items()}
