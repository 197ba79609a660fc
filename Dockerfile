# The gateway in a container: no root, a read-only file system but for /var/lib/tidegate, nothing fetched at run time.
#
#   docker build -t tidegate .
#   docker run -p 8080:8080 -e TIDEGATE_AUTH=keys -e TIDEGATE_UPSTREAM_URL=http://llm:8000/v1 \
#     -v tidegate:/var/lib/tidegate tidegate
#
# TIDEGATE_AUTH must be said, because it listens on every address: keys, or none behind an authentication of your own.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# Which extras go in: "postgres,redis" for several replicas; add "torch" (and a CUDA index) for guards in this process.
ARG EXTRAS=postgres,redis
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tidegate
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY policies policies
COPY src src
RUN /opt/tidegate/bin/python -m pip install ".[${EXTRAS}]" \
 && find /opt/tidegate -name __pycache__ -type d -prune -exec rm -rf {} +

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="Tidegate" \
      org.opencontainers.image.description="A safety guard in the token stream of any LLM" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 tidegate \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/tidegate --no-create-home --shell /usr/sbin/nologin tidegate \
 && install --directory --owner=tidegate --group=tidegate --mode=0750 /var/lib/tidegate
COPY --from=build /opt/tidegate /opt/tidegate
ENV PATH=/opt/tidegate/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TIDEGATE_HOST=0.0.0.0 TIDEGATE_PORT=8080 \
    TIDEGATE_DATABASE_URL=sqlite:////var/lib/tidegate/tidegate.db
USER 10001:10001
WORKDIR /var/lib/tidegate
VOLUME /var/lib/tidegate
EXPOSE 8080
# Alive is not the same as able to judge: /healthz lets the guard judge a safe and an unsafe text.
# The certificate is for a name that others know, and this asks the process beside it: it is not checked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import os, ssl, urllib.request as r; s = 's' * ('TIDEGATE_TLS_CERT' in os.environ); r.urlopen('http' + s + '://127.0.0.1:' + os.environ['TIDEGATE_PORT'] + '/healthz', timeout=4, context=ssl._create_unverified_context() if s else None)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tidegate"]
CMD ["serve"]
