#pragma once

/// Marks a function that both the CPU and the CUDA kernels call.
#if defined(__CUDACC__)
#define UNET_FAST_HOST_DEVICE __host__ __device__
#else
#define UNET_FAST_HOST_DEVICE
#endif
