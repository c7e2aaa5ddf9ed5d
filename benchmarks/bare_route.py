"""What a request cannot cost less than: FastAPI, one thread, one SELECT by primary key, as their pages show it.

python benchmarks/bare_route.py URL PORT     serves GET /jobs/ID
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import Column, MetaData, String, Table, create_engine, select

JOBS = Table("jobs", MetaData(), Column("id", String, primary_key=True), Column("status", String))


def application(url: str) -> FastAPI:
    """The application."""
    app, engine = FastAPI(), create_engine(url)

    @app.get("/jobs/{job_id}")
    def job(job_id: str) -> dict[str, Any]:
        with engine.connect() as connection:
            return dict(connection.execute(select(JOBS).where(JOBS.c.id == job_id)).mappings().one())

    return app


if __name__ == "__main__":
    uvicorn.run(application(sys.argv[1]), port=int(sys.argv[2]), log_config=None, access_log=False, server_header=False)
