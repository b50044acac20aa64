#!/usr/bin/env bash
# Installs one wheel beside each Python and PyTorch, without a compiler, and runs smoke.py there:
#
#   packaging/matrix.sh WHEEL [PYTHON:TORCH ...]
#
# TORCH is a version, or "newest". Each cell has an environment of its own; a line for each says what
# was run. Needs uv. Exits with 1 if a cell fails.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ -f "${1-}" ] || { echo "WHEEL must name a file, got '${1-}'" >&2; exit 2; }
command -v uv > /dev/null || { echo "needs uv: pip install uv" >&2; exit 2; }
wheel=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- 3.11:2.10.0 3.11:2.13.0 3.12:2.13.0 3.13:newest
if command -v pyenv > /dev/null; then  # its shims stand for one version only
  PATH="$(printf '%s:' "$(pyenv root)"/versions/*/bin)$PATH"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "$(sha256sum < "$wheel" | cut -c1-12) $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"

mkdir "$work/index" && cp "$wheel" "$work/index"  # installed by name, as users do
failed=0
for cell in "$@"; do
  python=${cell%%:*} torch=${cell#*:}
  if [ "$torch" = newest ]; then torch=torch; else torch="torch==$torch"; fi
  env="$work/env"
  rm -rf "$env"
  uv venv --quiet --no-config --python "$python" "$env" &&
    uv pip install --quiet --python "$env" --only-binary :all: --find-links "$work/index" \
      "$torch" "unet_fast==$(basename "$wheel" | cut -d- -f2)" &&
    (cd "$work" && env -i HOME="$work" PATH="$env/bin" "$env/bin/python" "$here/smoke.py") ||
    { echo "$cell: FAILED"; failed=1; }
done
exit $failed
