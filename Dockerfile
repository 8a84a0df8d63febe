# All that the project needs to run, on CPUs or with --build-arg GPU=1 on NVIDIA GPUs; the project
# itself is mounted at /workspace (Makefile).
ARG GPU=0
FROM python:3.12-slim-bookworm AS gpu-0
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS gpu-1
# hadolint ignore=DL3006
FROM gpu-${GPU}

# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends git libgomp1 \
      $(command -v python3 > /dev/null || echo python3 python3-venv) \
 && rm -rf /var/lib/apt/lists/*

# The user has the numbers of the one who builds, so that what it writes to /workspace is theirs.
ARG UID=1000
ARG GID=1000
RUN groupadd --non-unique --gid "$GID" user \
 && useradd --non-unique --uid "$UID" --gid "$GID" --create-home user \
 && mkdir /opt/venv /workspace \
 && chown "$UID:$GID" /opt/venv /workspace
USER $UID:$GID

# setup.sh uses this environment as long as its requirements are those of the project.
ENV HOME=/home/user BERT_VENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    HF_HOME=/workspace/downloads/huggingface
COPY requirements.txt /tmp/requirements.txt
ARG GPU=0
RUN python3 -m venv /opt/venv \
 && if [ "$GPU" = 1 ]; then set --; else \
      set -- --extra-index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' /tmp/requirements.txt)+cpu"; fi \
 && pip install --no-cache-dir "$@" -r /tmp/requirements.txt \
 && cp /tmp/requirements.txt /opt/venv/installed.txt

WORKDIR /workspace
EXPOSE 8888
CMD ["bash", "run_all.sh"]
