#!/usr/bin/env bash
# Compiles a wheel for another system, CPU kernels only: packaging/cross.sh SYSTEM OUT
#
# The compiler is the Clang of ziglang, which `pip install '.[dev]'` brings; the libraries that it
# links are those of the PyTorch for that system. What it makes shows that everything compiles and
# links there, and runs where an emulator is; releases are built on the systems themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
case "${1-}" in
  linux-x86_64) zig=x86_64-linux-gnu.2.28 name=Linux processor=x86_64 tag=manylinux_2_28_x86_64 ;;
  linux-aarch64) zig=aarch64-linux-gnu.2.28 name=Linux processor=aarch64 tag=manylinux_2_28_aarch64 ;;
  macos-arm64) zig=aarch64-macos.14.0 name=Darwin processor=arm64 tag=macosx_14_0_arm64 ;;
  windows-x64) zig=x86_64-windows-gnu name=Windows processor=AMD64 tag=win_amd64 ;;
  *) echo "SYSTEM must be linux-x86_64, linux-aarch64, macos-arm64 or windows-x64, got '${1-}'" >&2; exit 2 ;;
esac
: "${2:?OUT must name a folder}"
mkdir -p "$2" && out=$(cd "$2" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform "$tag" \
  --dest "$work" "torch==$torch"
(cd "$work" && python -m zipfile -e torch-*.whl torch)

# The compiler as CMake calls it; zig has names of its own for processors.
cat > "$work/c++" << END
#!/usr/bin/env bash
exec "$(command -v python)" -m ziglang c++ -g0 -target $zig "\${@/#-march=x86-64-v/-march=x86_64_v}"
END
chmod +x "$work/c++"
cat > "$work/toolchain.cmake" << END
set(CMAKE_SYSTEM_NAME $name)
set(CMAKE_SYSTEM_PROCESSOR $processor)
set(CMAKE_CXX_COMPILER $work/c++)
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
