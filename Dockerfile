# Images with emu3-jax, its configs and its scripts:
#
#     docker build --target tpu --tag REGISTRY/emu3-jax:tpu .
#     docker build --target cuda --build-arg CUDA=13 --tag REGISTRY/emu3-jax:cuda .
#
# CUDA is 12 or 13, by the driver of the machines: JAX brings all other libraries of CUDA. The working directory holds
# configs/, so `train configs/sft_t2i_8b.py` works as in a checkout; mount a file system that all machines share at
# out/.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/emu3-jax
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY emu3_jax emu3_jax
COPY configs configs
COPY scripts scripts
ENTRYPOINT ["emu3-jax"]

FROM base AS tpu
# pyproject.toml bounds the versions.
# hadolint ignore=DL3013
RUN pip install ".[train,convert,video,data,heic,gcs,serve,tpu]"

FROM base AS cuda
ARG CUDA=13
# hadolint ignore=DL3013
RUN pip install ".[train,convert,video,data,heic,gcs,serve,cuda${CUDA}]"
