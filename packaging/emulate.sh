#!/usr/bin/env bash
# Tests a wheel for Linux on ARM in an emulator: packaging/emulate.sh WHEEL [PYTEST ARGUMENTS]
#
# On Debian, as root: Python and its libraries come from the packages for ARM, PyTorch is the oldest
# that is supported. Needs uv. Without arguments it runs `unet-fast info`, which compares each
# operator with its reference.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -f "${1-}" ] || { echo "WHEEL must name a file, got '${1-}'" >&2; exit 2; }
wheel=$(realpath "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

dpkg --add-architecture arm64
apt-get update -qq
apt-get install -y -qq qemu-user-static > /dev/null
cd "$work"
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 libgomp1
  zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libsqlite3-0 libuuid1 libncursesw6 libtinfo6
  libreadline8 libdb5.3 libcrypt1"
apt-get -o APT::Sandbox::User=root download -qq $(printf '%s:arm64 ' $packages)
for package in *.deb; do dpkg -x "$package" root; done
uv pip install --quiet --target site --python-platform aarch64-manylinux_2_28 --python-version 3.11 \
  --only-binary :all: torch==2.10.0 "unet_fast @ file://$wheel" pytest pytest-benchmark hypothesis pybind11

export PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
run=(-m unet_fast.cli info)
[ $# = 0 ] || run=(-m pytest -p no:cacheprovider -c "$here/pyproject.toml" "$@")
qemu-aarch64-static -L root root/usr/bin/python3.11 "${run[@]}"
