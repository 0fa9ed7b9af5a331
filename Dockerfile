# syntax=docker/dockerfile:1
# Halftone's server. Torch's wheels bring the CUDA libraries, so no CUDA image is needed underneath:
#   docker build -t halftone .                                     with CUDA
#   docker build -t halftone:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/halftone
WORKDIR /src
COPY constraints.txt ./
# torch first and alone: its layer outlives changes of our own code. PyPI stays beside torch's index, which does not
# have every version that constraints.txt pins
RUN /opt/halftone/bin/pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
COPY loadtest ./loadtest
RUN /opt/halftone/bin/pip install -c constraints.txt .

FROM ${BASE}
LABEL org.opencontainers.image.title="Halftone" \
      org.opencontainers.image.description="One server, one checkpoint, every precision, measured the same way." \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles its launchers with a C compiler at run time
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home halftone \
    && mkdir -p /cache/halftone /cache/huggingface /cache/triton /report \
    && chown -R halftone:halftone /cache /report
COPY --from=build /opt/halftone /opt/halftone
ENV PATH=/opt/halftone/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HALFTONE_HOST=0.0.0.0 \
    HALFTONE_CACHE_DIR=/cache/halftone \
    HALFTONE_LOG_FORMAT=json \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
VOLUME ["/cache"]
WORKDIR /report
USER 10001
EXPOSE 8000 9400
STOPSIGNAL SIGTERM
# /health is the front's: 200 while weights are fetched, calibrated and quantized, which can take minutes
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('HALFTONE_PORT', '8000') + '/health', timeout=4)"]
ENTRYPOINT ["halftone"]
CMD ["serve"]
