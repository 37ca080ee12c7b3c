/* cuda_driver.c - libcuda by dlopen, a device's primary context, pinned memory. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *symbol;
    size_t at;
} calls[] = {
#define ENTRY(name, suffix, arguments) {#name suffix, offsetof(kvo_cuda, name)},
    KVO_CUDA_CALLS(ENTRY)
#undef ENTRY
};

/* Looks all functions up. The library stays for the life of the process: others use it too. */
static int load(kvo_cuda *cuda, char err[KVO_ERR_BYTES]) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(err, KVO_ERR_BYTES, "CUDA device %d cannot be used, there is no CUDA driver: %s", cuda->ordinal,
                 dlerror());
        return -ENODEV;
    }
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        void *found = dlsym(library, calls[i].symbol);
        if (found == NULL) {
            snprintf(err, KVO_ERR_BYTES, "CUDA device %d cannot be used, the CUDA driver is too old: it lacks %s",
                     cuda->ordinal, calls[i].symbol);
            return -ENODEV;
        }
        memcpy((char *)cuda + calls[i].at, &found, sizeof found);
    }
    if (cuda->cuDriverGetVersion(&cuda->version) != CU_SUCCESS) cuda->version = 0;
    void *batch = NULL;
    if (cuda->version >= 13000) batch = dlsym(library, "cuMemcpyBatchAsync_v2");
    memcpy(&cuda->batch_13000, &batch, sizeof batch);
    if (batch != NULL) return 0;
    if (cuda->version >= 12080) batch = dlsym(library, "cuMemcpyBatchAsync");
    memcpy(&cuda->batch_12080, &batch, sizeof batch);
    return 0;
}

const char *kvo_cuda_error(const kvo_cuda *cuda, cu_result result) {
    const char *name = NULL;
    if (cuda->cuGetErrorName(result, &name) != CU_SUCCESS || name == NULL) return "an unknown error";
    return name;
}

static int refuse(const kvo_cuda *cuda, const char *call, cu_result result, char err[KVO_ERR_BYTES]) {
    snprintf(err, KVO_ERR_BYTES, "CUDA device %d cannot be used: %s: %s", cuda->ordinal, call,
             kvo_cuda_error(cuda, result));
    return -ENODEV;
}

int kvo_cuda_open(kvo_cuda *cuda, int ordinal, char err[KVO_ERR_BYTES]) {
    *cuda = (kvo_cuda){.ordinal = ordinal};
    int status = load(cuda, err), count = 0;
    if (status != 0) return status;
    cu_result result = cuda->cuInit(0);
    if (result != CU_SUCCESS && result != CU_NO_DEVICE) return refuse(cuda, "cuInit", result, err);
    if (result == CU_SUCCESS) result = cuda->cuDeviceGetCount(&count);
    if (result != CU_SUCCESS && result != CU_NO_DEVICE) return refuse(cuda, "cuDeviceGetCount", result, err);
    if (ordinal >= count) {
        snprintf(err, KVO_ERR_BYTES, "CUDA device %d cannot be used: there are %d devices", ordinal, count);
        return -ENODEV;
    }
    result = cuda->cuDeviceGet(&cuda->device, ordinal);
    if (result != CU_SUCCESS) return refuse(cuda, "cuDeviceGet", result, err);
    result = cuda->cuDeviceGetName(cuda->name, sizeof cuda->name, cuda->device);
    if (result != CU_SUCCESS) return refuse(cuda, "cuDeviceGetName", result, err);
    result = cuda->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device);
    if (result == CU_SUCCESS) return 0;
    cuda->context = NULL;
    return refuse(cuda, "cuDevicePrimaryCtxRetain", result, err);
}

int kvo_cuda_pin(kvo_cuda *cuda, uint8_t *base, uint64_t bytes, uint64_t slot_bytes, char err[KVO_ERR_BYTES]) {
    /* Pieces end where both a slot and a page do: slots are multiples of 4096, pages may be larger. */
    uint64_t whole = slot_bytes * (uint64_t)(sysconf(_SC_PAGESIZE) / 4096), count = KVO_PIN_PIECE_BYTES / whole;
    cuda->piece_bytes = (count > 0 ? count : 1) * whole;
    cuda->pinned = base;
    while (cuda->pinned_bytes < bytes) {
        uint64_t left = bytes - cuda->pinned_bytes, piece = left < cuda->piece_bytes ? left : cuda->piece_bytes;
        cu_result result = cuda->cuMemHostRegister(base + cuda->pinned_bytes, piece, CU_HOST_REGISTER_PORTABLE);
        if (result != CU_SUCCESS) {
            snprintf(err, KVO_ERR_BYTES,
                     "the arena of %llu MiB cannot be pinned for CUDA device %d: cuMemHostRegister: %s after %llu MiB; a "
                     "smaller one may fit",
                     (unsigned long long)(bytes >> 20), cuda->ordinal, kvo_cuda_error(cuda, result),
                     (unsigned long long)(cuda->pinned_bytes >> 20));
            return -ENOMEM;
        }
        cuda->pinned_bytes += piece;
    }
    return 0;
}

uint64_t kvo_cuda_pieces(const kvo_cuda *cuda) {
    return (cuda->pinned_bytes + cuda->piece_bytes - 1) / cuda->piece_bytes;
}

bool kvo_cuda_close(kvo_cuda *cuda) {
    if (cuda->context == NULL) return true;
    bool unpinned = cuda->pinned_bytes == 0;
    if (!unpinned && cuda->cuCtxPushCurrent(cuda->context) == CU_SUCCESS) {
        unpinned = true;
        for (uint64_t at = 0; at < cuda->pinned_bytes; at += cuda->piece_bytes)
            if (cuda->cuMemHostUnregister(cuda->pinned + at) != CU_SUCCESS) unpinned = false;
        cu_context popped;
        cuda->cuCtxPopCurrent(&popped);
    }
    cuda->cuDevicePrimaryCtxRelease(cuda->device);
    return unpinned;
}
