# The demo, on a CPU:
#   docker build -t dualpath .
#   docker run --rm dualpath
FROM python:3.11-slim-bookworm

# What launch/setup/system_check.py looks for, and make.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ libcurl4 libibverbs1 libnuma1 libssl-dev libstdc++6 make ninja-build util-linux \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dualpath \
    && install --directory --owner dualpath --group dualpath /home/dualpath/project

USER 1000:1000
WORKDIR /home/dualpath/project
ENV PATH="/home/dualpath/project/.venv/bin:$PATH" \
    PIP_NO_CACHE_DIR=1

# Packages are a layer of their own: they change seldom and are large.
COPY --chown=1000:1000 Makefile ./
COPY --chown=1000:1000 requirements requirements
COPY --chown=1000:1000 launch/setup/system_check.py launch/setup/
RUN make .venv/.packages

COPY --chown=1000:1000 . .
RUN make setup

CMD ["dualpath", "demo"]
