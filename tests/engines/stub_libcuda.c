/* A libcuda.so.1 for machines without a driver. KVBM's leader opens the library and makes a context, streams, events
   and a memory pool at start; it moves nothing itself, so success and a fake handle are enough. Not a CUDA device. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int handle;
#define GIVES(p) do { *(p) = &handle; return 0; } while (0)
#define NOTHING(name, ...) int name(__VA_ARGS__) { return 0; }

NOTHING(cuInit, unsigned flags)
NOTHING(cuDevicePrimaryCtxRelease_v2, int device)
NOTHING(cuCtxSetCurrent, void *context)
NOTHING(cuCtxSynchronize, void)
NOTHING(cuCtxPushCurrent_v2, void *context)
NOTHING(cuStreamDestroy_v2, void *stream)
NOTHING(cuStreamSynchronize, void *stream)
NOTHING(cuStreamWaitEvent, void *stream, void *event, unsigned flags)
NOTHING(cuEventDestroy_v2, void *event)
NOTHING(cuEventRecord, void *event, void *stream)
NOTHING(cuEventSynchronize, void *event)
NOTHING(cuEventQuery, void *event)
NOTHING(cuMemPoolDestroy, void *pool)
NOTHING(cuMemPoolSetAttribute, void *pool, int attribute, void *value)
NOTHING(cuMemPoolSetAccess, void *pool, const void *map, size_t count)
NOTHING(cuMemPoolTrimTo, void *pool, size_t bytes)
NOTHING(cuMemHostRegister_v2, void *p, size_t bytes, unsigned flags)
NOTHING(cuMemHostUnregister, void *p)
NOTHING(cuMemcpyAsync, void *d, const void *s, size_t bytes, void *stream)

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cuDeviceGetName(char *name, int bytes, int device) { strncpy(name, "stub", (size_t)bytes); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)1 << 34; return 0; }
int cuDeviceGetUuid_v2(void *uuid, int device) { memset(uuid, 7, 16); return 0; }
int cuDeviceGetPCIBusId(char *id, int bytes, int device) { strncpy(id, "0000:00:00.0", (size_t)bytes); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { GIVES(context); }
int cuCtxGetCurrent(void **context) { GIVES(context); }
int cuCtxPopCurrent_v2(void **context) { GIVES(context); }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { GIVES(stream); }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) { GIVES(stream); }
int cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cuEventCreate(void **event, unsigned flags) { GIVES(event); }
int cuMemPoolCreate(void **pool, const void *properties) { GIVES(pool); }
int cuMemPoolGetAttribute(void *pool, int attribute, void *value) { *(uint64_t *)value = 0; return 0; }
int cuDeviceGetDefaultMemPool(void **pool, int device) { GIVES(pool); }
int cuModuleLoadData(void **module, const void *image) { GIVES(module); }
int cuModuleGetFunction(void **function, void *module, const char *name) { GIVES(function); }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "STUB"; return 0; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)1 << 34; return 0; }
int cuPointerGetAttribute(void *data, int attribute, void *p) { return 1; }

static int give(void **p, size_t bytes) { *p = aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095); return *p ? 0 : 2; }
int cuMemHostAlloc(void **p, size_t bytes, unsigned flags) { return give(p, bytes); }
int cuMemAlloc_v2(void **p, size_t bytes) { return give(p, bytes); }
int cuMemAllocAsync(void **p, size_t bytes, void *stream) { return give(p, bytes); }
int cuMemAllocFromPoolAsync(void **p, size_t bytes, void *pool, void *stream) { return give(p, bytes); }
int cuMemFreeHost(void *p) { free(p); return 0; }
int cuMemFree_v2(void *p) { free(p); return 0; }
int cuMemFreeAsync(void *p, void *stream) { free(p); return 0; }
int cuMemcpyHtoD_v2(void *d, const void *s, size_t bytes) { memcpy(d, s, bytes); return 0; }
int cuMemcpyDtoH_v2(void *d, const void *s, size_t bytes) { memcpy(d, s, bytes); return 0; }
int cuMemcpyHtoDAsync_v2(void *d, const void *s, size_t bytes, void *stream) { memcpy(d, s, bytes); return 0; }
int cuMemcpyDtoHAsync_v2(void *d, const void *s, size_t bytes, void *stream) { memcpy(d, s, bytes); return 0; }
int cuMemcpyDtoDAsync_v2(void *d, const void *s, size_t bytes, void *stream) { memcpy(d, s, bytes); return 0; }
int cuMemsetD8Async(void *d, unsigned char value, size_t bytes, void *stream) { memset(d, value, bytes); return 0; }
/* The worker's copy kernel: nobody launches it here. */
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned sh,
                   void *stream, void **params, void **extra) { return 0; }
