# The model server on a CPU. The first start downloads the model into the volume.
#
#   docker build --tag bge-m3 --build-arg PIP_EXTRA_INDEX_URL=... .
#
# with the index of CPU builds that PyTorch's installation page names; without, the image has CUDA.
#
#   docker run --env BGE_M3_API_KEY --publish 8000:8000 --volume bge-m3:/cache bge-m3
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY langchain_bge_dense langchain_bge_dense
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"
RUN useradd --create-home --uid 1000 bge && install --directory --owner bge /cache

USER 1000
ENV HF_HOME=/cache
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=15m --interval=10s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["python", "-m", "langchain_bge_dense.serve", "--host", "0.0.0.0"]
