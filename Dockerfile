# A GPU image of egmf-trainer. It has never been built by the project's tests, which have neither a GPU nor the base image;
# tests/project/ checks what can be checked without: the files, the packages, the shell, and that what is copied builds the wheel.
#
#   docker build -t egmf-trainer .
#   docker build -t egmf-trainer --build-arg CUDA=12.6.3 --build-arg TORCH_CUDA=cu126 --build-arg FLASH_ATTN=2.8.3 .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" egmf-trainer doctor
#
# CUDA's toolkit must be of the version that torch was built for (TORCH_CUDA): DeepSpeed and flash-attn compile against it.
ARG CUDA=12.8.1
ARG UBUNTU=24.04
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU}

ARG TORCH=2.13.0
ARG TORCH_CUDA=cu128
# empty: PyTorch's own attention; a version: flash-attn is compiled, which takes long
ARG FLASH_ATTN=

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ libaio-dev openssh-client python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/egmf PATH=/opt/egmf/bin:$PATH CUDA_HOME=/usr/local/cuda PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/egmf \
    && pip install --no-cache-dir --upgrade pip setuptools wheel \
    && pip install --no-cache-dir "torch==${TORCH}" --index-url "https://download.pytorch.org/whl/${TORCH_CUDA}"

COPY setup.py pyproject.toml README.md LICENSE constraints.txt /opt/src/
COPY trainer /opt/src/trainer
COPY launch /opt/src/launch
COPY configs /opt/src/configs
RUN cd /opt/src \
    && pip install --no-cache-dir --no-build-isolation -c constraints.txt ".[cuda]" \
    && if [ -n "${FLASH_ATTN}" ]; then pip install --no-cache-dir --no-build-isolation "flash-attn==${FLASH_ATTN}"; fi \
    && rm -rf /opt/src

RUN useradd --create-home --shell /bin/bash egmf \
    && install -d -o egmf -g egmf /work
USER egmf
WORKDIR /work
ENTRYPOINT ["egmf"]
CMD ["--help"]
