/* The CUDA runtime's streams, events and kernels, cuBLAS and cuDNN, as far as they answer more than "done". */
#define _GNU_SOURCE
#include "null_gpu.h"
#include "cudnn_version.h"
#include "driver_types.h"
#include "vector_types.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo
#undef cudaGraphInstantiate

#define TOKEN(function, ...) \
  int function(void **answer, ##__VA_ARGS__) { \
    *answer = new_handle(); \
    return 0; \
  }

static uintptr_t last_handle = 0x1000;
void *new_handle(void) { return (void *)__sync_add_and_fetch(&last_handle, 16); }

/* The device: an H100. */
int cudaGetDeviceCount(int *count) {
  const char *number = getenv("NULL_GPU_COUNT");
  *count = number ? atoi(number) : 1;
  return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *about, int device) {
  memset(about, 0, sizeof *about);
  strcpy(about->name, "NVIDIA H100 80GB HBM3 (null)");
  about->uuid.bytes[0] = device + 1;
  about->totalGlobalMem = device_memory();
  about->major = 9, about->minor = 0;
  about->multiProcessorCount = device_attribute(16);
  about->warpSize = 32;
  about->maxThreadsPerBlock = 1024, about->maxThreadsPerMultiProcessor = 2048, about->maxBlocksPerMultiProcessor = 32;
  about->maxThreadsDim[0] = about->maxThreadsDim[1] = 1024, about->maxThreadsDim[2] = 64;
  about->maxGridSize[0] = 2147483647, about->maxGridSize[1] = about->maxGridSize[2] = 65535;
  about->sharedMemPerBlock = 49152, about->sharedMemPerBlockOptin = 232448, about->sharedMemPerMultiprocessor = 233472;
  about->regsPerBlock = about->regsPerMultiprocessor = 65536;
  about->l2CacheSize = 52428800, about->memoryBusWidth = 5120;
  return 0;
}
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *about, int device) { return cudaGetDeviceProperties(about, device); }
int device_attribute(int attribute) { /* numbered as in enum cudaDeviceAttr */
  switch (attribute) {
  case 1: case 2: case 3: return 1024; /* threads of a block, and along x and y */
  case 4: return 64;
  case 5: return 2147483647;
  case 6: case 7: return 65535;
  case 8: return 49152;
  case 10: return 32;
  case 12: case 82: return 65536;
  case 13: return 1980000;
  case 16: return 132; /* multiprocessors */
  case 36: return 2619000;
  case 37: return 5120;
  case 38: return 52428800;
  case 39: return 2048;
  case 75: return 9; /* compute capability */
  case 76: return 0;
  case 81: return 233472;
  case 95: case 102: return 1; /* cooperative launch; virtual memory management */
  case 97: return 232448;
  case 106: return 32;
  default: return 0;
  }
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = device_attribute(attribute);
  return 0;
}
int cudaDriverGetVersion(int *version) {
  *version = 13020;
  return 0;
}
int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cudaDeviceGetPCIBusId(char *text, int room, int device) {
  strncpy(text, "0000:00:00.0", room);
  return 0;
}
int cudaDeviceCanAccessPeer(int *can, int from, int to) {
  *can = 1;
  return 0;
}
TOKEN(cudaDeviceGetDefaultMemPool, int device)
int cudaPointerGetAttributes(struct cudaPointerAttributes *about, const void *address) {
  static const int types[] = {0, 1, 2}; /* cudaMemoryTypeUnregistered, Host, Device */
  memset(about, 0, sizeof *about);
  about->type = types[place_of(address)];
  about->device = current_device();
  about->devicePointer = about->hostPointer = (void *)address;
  return 0;
}
const char *cudaGetErrorString(int error) { return error == 2 ? "out of memory" : error == 900 ? "captured" : "null GPU error"; }
const char *cudaGetErrorName(int error) { return error == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown"; }

/* Streams and events: everything is done at once. A stream that is captured into a graph must not be waited for. */
static __thread void *captured;
static __thread unsigned long long capture;
static unsigned long long captures;

TOKEN(cudaStreamCreate)
TOKEN(cudaStreamCreateWithFlags, unsigned flags)
TOKEN(cudaStreamCreateWithPriority, unsigned flags, int priority)
TOKEN(cudaEventCreate)
TOKEN(cudaEventCreateWithFlags, unsigned flags)
static int wait_for_device(const char *name) {
  if (capture) return 900; /* cudaErrorStreamCaptureUnsupported */
  record(SYNC, name, 0);
  return 0;
}
int cudaStreamSynchronize(void *stream) { return wait_for_device("cudaStreamSynchronize"); }
int cudaDeviceSynchronize(void) { return wait_for_device("cudaDeviceSynchronize"); }
int cudaEventSynchronize(void *event) { return wait_for_device("cudaEventSynchronize"); }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) {
  *milliseconds = 0.01f;
  return 0;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0, *greatest = -5;
  return 0;
}
int cudaStreamGetPriority(void *stream, int *priority) {
  *priority = 0;
  return 0;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaStreamBeginCapture(void *stream, int mode) {
  captured = stream, capture = __sync_add_and_fetch(&captures, 1);
  return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  capture = 0, *graph = new_handle();
  return 0;
}
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = capture && stream == captured;
  return 0;
}
int cudaStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture;
  return 0;
}
int cudaStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id) {
  return cudaStreamGetCaptureInfo_v2(stream, status, id);
}
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
  return cudaStreamGetCaptureInfo_v2(stream, status, id);
}
TOKEN(cudaGraphInstantiate)
TOKEN(cudaGraphInstantiateWithFlags)
int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
  *count = 1;
  return 0;
}
int cudaGraphLaunch(void *graph, void *stream) {
  record(LAUNCH, "graph", 0);
  return 0;
}

