# One image for every process of ours: collector, worker, sink, API, schema registry, simulated exchange. The command says which.
# Runs as uid 10001 with a read-only root; writes to /tmp (tmpfs) and, where a volume is mounted, to /data.

FROM python:3.11-slim-bookworm AS build
WORKDIR /app
COPY requirements/bootstrap.txt requirements/run.txt requirements/
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements/bootstrap.txt \
 && /venv/bin/uv pip install --no-cache --quiet --python /venv/bin/python --require-hashes --compile-bytecode -r requirements/run.txt \
 && /venv/bin/uv pip uninstall --quiet --python /venv/bin/python uv
COPY infra/docker/link.py infra/docker/link.py
COPY pyproject.toml .
COPY schemas schemas
COPY collectors collectors
COPY processors processors
COPY streams streams
COPY api api
COPY infra infra
RUN /venv/bin/python infra/docker/link.py && /venv/bin/python -m compileall -q /app

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 marketstream \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin marketstream \
 && install -d -o 10001 -g 10001 /data
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
# numba would keep compiled kernels beside the code, which is read-only; in the volume they survive a restart
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=/data/numba HOME=/tmp \
    MARKETSTREAM_DATA_DIR=/data MARKETSTREAM_LOG_JSON=true
USER 10001:10001
VOLUME /data
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["infra.cli.main", "--help"]
