#!/bin/sh
# Install cossl into a virtual environment: sh tools/setup.sh [.venv]. `make setup` calls this once.
# ffcv compiles against two Debian libraries; DALI comes for Linux only (0.6 GB). Where one of them cannot be installed, the rest is
# installed all the same and the torch loader does its work; the line that would change this is printed.
set -eu
venv=${1:-.venv}
headers="pkg-config libturbojpeg0-dev libopencv-dev"

have_headers() { command -v pkg-config >/dev/null 2>&1 && pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! have_headers && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "cossl setup: installing ffcv's headers ($headers)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $headers; } >"$venv/apt.log" 2>&1 \
        || echo "cossl setup: apt-get failed, see $venv/apt.log"
fi
echo "cossl setup: installing Python packages (about 7 GB with PyPI's CUDA build of torch)"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[log,slurm,export,dev]"
if ! "$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dali]"; then
    echo "cossl setup: WITHOUT DALI: --loader.backend dali will not run. To have it, run:"
    echo "    $venv/bin/pip install -c constraints.txt -e '.[dali]'"
fi
if have_headers && "$venv/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[ffcv]"; then
    echo "cossl setup: ready, with ffcv"
else
    echo "cossl setup: ready, WITHOUT ffcv: the torch loader reads the pictures instead. To have ffcv, run:"
    echo "    sudo apt-get install $headers && $venv/bin/pip install -c constraints.txt -e '.[ffcv]'"
fi
