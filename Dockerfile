# The HECKTOR container: /input in, /output out (scripts/runtimes/grand_challenge.py). Needs no network when it runs.
#
#   docker build -t head_neck_petct .
#   docker run --rm --network none --memory 16g -v $PWD/in:/input:ro -v $PWD/out:/output head_neck_petct --year 2025
#
# The weights lie at bundle/models/model.pt before the build, or are put at /opt/ml/model/model.pt when it runs; the output
# folder must be writable for user 10001.
# An image of this has not been built yet: no container engine was at hand. Every step was tried outside of one, with
# Python 3.11 on Debian: the installation into an empty environment, the two copies, and the run from /input to /output
# as user 10001, with no home to write to and no network interface.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    USER=predictor
# MONAI asks for the user's name when it is imported, and 10001 has none in the image.

WORKDIR /opt/app
COPY requirements.txt .
RUN pip install -r requirements.txt

COPY bundle bundle
COPY scripts/command_line.py scripts/
COPY scripts/runtimes/__init__.py scripts/runtimes/__main__.py scripts/runtimes/
COPY scripts/runtimes/grand_challenge.py scripts/runtimes/inference.py scripts/runtimes/
RUN python -m compileall -q bundle scripts

USER 10001:10001
# The challenge's year, 2025 or 2026. Given once more after the image's name, it replaces this.
ENTRYPOINT ["python", "scripts/runtimes", "grand_challenge"]
CMD ["--year", "2025"]
