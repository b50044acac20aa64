# Defines torch_stable and torch_stable_cuda: the ABI-stable surface of the
# PyTorch that the building interpreter imports. Not find_package(Torch), whose
# CUDA discovery fails, even for CPU builds, where a CUDA PyTorch meets no full toolkit.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0], torch.__version__, sep=';', end='')"
  OUTPUT_VARIABLE facts COMMAND_ERROR_IS_FATAL ANY)
list(GET facts 0 torch_dir)
list(GET facts 1 torch_version)
message(STATUS "unet_fast: building with torch ${torch_version} for torch >= ${MIN_TORCH}")

string(REPLACE "." ";" version ${MIN_TORCH})
list(GET version 0 major)
list(GET version 1 minor)
math(EXPR target "(${major} << 56) | (${minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_dir}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${target})
target_link_libraries(torch_stable INTERFACE ${torch_dir}/lib/libtorch_cpu.so)

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