/* Kernels: counted by the names that torch's libraries register. */
#define TABLE (1 << 18)
static struct {
  const void *function;
  const char *name;
} kernels[TABLE];

static size_t slot_of(const void *function) {
  size_t slot = ((uintptr_t)function >> 4) * 0x9E3779B97F4A7C15ull >> 46;
  while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % TABLE;
  return slot;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[16];
  return handle;
}
void __cudaRegisterFunction(void **handle, const char *function, char *on_device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid, int *warp) {
  size_t slot = slot_of(function);
  kernels[slot].function = function, kernels[slot].name = name;
}
static int launch(const void *function) {
  const char *name = kernels[slot_of(function)].name;
  record(LAUNCH, name ? name : "unnamed", 0);
  return 0;
}
int cudaLaunchKernel(const void *function, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream) {
  return launch(function);
}
int __cudaLaunchKernel(void *function, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream) {
  return launch(function);
}
int cudaLaunchKernelExC(const void *how, const void *function, void **arguments) { return launch(function); }
int __cudaGetKernel(void **kernel, const void *function) {
  *kernel = (void *)function;
  return 0;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *about, const void *function) {
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024, about->numRegs = 32, about->binaryVersion = about->ptxVersion = 90;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) {
  *blocks = 8;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared,
                                                           unsigned flags) {
  *blocks = 8;
  return 0;
}
int cudaGetSymbolAddress(void **address, const void *symbol) {
  static char room[1 << 20];
  *address = room;
  return 0;
}
static int done(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void *)done;
  if (status) *status = 0;
  return 0;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

/* cuBLAS. What computes is among the generated functions. */
int cublasGetPointerMode_v2(void *handle, int *mode) {
  *mode = 0;
  return 0;
}
int cublasGetMathMode(void *handle, int *mode) {
  *mode = 0;
  return 0;
}
size_t cublasLtGetVersion(void) { return 130400; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *how, void *a, void *b, void *c, void *d, void *wishes, int wanted,
                                   char *results, int *found) {
  *found = wanted > 0;
  if (wanted > 0) memset(results, 0, 96); /* a cublasLtMatmulHeuristicResult_t */
  return 0;
}

