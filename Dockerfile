# docker build -t blockwise-sft . ; docs/running.md says how to train in it. Without a command it runs the demo.
FROM python:3.11-slim
# a C compiler, for what torch compiles while it runs: COMPILE and flex attention
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /blockwise
COPY setup.sh requirements.txt ./
RUN bash setup.sh
ENV PATH=/blockwise/.venv/bin:$PATH
COPY . .
CMD ["bash", "demo.sh"]
