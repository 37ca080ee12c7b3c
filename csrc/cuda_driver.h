/* cuda_driver.h - the part of CUDA's driver interface that the engine uses, a device and memory pinned for it.
 *
 * libcuda is opened when a device is asked for, and its interface declared here, so that one build serves machines
 * with and without CUDA and needs no toolkit. The declarations hold for every driver from CUDA 11 on; a function's
 * suffix _v2 is part of its interface. */
#ifndef KVO_CUDA_DRIVER_H
#define KVO_CUDA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvo.h"

typedef int cu_result; /* CUresult */
enum { CU_SUCCESS = 0, CU_INVALID_VALUE = 1, CU_NO_DEVICE = 100, CU_NOT_SUPPORTED = 801 };

typedef int cu_device;
typedef struct cu_context_object *cu_context;
typedef struct cu_stream_object *cu_stream; /* NULL is the legacy default stream */
typedef struct cu_event_object *cu_event;
typedef unsigned long long cu_pointer; /* CUdeviceptr */

#define CU_STREAM_NON_BLOCKING 1u
#define CU_EVENT_BLOCKING_SYNC 1u
#define CU_EVENT_DISABLE_TIMING 2u
#define CU_HOST_REGISTER_PORTABLE 1u
#define CU_SOURCE_ACCESS_STREAM 1
#define CU_CAPTURE_STATUS_NONE 0
#define CU_CAPTURE_MODE_RELAXED 2

/* CUmemcpyAttributes. The locations concern managed memory only. */
typedef struct {
    int source_access;
    struct {
        int type, id;
    } source, target;
    unsigned flags;
} cu_copy_attributes;

/* Every driver has these: name, suffix of the symbol, arguments. */
#define KVO_CUDA_CALLS(CALL)                                                                         \
    CALL(cuInit, "", (unsigned flags))                                                               \
    CALL(cuDriverGetVersion, "", (int *version))                                                     \
    CALL(cuGetErrorName, "", (cu_result result, const char **name))                                  \
    CALL(cuDeviceGetCount, "", (int *count))                                                         \
    CALL(cuDeviceGet, "", (cu_device * device, int ordinal))                                         \
    CALL(cuDeviceGetName, "", (char *name, int bytes, cu_device device))                             \
    CALL(cuDevicePrimaryCtxRetain, "", (cu_context * context, cu_device device))                     \
    CALL(cuDevicePrimaryCtxRelease, "_v2", (cu_device device))                                       \
    CALL(cuCtxPushCurrent, "_v2", (cu_context context))                                              \
    CALL(cuCtxPopCurrent, "_v2", (cu_context * context))                                             \
    CALL(cuMemHostRegister, "_v2", (void *at, size_t bytes, unsigned flags))                         \
    CALL(cuMemHostUnregister, "", (void *at))                                                        \
    CALL(cuStreamCreate, "", (cu_stream * stream, unsigned flags))                                   \
    CALL(cuStreamDestroy, "_v2", (cu_stream stream))                                                 \
    CALL(cuStreamWaitEvent, "", (cu_stream stream, cu_event event, unsigned flags))                  \
    CALL(cuStreamSynchronize, "", (cu_stream stream))                                                \
    CALL(cuStreamIsCapturing, "", (cu_stream stream, int *status))                                   \
    CALL(cuThreadExchangeStreamCaptureMode, "", (int *mode))                                         \
    CALL(cuEventCreate, "", (cu_event * event, unsigned flags))                                      \
    CALL(cuEventDestroy, "_v2", (cu_event event))                                                    \
    CALL(cuEventRecord, "", (cu_event event, cu_stream stream))                                      \
    CALL(cuEventSynchronize, "", (cu_event event))                                                   \
    CALL(cuMemcpyHtoDAsync, "_v2", (cu_pointer to, const void *from, size_t bytes, cu_stream stream)) \
    CALL(cuMemcpyDtoHAsync, "_v2", (void *to, cu_pointer from, size_t bytes, cu_stream stream))

/* Of cuMemcpyBatchAsync there are two: the one of CUDA 13.0 lost the argument `failed`. */
typedef cu_result cu_batch_13000(cu_pointer *to, cu_pointer *from, size_t *bytes, size_t count,
                                 cu_copy_attributes *attributes, size_t *first, size_t attribute_count,
                                 cu_stream stream);
typedef cu_result cu_batch_12080(cu_pointer *to, cu_pointer *from, size_t *bytes, size_t count,
                                 cu_copy_attributes *attributes, size_t *first, size_t attribute_count, size_t *failed,
                                 cu_stream stream);

/* One registration of memory is of at most this size: drivers refuse 512 GiB and more. */
#ifndef KVO_PIN_PIECE_BYTES
#define KVO_PIN_PIECE_BYTES (64ull << 30)
#endif

typedef struct {
#define MEMBER(name, suffix, arguments) cu_result(*name) arguments;
    KVO_CUDA_CALLS(MEMBER)
#undef MEMBER
    cu_batch_13000 *batch_13000; /* at most one of the two; NULL if the driver lacks it */
    cu_batch_12080 *batch_12080;
    int version; /* 13000 is CUDA 13.0 */
    int ordinal;
    cu_device device;
    cu_context context; /* the device's primary one, which torch uses too */
    char name[128];
    uint8_t *pinned;
    uint64_t pinned_bytes, piece_bytes; /* piece_bytes: of all pieces but the last */
} kvo_cuda;

/* Opens the driver and a device. 0 or -errno with a sentence in err; what was opened is to be closed either way. */
int kvo_cuda_open(kvo_cuda *cuda, int ordinal, char err[KVO_ERR_BYTES]);
/* Pins memory in pieces that end where slots do, because no copy may cross two of them. As kvo_cuda_open; once. The
 * device's context is current. */
int kvo_cuda_pin(kvo_cuda *cuda, uint8_t *base, uint64_t bytes, uint64_t slot_bytes, char err[KVO_ERR_BYTES]);
uint64_t kvo_cuda_pieces(const kvo_cuda *cuda);
/* Unpins and lets the device go. False: some of the memory is pinned still and must stay mapped, because the driver would
 * take whatever is mapped there next for the pages of before. */
bool kvo_cuda_close(kvo_cuda *cuda);

const char *kvo_cuda_error(const kvo_cuda *cuda, cu_result result);

#endif
