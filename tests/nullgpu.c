/* A GPU that computes nothing: the calls of CUDA's runtime that torch needs answers of. `nullgpu.py` adds the rest. */
#define cudaStreamGetCaptureInfo of_many_arguments /* which differ from version to version */
#include <cuda_runtime_api.h>
#undef cudaStreamGetCaptureInfo
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CALL cudaError_t
#define PINNED 65536 /* ranges of pinned memory that are known at a time */
#define PAGE (2ul << 20)

/* Kernels, waits of the host, copies to the device, and those of them out of memory that is not pinned. */
long null_launches, null_waits, null_arrivals, null_pageable;

static struct { char *first, *end; } pinned[PINNED];
static uintptr_t handles = 4096; /* of streams and events: never read */
static const size_t TOTAL = 80ul << 30;

static void *handle(void) { return (void *)(handles += 64); }

static int is_pinned(const void *at) {
  for (int n = 0; n < PINNED; n++)
    if ((const char *)at >= pinned[n].first && (const char *)at < pinned[n].end) return 1;
  return 0;
}

/* One device */
CALL cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
CALL cudaGetDevice(int *n) { *n = 0; return cudaSuccess; }
CALL cudaSetDevice(int n) { return cudaSuccess; }
CALL cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
CALL cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
CALL cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return cudaSuccess; }

CALL cudaGetDeviceProperties(struct cudaDeviceProp *of, int n) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "null GPU");
  of->major = 9, of->minor = 0, of->totalGlobalMem = TOTAL, of->multiProcessorCount = 132, of->warpSize = 32;
  of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024, of->maxThreadsDim[2] = 64;
  of->maxGridSize[0] = INT32_MAX, of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->maxThreadsPerMultiProcessor = 2048, of->maxBlocksPerMultiProcessor = 32, of->l2CacheSize = 50 << 20;
  of->sharedMemPerBlock = 48 << 10, of->sharedMemPerBlockOptin = 227 << 10, of->sharedMemPerMultiprocessor = 228 << 10;
  of->regsPerBlock = of->regsPerMultiprocessor = 65536;
  return cudaSuccess;
}

CALL cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int n) {
  struct cudaDeviceProp of;
  cudaGetDeviceProperties(&of, n);
  *value = which == cudaDevAttrMultiProcessorCount           ? of.multiProcessorCount
           : which == cudaDevAttrMaxThreadsPerMultiProcessor ? of.maxThreadsPerMultiProcessor
           : which == cudaDevAttrMaxThreadsPerBlock          ? of.maxThreadsPerBlock
           : which == cudaDevAttrWarpSize                    ? of.warpSize
           : which == cudaDevAttrComputeCapabilityMajor      ? of.major
           : which == cudaDevAttrMaxSharedMemoryPerBlock     ? of.sharedMemPerBlock
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? of.sharedMemPerBlockOptin
                                                              : 0;
  return cudaSuccess;
}

CALL cudaGetDriverEntryPointByVersion(const char *name, void **at, unsigned version, unsigned long long flags,
                                      enum cudaDriverEntryPointQueryResult *result) {
  *at = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorSymbolNotFound;
}

/* Memory: addresses that take no room until they are touched */
CALL cudaMalloc(void **at, size_t bytes) {
  *at = mmap(0, (bytes + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
             -1, 0);
  return *at == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}
CALL cudaFree(void *at) { return cudaSuccess; }
CALL cudaMemGetInfo(size_t *free, size_t *total) { *free = TOTAL - (1ul << 30), *total = TOTAL; return cudaSuccess; }

CALL cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
  *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  for (int n = 0; n < PINNED; n++)
    if (!pinned[n].first) {
      pinned[n].first = *at, pinned[n].end = pinned[n].first + bytes;
      return cudaSuccess;
    }
  return cudaErrorMemoryAllocation;
}
CALL cudaFreeHost(void *at) {
  for (int n = 0; n < PINNED; n++)
    if (pinned[n].first == at) pinned[n].first = pinned[n].end = NULL;
  free(at);
  return cudaSuccess;
}
CALL cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *at) {
  memset(of, 0, sizeof *of);
  of->type = is_pinned(at) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

/* Copies: between host and device they happen, since both are the host's memory */
CALL cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind == cudaMemcpyHostToDevice) null_arrivals++, null_pageable += !is_pinned(from);
  if (kind == cudaMemcpyDeviceToDevice) null_launches++;
  else memcpy(to, from, bytes);
  return cudaSuccess;
}
CALL cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  null_waits++;
  return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
CALL cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) { null_launches++; return cudaSuccess; }

/* Waits */
CALL cudaStreamSynchronize(cudaStream_t stream) { null_waits++; return cudaSuccess; }
CALL cudaDeviceSynchronize(void) { null_waits++; return cudaSuccess; }
CALL cudaEventSynchronize(cudaEvent_t event) { null_waits++; return cudaSuccess; }
CALL cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return cudaSuccess; }

/* Streams and events */
CALL cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = handle();
  return cudaSuccess;
}
CALL cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = handle(); return cudaSuccess; }
CALL cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); return cudaSuccess; }
CALL cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = handle(); return cudaSuccess; }
CALL cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
CALL cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
CALL cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, ...) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

/* Kernels */
int __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
int __cudaLaunchKernel(void *kernel) { null_launches++; return 0; }
CALL cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **args) {
  null_launches++;
  return cudaSuccess;
}
CALL cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024, of->numRegs = 32, of->ptxVersion = of->binaryVersion = 90;
  return cudaSuccess;
}
CALL cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t bytes,
                                                            unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

/* cuBLAS */
int cublasCreate_v2(void **at) { *at = handle(); return 0; }
int cublasGetPointerMode_v2(void *blas, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  *found = 1;
  return 0;
}
