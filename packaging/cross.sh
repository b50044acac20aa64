#!/usr/bin/env bash
# Compiles a wheel for another system, CPU kernels only: packaging/cross.sh SYSTEM OUT
#
# The compiler is Debian's for ARM (g++-aarch64-linux-gnu), else the Clang of ziglang, which `pip
# install '.[dev]'` brings. Either links the PyTorch for that system. Releases are built on the
# systems themselves: what ziglang links holds a C++ runtime of its own, so that an exception of a
# kernel, as for bad values, would end the process. It shows that everything compiles and links.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
case "${1-}" in
  linux-aarch64)
    name=Linux processor=aarch64 torch_tag=manylinux_2_28_aarch64 tag=linux_aarch64
    cxx=$(command -v aarch64-linux-gnu-g++) || { echo "needs g++-aarch64-linux-gnu" >&2; exit 2; } ;;
  macos-arm64) name=Darwin processor=arm64 tag=macosx_14_0_arm64 zig=aarch64-macos.14.0 ;;
  windows-x64) name=Windows processor=AMD64 tag=win_amd64 zig=x86_64-windows-gnu ;;
  *) echo "SYSTEM must be linux-aarch64, macos-arm64 or windows-x64, got '${1-}'" >&2 && exit 2 ;;
esac
[ -n "${2-}" ] || { echo "OUT must name a folder" >&2; exit 2; }
mkdir -p "$2" && out=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform "${torch_tag-$tag}" \
  --dest "$work" "torch==$torch"
(cd "$work" && python -m zipfile -e torch-*.whl torch)

if [ -z "${cxx-}" ]; then  # zig has names of its own for processors
  cxx="$work/c++"
  cat > "$cxx" << END
#!/usr/bin/env bash
exec "$(command -v python)" -m ziglang c++ -g0 -target $zig "\${@/#-march=x86-64-v/-march=x86_64_v}"
END
  chmod +x "$cxx"
fi
cat > "$work/toolchain.cmake" << END
set(CMAKE_SYSTEM_NAME $name)
set(CMAKE_SYSTEM_PROCESSOR $processor)
set(CMAKE_CXX_COMPILER $cxx)
set(CMAKE_OSX_SYSROOT "")
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
END
pip wheel --quiet --no-deps --no-build-isolation . \
  --wheel-dir "$work/wheel" --config-settings=build-dir="$work/build" \
  --config-settings=install.strip=false --config-settings=cmake.define.UNET_FAST_CUDA=OFF \
  --config-settings=cmake.define.UNET_FAST_TORCH="$work/torch/torch" \
  --config-settings=cmake.define.CMAKE_TOOLCHAIN_FILE="$work/toolchain.cmake"
wheel tags --remove --platform-tag "$tag" "$work"/wheel/*.whl > /dev/null
mv "$work"/wheel/*.whl "$out"
ls -l "$out"/*"$tag"*.whl
