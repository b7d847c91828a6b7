# The service: embeddings, neighbours and groups over HTTP. docker compose build service (or: docker build -f deploy/service.Dockerfile .)
# No syntax line, no digest: both files build from local base images alone. Their first half is the same text, so the engine keeps those layers once.
ARG BASE=python:3.11-slim

# ---- the project's own code as a wheel
FROM ${BASE} AS wheel
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY client client
COPY service service
COPY trainer trainer
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip wheel --quiet --no-deps --wheel-dir /wheels .

# ---- packages of the service, the client of Milvus too. Everything comes as wheels: no compiler is ever there. onnxruntime's CUDA libraries are packages too
FROM ${BASE} AS service-packages
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN groupadd --gid 10001 invprop \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin invprop \
 && install -d -o invprop -g invprop /var/lib/invprop /bundles /datasets /run/invprop \
 && python3 -m venv --without-pip /opt/venv
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    --mount=type=bind,source=deploy/requirements.py,target=/src/requirements.py \
    --mount=type=bind,source=deploy/constraints.txt,target=/src/constraints.txt \
    /opt/venv/bin/python /src/requirements.py service milvus < /src/pyproject.toml > /tmp/requirements.txt \
 && python3 -m pip --python /opt/venv/bin/python install --quiet --only-binary :all: \
      --constraint /src/constraints.txt --requirement /tmp/requirements.txt 'onnxruntime-gpu[cuda,cudnn]' \
 && rm /tmp/requirements.txt

# ---- the service
FROM service-packages AS service
COPY --chmod=755 deploy/containers/ /usr/local/bin/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip --python /opt/venv/bin/python install --quiet --no-deps --no-index /wheels/*.whl
ARG VERSION=0.1.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="invprop service" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV INVPROP_BUNDLE=/bundles/current \
    INVPROP_STATE=/var/lib/invprop/state \
    INVPROP_HOST=0.0.0.0
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/invprop
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["is-ready"]
ENTRYPOINT ["with-secrets"]
CMD ["python", "-m", "service.run"]
