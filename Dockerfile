# Three images; docs/docker.md tells how to run them.
#
#   docker build -t context-window-gateway .                   the gateway alone, in front of a stack that runs elsewhere
#   docker build -t context-window-gateway-stack --target stack .      vLLM's CPU build, LMCache and the gateway: `cwg up`
#   docker build -t context-window-gateway-engine --target engine .    vLLM and LMCache for GPUs, with the connector
#
# Packages come from the index that pip is configured with. For another one give your pip.conf as a secret, which stays
# out of the image: docker build --secret id=pip,src=$HOME/.config/pip/pip.conf . For an index without a password in its
# address a build argument will do: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS. The target `stack` needs one:
# the CPU build of torch is not on PyPI.

ARG BASE=python:3.12-slim
ARG ENGINE_BASE=vllm/vllm-openai:v0.32.0


# The gateway and all it depends on, with PostgreSQL and S3, as wheels, in the versions that were tested.
FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gateway gateway
COPY policies policies
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /build \
    && /build/bin/pip wheel --no-cache-dir --constraint constraints.txt --wheel-dir /wheels '.[postgres,s3]'


# The environment of `make up`, made by the same commands.
FROM ${BASE} AS stack-build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends make
WORKDIR /opt/cwg
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf make .venv/with-local


FROM ${BASE} AS stack
LABEL org.opencontainers.image.title="context-window-gateway-stack" \
      org.opencontainers.image.description="vLLM for CPUs, LMCache and the Context Window Gateway, with a demo model" \
      org.opencontainers.image.licenses="Apache-2.0"
# vLLM's CPU build is linked to libnuma.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-log-init --home-dir /data --shell /usr/sbin/nologin cwg \
    && install -d -o cwg -g cwg -m 0700 /data
COPY --from=stack-build /opt/cwg /opt/cwg
ENV PATH=/opt/cwg/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["python3", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8700, timeout=4); c.request('GET', '/readyz'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["cwg"]
CMD ["up", "--host", "0.0.0.0", "--data-dir", "/data"]


# Both sides of LMCache, the connector in vLLM and the server, are to be of one version: this image runs either.
FROM ${ENGINE_BASE} AS engine
LABEL org.opencontainers.image.title="context-window-gateway-engine" \
      org.opencontainers.image.description="vLLM and LMCache with the connector of the Context Window Gateway" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY --from=build /wheels/context_window_gateway-*.whl /tmp/wheels/
# The connector needs none of the gateway's dependencies. Its fix is for exactly these two versions. uv reads no pip.conf.
RUN uv pip install --system --no-cache vllm==0.32.0 lmcache==0.5.6 \
        ${PIP_INDEX_URL:+--index-url "$PIP_INDEX_URL"} ${PIP_EXTRA_INDEX_URL:+--extra-index-url "$PIP_EXTRA_INDEX_URL"} \
    && uv pip install --system --no-cache --no-index --no-deps /tmp/wheels/*.whl \
    && rm -r /tmp/wheels \
    && useradd --uid 10001 --user-group --no-log-init --create-home cwg \
    && install -d -o cwg -g cwg -m 0700 /kv /home/cwg/.cache /home/cwg/.cache/huggingface
USER 10001:10001
WORKDIR /home/cwg
VOLUME /kv
EXPOSE 8000


FROM ${BASE} AS gateway
LABEL org.opencontainers.image.title="context-window-gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway that gives conversations a durable, nameable KV cache" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m venv /opt/cwg \
    && /opt/cwg/bin/pip install --no-cache-dir --no-index /wheels/*.whl \
    && useradd --uid 10001 --user-group --no-log-init --home-dir /data --shell /usr/sbin/nologin cwg \
    && install -d -o cwg -g cwg -m 0700 /data /kv /secret
# Nobody outside can reach a container's loopback, so it listens on all addresses, for which it wants a CWG_API_KEY.
ENV PATH=/opt/cwg/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data CWG_HOST=0.0.0.0 CWG_PORT=8700 CWG_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python3", "-c", \
    "import http.client as h, os; c = h.HTTPConnection('127.0.0.1', int(os.environ['CWG_PORT']), timeout=4); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
# The exec form: SIGTERM reaches the gateway, which ends its streams before it ends (up to 18 s).
ENTRYPOINT ["cwg"]
CMD ["serve"]
