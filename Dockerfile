# Two images: `api` (no torch; also runs migrations and the reconciler) and `worker` (CUDA).
#   docker build --target api -t lorainit-api .
#   docker build --target worker -t lorainit-worker .
# docker-compose.yml builds both.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
# The CUDA that torch's wheels are built with. The image refuses to start under a driver that is too old for it.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143

# --- api -----------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS api-build
RUN python -m venv /opt/lorainit
ENV PATH=/opt/lorainit/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY api api
COPY worker worker
COPY lorainit lorainit
COPY migrations migrations
RUN pip install --require-hashes --no-deps --requirement requirements/api.txt \
    && pip install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE} AS api
RUN useradd --uid 10001 --create-home lorainit && install -d -o lorainit /var/lib/lorainit
COPY --from=api-build /opt/lorainit /opt/lorainit
ENV PATH=/opt/lorainit/bin:$PATH PYTHONUNBUFFERED=1 \
    LORAINIT_STATE_DIR=/var/lib/lorainit LORAINIT_HOST=0.0.0.0 LORAINIT_PORT=8000
USER lorainit
WORKDIR /var/lib/lorainit
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "api.server"]

# --- worker --------------------------------------------------------------------------------------
FROM ${CUDA_IMAGE} AS worker-build
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/lorainit
ENV PATH=/opt/lorainit/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY api api
COPY worker worker
COPY lorainit lorainit
COPY migrations migrations
# On Linux the plain torch of the Python package index is the CUDA build.
RUN pip install --require-hashes --no-deps --requirement requirements/worker.txt --requirement requirements/torch.txt \
    && pip install --no-deps --no-build-isolation .

FROM ${CUDA_IMAGE} AS worker
# Triton builds its kernels' launchers, and torch what it compiles for the processor, while a job runs: that takes a
# compiler and Python's headers.
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-dev gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home lorainit && install -d -o lorainit /var/lib/lorainit
COPY --from=worker-build /opt/lorainit /opt/lorainit
ENV PATH=/opt/lorainit/bin:$PATH PYTHONUNBUFFERED=1 LORAINIT_STATE_DIR=/var/lib/lorainit
USER lorainit
WORKDIR /var/lib/lorainit
# Is the worker's parent process there? Whether it works is the database's to say: GET /readyz counts workers.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
    CMD ["python", "-c", "import psutil; p = psutil.Process(1); assert any('worker.app' in q.cmdline() for q in [p, *p.children()])"]
CMD ["celery", "-A", "worker.app", "worker", "--without-gossip", "--without-mingle", "--without-heartbeat"]
