# An image with CUDA, from PyTorch's wheels. How to run it: docs/how-to/multi-gpu.md
#
#   docker build -t mgtrain .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY mgtrain mgtrain
COPY recipes recipes
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# Triton, which compiles the kernels of GPUs, calls a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# Any user may run it: `docker run --user`. Caches of compiled kernels go where everyone can write.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /work
ENTRYPOINT ["mgtrain"]
CMD ["--help"]
