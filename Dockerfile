# syntax=docker/dockerfile:1.7
# The image of every pod, head, gateways and workers alike: target `cpu`, or `cuda` for NVIDIA GPUs.
#   docker build --target cpu -t eightfold:0.1.0-cpu .
# Versions are those of requirements-dev.txt, of which only what runs is installed.

FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements-dev.txt ./
# Without the tools and the tests' packages; what those bring along stands with what ours bring along. torch
# comes from an index of its own.
RUN sed -e '/^# tools/,/^# what those bring along/d' -e '/^torch==/d' requirements-dev.txt > requirements.txt

FROM build AS libraries-cpu
RUN pip install --index-url https://download.pytorch.org/whl/cpu --no-deps torch==2.13.0 \
    && pip install --no-deps -r requirements.txt

FROM build AS libraries-cuda
# The pair of torch and Triton that the kernels are tested with, for CUDA 13; torch names most of its libraries
# exactly, the others stand here.
RUN pip install torch==2.11.0 triton==3.6.0 cuda-bindings==13.5.0 cuda-pathfinder==1.9.0 \
    && pip install --no-deps -r requirements.txt cupy-cuda13x==14.2.0

FROM build AS package
RUN pip install --no-deps hatchling==1.33.0 packaging==26.3 pathspec==1.1.1 pluggy==1.7.0 trove-classifiers==2026.9.21.13
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY workers workers
COPY cluster cluster
RUN pip install --no-deps --no-build-isolation --target /opt/eightfold .

FROM python:3.12.12-slim-bookworm AS cpu
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin eightfold
COPY --from=libraries-cpu /opt/venv /opt/venv
COPY --from=package /opt/eightfold /opt/eightfold
ENV PATH=/opt/eightfold/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/eightfold \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/eightfold
USER 10001:10001
CMD ["eightfold", "--help"]

# Not the slim one: Triton compiles a small piece of C when it is first used, and asks for gcc.
FROM python:3.12.12-bookworm AS cuda
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin eightfold
COPY --from=libraries-cuda /opt/venv /opt/venv
COPY --from=package /opt/eightfold /opt/eightfold
ENV PATH=/opt/eightfold/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/eightfold \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/eightfold
USER 10001:10001
CMD ["eightfold", "--help"]
