# milvus-lite in the place of Milvus' own image where that cannot be had: the same port, command and health check.
# It brings faiss-cpu, so it never meets the service's packages. For tests alone.
FROM python:3.11-slim
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt \
    python -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir milvus-lite==3.2.2 pymilvus==3.0.2
COPY --chmod=755 milvus_lite_server /usr/local/bin/milvus
RUN install -d -o 10001 -g 10001 /var/lib/milvus && ln -s /usr/local/bin/milvus /usr/local/bin/curl
USER 10001:10001
