# Defines torch_stable and torch_stable_cuda: the ABI-stable surface of a PyTorch, that in the folder
# UNET_FAST_TORCH or else the one of the building interpreter. Not find_package(Torch), whose CUDA
# discovery fails, even for CPU builds, where a CUDA PyTorch meets no full toolkit.
set(UNET_FAST_TORCH "" CACHE PATH "Folder torch/ of a PyTorch, for builds for another system")
set(torch_dir ${UNET_FAST_TORCH})
if(NOT torch_dir)
  set(find "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations)")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${find}"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
file(STRINGS ${torch_dir}/version.py torch_version REGEX "^__version__ = ")
string(REGEX REPLACE ".*'(.*)'.*" "\\1" torch_version "${torch_version}")
message(STATUS "unet_fast: building with torch ${torch_version} for torch >= ${MIN_TORCH}")

string(REPLACE "." ";" version ${MIN_TORCH})
list(GET version 0 major)
list(GET version 1 minor)
math(EXPR target "(${major} << 56) | (${minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

find_library(torch_cpu torch_cpu PATHS ${torch_dir}/lib NO_CACHE REQUIRED NO_DEFAULT_PATH
  NO_CMAKE_FIND_ROOT_PATH)
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${target})
target_link_libraries(torch_stable INTERFACE ${torch_cpu})

add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable)
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
if(EXISTS ${torch_dir}/lib/libtorch_cuda.so)
  target_link_libraries(torch_stable_cuda INTERFACE -Wl,--no-as-needed ${torch_dir}/lib/libtorch_cuda.so)
else()
  # A CPU PyTorch has no libtorch_cuda.so: an empty library of that name makes the built kernels ask
  # for the real one wherever a CUDA PyTorch loads them.
  set(stub ${CMAKE_BINARY_DIR}/stub/libtorch_cuda.cpp)
  file(WRITE ${stub} "")
  add_library(torch_cuda_stub SHARED ${stub})
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda)
  target_link_libraries(torch_stable_cuda INTERFACE -Wl,--no-as-needed torch_cuda_stub)
endif()
