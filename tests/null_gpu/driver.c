/* The CUDA driver, NVML and NVRTC, as far as they answer more than "done": Triton and torch talk to them. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <stdlib.h>
#include <string.h>

int cuDriverGetVersion(int *version) {
  *version = 13020;
  return 0;
}
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGet(int *device, int number) {
  *device = number;
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = device_attribute(attribute);
  return 0;
}
int cuDeviceGetName(char *name, int room, int device) {
  strncpy(name, "NVIDIA H100 80GB HBM3 (null)", room);
  return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = device_memory();
  return 0;
}
static char context;
int cuCtxGetCurrent(void **answer) {
  *answer = &context;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **answer, int device) { return cuCtxGetCurrent(answer); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0, *active = 1;
  return 0;
}
int cuCtxGetDevice(int *device) {
  *device = current_device();
  return 0;
}
int cuCtxGetLimit(size_t *value, int limit) {
  *value = 0;
  return 0;
}

/* Modules and kernels: a function's handle is its name. */
int cuModuleLoadData(void **module, const void *image) {
  *module = new_handle();
  return 0;
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) {
  return cuModuleLoadData(module, image);
}
int cuModuleLoad(void **module, const char *path) { return cuModuleLoadData(module, path); }
int cuLibraryLoadData(void **library, const void *image) { return cuModuleLoadData(library, image); }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = strdup(name);
  return 0;
}
int cuLibraryGetKernel(void **function, void *library, const char *name) { return cuModuleGetFunction(function, library, name); }
int cuKernelGetFunction(void **function, void *kernel) {
  *function = kernel;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 8;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *clusters) {
  *clusters = 16;
  return 0;
}
int cuLaunchKernel(void *function) {
  record(LAUNCH, function, 0);
  return 0;
}
int cuLaunchCooperativeKernel(void *function) { return cuLaunchKernel(function); }
int cuLaunchKernelEx(void *how, void *function) { return cuLaunchKernel(function); }

int cuGetErrorString(int error, const char **text) {
  *text = "null GPU error";
  return 0;
}
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
int cuStreamIsCapturing(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }
int cuPointerGetAttribute(void *answer, int attribute, uint64_t address) {
  if (attribute == 3) *(uint64_t *)answer = address; /* of the device */
  else *(int *)answer = 2;
  return 0;
}

/* Memory mapped in parts, for torch's expandable segments. A handle of memory is its size. */
int cuMemAddressReserve(uint64_t *address, size_t bytes, size_t alignment, uint64_t wish, unsigned long long flags) {
  *address = (uint64_t)map_address(bytes, 0);
  return *address ? 0 : 2;
}
int cuMemCreate(unsigned long long *handle, size_t bytes, void *how, unsigned long long flags) {
  *handle = bytes;
  return reserve_memory(bytes) ? 0 : 2;
}
int cuMemRelease(unsigned long long handle) {
  release_memory(handle);
  return 0;
}
int cuMemMap(uint64_t address, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags) {
  set_usable((void *)address, bytes, 1);
  return 0;
}
int cuMemUnmap(uint64_t address, size_t bytes) {
  set_usable((void *)address, bytes, 0);
  return 0;
}
int cuMemGetAllocationGranularity(size_t *bytes, void *how, int option) {
  *bytes = 1 << 21;
  return 0;
}

/* NVML. What is left out, such as which devices a fabric connects, reads zero: none. */
int nvmlDeviceGetCount_v2(int *count) { return cudaGetDeviceCount(count); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
  *device = new_handle();
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return cuDriverGetVersion(version); }

/* NVRTC: every program compiles, to nothing. */
int nvrtcVersion(int *major, int *minor) {
  *major = 13, *minor = 2;
  return 0;
}
int nvrtcGetNumSupportedArchs(int *count) {
  *count = 1;
  return 0;
}
int nvrtcGetSupportedArchs(int *architectures) {
  *architectures = 90;
  return 0;
}
int nvrtcCreateProgram(void **program) {
  *program = new_handle();
  return 0;
}
#define NOTHING(size, get) \
  int size(void *program, size_t *bytes) { \
    *bytes = 16; \
    return 0; \
  } \
  int get(void *program, char *room) { \
    memset(room, 0, 16); \
    return 0; \
  }
NOTHING(nvrtcGetCUBINSize, nvrtcGetCUBIN)
NOTHING(nvrtcGetPTXSize, nvrtcGetPTX)
NOTHING(nvrtcGetProgramLogSize, nvrtcGetProgramLog)
int nvrtcGetLoweredName(void *program, const char *name, const char **lowered) {
  *lowered = "compiled";
  return 0;
}
const char *nvrtcGetErrorString(int error) { return "null NVRTC error"; }
