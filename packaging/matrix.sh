#!/usr/bin/env bash
# Installs one wheel beside each Python and PyTorch, without a compiler, and runs smoke.py there:
#
#   packaging/matrix.sh WHEEL [PYTHON:TORCH ...]
#
# TORCH is a version, or "newest". Each cell has an environment of its own; a line for each says what
# was run. Needs uv. Exits with 1 if a cell fails.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wheel=$(realpath "${1:?WHEEL must name a file}")
shift
[ $# -gt 0 ] || set -- 3.11:2.10.0 3.11:2.13.0 3.12:2.13.0 3.13:newest
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "$(sha256sum < "$wheel" | cut -c1-12) $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"

failed=0
for cell in "$@"; do
  python=${cell%%:*} torch=${cell#*:}
  if [ "$torch" = newest ]; then torch=torch; else torch="torch==$torch"; fi
  env="$work/env"
  rm -rf "$env"
  # As a user does: by name, from an index. This one is a folder with a single wheel.
  uv venv --quiet --no-config --python "$python" "$env" &&
    uv pip install --quiet --python "$env" --only-binary :all: --find-links "$(dirname "$wheel")" \
      "$torch" "unet_fast @ file://$wheel" &&
    (cd "$work" && env -i HOME="$work" PATH="$env/bin" "$env/bin/python" "$here/smoke.py") ||
    { echo "$cell: FAILED"; failed=1; }
done
exit $failed
