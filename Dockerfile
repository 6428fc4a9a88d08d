# sfmodel for hosts with NVIDIA GPUs (H100, H200, …): docs/hardware.md.
FROM pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime

# Triton compiles what launches its kernels where they run; the C++ ops are compiled here.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The image's PyTorch and Triton are kept: whatever asks for others fails the build. Builds are not
# isolated, so that the C++ ops are compiled with this PyTorch.
WORKDIR /opt/sfkernels
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY sfkernels sfkernels
COPY sfmodel sfmodel
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
RUN python3 -m pip freeze | grep -E '^(torch|triton)==' >kept.txt \
    && test "$(wc -l <kept.txt)" = 2 \
    && python3 -m pip install -c kept.txt 'setuptools>=77' \
    && python3 -m pip install -c kept.txt --no-build-isolation '.[model,serve,text,bench]'

# `python3 -m bench` is no part of the package.
COPY bench /opt/bench/bench
COPY experiments /opt/bench/experiments
ENV PYTHONPATH=/opt/bench

# Kernels that were compiled and embeddings stay in the home folder, which may be mounted.
RUN useradd --create-home --home-dir /work sfmodel
ENV HOME=/work USER=sfmodel
USER sfmodel
WORKDIR /work
ENTRYPOINT ["sfmodel"]
CMD ["doctor"]
