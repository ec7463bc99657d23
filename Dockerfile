# Two images from one file:
#   docker build --target app --tag xinglin-app .
#   docker build --target training --tag xinglin-training .
# For an NVIDIA GPU add:
#   --build-arg REQUIREMENTS=cuda.txt --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130

FROM python:3.11-slim-bookworm AS base
ARG REQUIREMENTS=cpu.txt
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# libgomp and libnuma: what vLLM's CPU build links to. gcc: Triton compiles its launchers at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
        $(test ${REQUIREMENTS} = cpu.txt || echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 xinglin \
    && install --directory --owner=xinglin --group=xinglin /data /app
WORKDIR /app
COPY requirements/${REQUIREMENTS} requirements.txt
RUN pip install --no-cache-dir --no-deps --index-url ${TORCH_INDEX} $(grep '^torch==' requirements.txt) \
    && pip install --no-cache-dir --no-deps --requirement requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
ENV XINGLIN_DATA_DIR=/data PYTHONUNBUFFERED=1 PYTHONPATH=/app
VOLUME /data
USER xinglin

FROM base AS app
COPY app app
ENV XINGLIN_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --start-period=180s --interval=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]

FROM base AS training
COPY training training
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
