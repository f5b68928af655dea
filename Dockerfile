# The images of a cluster, on one environment, a layer that all of them share:
#   step      what a Kubeflow component runs in        gateway   what answers requests, and Feast's feature server
#   airflow   triggerer, API, DAG processor, tasks      gpu-step  a step with CUDA
# and of an environment of its own: scheduler, which starts a pod for each task of Airflow
# make image, or docker build --target step -t penstock/step:0.1.0 .
# The builder that comes before BuildKit makes every stage above its target: what is large comes last.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS environment
ARG INDEX=
# the base may trust more than the tools bring along
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --quiet ${INDEX:+--index-url ${INDEX}} uv==0.13.9
COPY requirements.lock /tmp/requirements.lock
RUN export ${INDEX:+UV_DEFAULT_INDEX=${INDEX}} \
 && /opt/uv/bin/uv venv --no-python-downloads --python python3 /opt/penstock/.venv \
 && /opt/uv/bin/uv pip sync --no-cache --compile-bytecode --require-hashes \
      --python /opt/penstock/.venv/bin/python /tmp/requirements.lock

# What all run: the environment, the library and the features, as somebody who is not root.
FROM ${BASE} AS library
RUN useradd --create-home --uid 10001 penstock
COPY --from=environment /opt/penstock/.venv /opt/penstock/.venv
WORKDIR /opt/penstock
ENV PATH=/opt/penstock/.venv/bin:$PATH \
    PYTHONPATH=/opt/penstock \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=3
COPY penstock penstock
COPY feature_repo feature_repo
RUN python -m compileall -q penstock feature_repo
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Penstock" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM library AS step
COPY components components
RUN python -m compileall -q components
LABEL org.opencontainers.image.description="What a Kubeflow component of Penstock runs in"
USER penstock
HEALTHCHECK NONE

FROM library AS gateway
COPY serving serving
RUN python -m compileall -q serving
LABEL org.opencontainers.image.description="Penstock's gateway and feature server"
USER penstock
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["python", "-m", "serving.gateway"]

FROM library AS airflow
COPY components components
COPY serving serving
COPY dags dags
COPY requirements.lock requirements.lock
RUN python -m compileall -q components serving dags
ENV AIRFLOW__CORE__DAGS_FOLDER=/opt/penstock/dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=False
LABEL org.opencontainers.image.description="Penstock's Airflow"
USER penstock
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/api/v2/monitor/health', timeout=9)"]
CMD ["airflow", "api-server"]

# The executor for Kubernetes wants a newer client of Kubernetes than KFP's client allows. A scheduler runs nothing of ours.
FROM environment AS executor
COPY requirements-scheduler.lock /tmp/requirements-scheduler.lock
RUN export ${INDEX:+UV_DEFAULT_INDEX=${INDEX}} \
 && /opt/uv/bin/uv venv --no-python-downloads --python python3 /opt/airflow/.venv \
 && /opt/uv/bin/uv pip sync --no-cache --compile-bytecode --require-hashes \
      --python /opt/airflow/.venv/bin/python /tmp/requirements-scheduler.lock

FROM ${BASE} AS scheduler
RUN useradd --create-home --uid 10001 penstock
COPY --from=executor /opt/airflow/.venv /opt/airflow/.venv
ENV PATH=/opt/airflow/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AIRFLOW__CORE__LOAD_EXAMPLES=False
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Penstock" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.description="The scheduler of Penstock's Airflow on Kubernetes"
USER penstock
EXPOSE 8974
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8974/health', timeout=9)"]
CMD ["airflow", "scheduler", "--skip-serve-logs"]

# The libraries of CUDA that this TensorFlow is made for, beside the environment; the driver is the node's.
FROM environment AS cuda
COPY requirements-gpu.lock /tmp/requirements-gpu.lock
RUN export ${INDEX:+UV_DEFAULT_INDEX=${INDEX}} \
 && /opt/uv/bin/uv pip install --no-cache --no-deps --require-hashes --target /opt/cuda \
      --python /opt/penstock/.venv/bin/python -r /tmp/requirements-gpu.lock

FROM step AS gpu-step
COPY --from=cuda /opt/cuda/nvidia /opt/penstock/.venv/lib/python3.11/site-packages/nvidia
LABEL org.opencontainers.image.description="What a Kubeflow component of Penstock runs in, with CUDA"
