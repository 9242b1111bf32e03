# Atoll's server and nodes in one image: `docker build -t atoll .`, then `docker run atoll --help`.
FROM python:3.11.13-slim-bookworm

WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY src src
# The versions of the lock file, without what only developers need (pip takes no hashes together with a folder).
RUN sed -n 's/^\([a-z0-9][^ ]*==[^\\]*\)\\\?$/\1/p' requirements.lock > /tmp/versions \
 && pip install --no-cache-dir --constraint /tmp/versions '.[keras,kafka,sklearn]' \
 && useradd --create-home --uid 10001 atoll \
 && install -d -o atoll -g atoll /var/lib/atoll

USER atoll
WORKDIR /var/lib/atoll
ENV KERAS_BACKEND=jax
ENTRYPOINT ["atoll"]
CMD ["--help"]