/* cuDNN. Convolutions come by its graph API (cudnn_graph.h, by which these attributes are numbered) or by the old one. */
size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
int cudnnGetProperty(int part, int *number) {
  *number = part == 0 ? CUDNN_MAJOR : part == 1 ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
  return 0;
}
size_t cudnnGetCudartVersion(void) { return 13020; }
const char *cudnnGetErrorString(int status) { return "null cuDNN error"; }
void cudnnGetLastErrorString(char *text, size_t room) {
  if (room) *text = 0;
}
enum { HEURISTIC_RESULTS = 202, CONFIG_ENGINE = 300, PLAN_WORKSPACE = 402, PLAN_JSON = 405, ENGINE_INDEX = 1301 };
int cudnnBackendCreateDescriptor(int type, void **descriptor) {
  *descriptor = new_handle();
  return 0;
}
int cudnnBackendGetAttribute(void *descriptor, int attribute, int type, int64_t wanted, int64_t *found, void *values) {
  int64_t ignored;
  if (!found) found = &ignored;
  *found = 1;
  switch (attribute) {
  case HEURISTIC_RESULTS: case CONFIG_ENGINE: return 0;
  case PLAN_WORKSPACE: if (values) *(int64_t *)values = 0; return 0;
  case ENGINE_INDEX: if (values) *(int64_t *)values = 1; return 0;
  case PLAN_JSON: if (values && wanted) memcpy(values, "{}", 3); *found = 3; return 0;
  default: *found = 0; return 0;
  }
}
int cudnnBackendExecute(void *handle, void *plan, void *arguments) {
  record(LAUNCH, "cudnnBackendExecute", 0);
  return 0;
}
struct algorithm { /* a cudnnConvolutionFwdAlgoPerf_t and its like */
  int algorithm, status;
  float milliseconds;
  size_t memory;
  int deterministic, math, reserved[3];
};
static int one_algorithm(int *found, struct algorithm *result) {
  *found = 1;
  *result = (struct algorithm){.algorithm = 1, .milliseconds = 0.1f, .deterministic = 1, .math = 3};
  return 0;
}
#define CHOICE(get, find) \
  int get(void *handle, void *a, void *b, void *c, void *d, int wanted, int *found, struct algorithm *results) { \
    return one_algorithm(found, results); \
  } \
  int find(void *handle, void *a, void *x, void *b, void *y, void *c, void *d, void *z, int wanted, int *found, \
           struct algorithm *results, void *room, size_t bytes) { \
    return one_algorithm(found, results); \
  }
CHOICE(cudnnGetConvolutionForwardAlgorithm_v7, cudnnFindConvolutionForwardAlgorithmEx)
CHOICE(cudnnGetConvolutionBackwardDataAlgorithm_v7, cudnnFindConvolutionBackwardDataAlgorithmEx)
CHOICE(cudnnGetConvolutionBackwardFilterAlgorithm_v7, cudnnFindConvolutionBackwardFilterAlgorithmEx)
#define NO_WORKSPACE(function) \
  int function(void *handle, void *a, void *b, void *c, void *d, int algorithm, size_t *bytes) { \
    *bytes = 0; \
    return 0; \
  }
NO_WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
NO_WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
NO_WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *handle, int mode, int op, void *a, void *b, void *c, void *d,
                                                             void *e, size_t *bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *handle, int mode, int op, void *a, void *b, size_t *bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *handle, int mode, int op, void *a, void *b, void *c, void *d, void *e,
                                                      void *f, void *g, size_t *bytes) {
  *bytes = 0;
  return 0;
}

/* What waits in a stream for its turn has it at once. */
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  function(data);
  return 0;
}
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) {
  function(stream, 0, data);
  return 0;
}
