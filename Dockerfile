# The image that Kubeflow components run in: the locked environment and the library, nothing else. And that of serving.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS environment
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv==0.13.9
COPY requirements.lock /tmp/requirements.lock
RUN /opt/uv/bin/uv venv --no-python-downloads --python python3 /opt/penstock/.venv \
 && /opt/uv/bin/uv pip sync --no-cache --compile-bytecode --require-hashes \
      --python /opt/penstock/.venv/bin/python /tmp/requirements.lock

# What both run: the environment, the library and the features, as somebody who is not root.
FROM ${BASE} AS library
COPY --from=environment /opt/penstock/.venv /opt/penstock/.venv
WORKDIR /opt/penstock
COPY penstock penstock
COPY feature_repo feature_repo
ENV PATH=/opt/penstock/.venv/bin:$PATH \
    PYTHONPATH=/opt/penstock \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=3
RUN useradd --create-home --uid 10001 penstock

# What answers requests: docker build --target serving -t penstock/serving:0.1.0 .
FROM library AS serving
COPY serving serving
USER penstock

FROM library AS step
COPY components components
USER penstock
