/* copy_cuda.c - copies between pinned memory and a KV cache on a CUDA device.
 *
 * For each direction two threads have a stream each. A thread takes what is waiting, as one batch, puts it into its
 * stream, and sleeps until the device is done with it. So there are two batches of a direction in the device at most:
 * the second keeps it busy while the first is taken in, and what comes late does not wait behind more. The longer a
 * batch takes, the larger the next one is, which spreads the cost of a launch over many small blocks.
 *
 * All blocking calls of the driver are made by these threads, so that a device that hangs holds up nobody else. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "copy.h"
#include "cuda_driver.h"

#define LANES 2u                   /* threads, streams and batches in flight of a direction */
#define BATCH_JOBS 128u            /* 64 KiB each: 8 MiB, which take ten times as long as a launch */
#define BATCH_BYTES (16ull << 20)  /* 0.3 ms of PCIe 5: what a late load waits for */
#define DEPTH (3u * BATCH_JOBS)    /* a batch waits while LANES are in flight */
#define BATCH_SPANS 1024u          /* in one call of cuMemcpyBatchAsync, which crashed with tens of thousands */
#define FENCES 64u                 /* an older one is as good as the one that took its event, only later */
#define FENCE_FAILED UINT64_MAX

enum { BATCH_UNTRIED, BATCH_WORKS, BATCH_NEVER };

struct cuda_copier;

typedef struct {
    struct cuda_copier *copier;
    bool out;
    pthread_t thread;
    bool runs;
    cu_stream stream;
    cu_event done;
    uint64_t waited; /* the stream is behind this fence */
    kvo_copy_queue batch;
    uint32_t spans;
    cu_pointer to[BATCH_SPANS], from[BATCH_SPANS];
    size_t bytes[BATCH_SPANS];
} cuda_lane;

typedef struct cuda_copier {
    kvo_copier face;
    kvo_cuda cuda;
    int kick_fd;

    pthread_mutex_t lock; /* for what is in this paragraph */
    pthread_cond_t work[2];
    pthread_cond_t settled; /* a lane began or ended */
    kvo_copy_queue todo[2], done;
    uint32_t idle; /* lanes that wait for work */
    bool stop, unsettled;
    const char *failed_call; /* the first that failed */
    cu_result failed_result;

    atomic_bool lost; /* no call of the driver is worth trying any more */
    atomic_int batch; /* whether cuMemcpyBatchAsync works */
    cuda_lane lanes[2 * LANES];

    /* The caller's. */
    uint64_t fence;
    cu_event mark;        /* behind the work in the caller's stream */
    cu_stream order;      /* collects the marks, so that a fence is behind all earlier ones, of whatever stream */
    cu_event fences[FENCES];
} cuda_copier;

/* Passes a result on, and notes the first failure for describe. */
static cu_result noted(cuda_copier *copier, const char *call, cu_result result) {
    if (result == CU_SUCCESS) return result;
    pthread_mutex_lock(&copier->lock);
    if (copier->failed_call == NULL) {
        copier->failed_call = call;
        copier->failed_result = result;
    }
    pthread_mutex_unlock(&copier->lock);
    return result;
}

#define CALL(copier, name, ...) noted(copier, #name, (copier)->cuda.name(__VA_ARGS__))

/* ---- a lane: putting a batch into its stream ---- */

static cu_result copy_in_one_call(cuda_lane *lane) {
    const kvo_cuda *cuda = &lane->copier->cuda;
    cu_copy_attributes attributes = {.source_access = CU_SOURCE_ACCESS_STREAM};
    size_t first = 0, failed;
    if (cuda->batch_13000 != NULL)
        return cuda->batch_13000(lane->to, lane->from, lane->bytes, lane->spans, &attributes, &first, 1, lane->stream);
    return cuda->batch_12080(lane->to, lane->from, lane->bytes, lane->spans, &attributes, &first, 1, &failed,
                             lane->stream);
}

static cu_result copy_singly(cuda_lane *lane) {
    cuda_copier *copier = lane->copier;
    cu_result result = CU_SUCCESS;
    for (uint32_t i = 0; i < lane->spans && result == CU_SUCCESS; i++) {
        void *host = (void *)(uintptr_t)(lane->out ? lane->to[i] : lane->from[i]);
        if (lane->out) result = CALL(copier, cuMemcpyDtoHAsync, host, lane->from[i], lane->bytes[i], lane->stream);
        else result = CALL(copier, cuMemcpyHtoDAsync, lane->to[i], host, lane->bytes[i], lane->stream);
    }
    return result;
}

static cu_result copy_spans(cuda_lane *lane) {
    cuda_copier *copier = lane->copier;
    if (lane->spans == 0) return CU_SUCCESS;
    bool never = atomic_load(&copier->batch) == BATCH_NEVER;
    cu_result result = never ? CU_NOT_SUPPORTED : copy_in_one_call(lane);
    if (result == CU_SUCCESS) {
        atomic_store(&copier->batch, BATCH_WORKS);
    } else if (result == CU_NOT_SUPPORTED || result == CU_INVALID_VALUE) {
        /* The driver has the function, but not for this device, or not for memory like this. */
        if (atomic_load(&copier->batch) == BATCH_UNTRIED) atomic_store(&copier->batch, BATCH_NEVER);
        result = copy_singly(lane);
    } else {
        noted(copier, "cuMemcpyBatchAsync", result);
    }
    lane->spans = 0;
    return result;
}

static cu_result add_job(cuda_lane *lane, const kvo_copy_job *job) {
    cu_result result = CU_SUCCESS;
    cu_pointer payload = (uintptr_t)job->payload;
    for (uint32_t i = 0; i < job->region_count && result == CU_SUCCESS; i++) {
        const kvo_region *region = &job->regions[i];
        cu_pointer kv = region->base + job->kv_block * region->stride;
        lane->to[lane->spans] = job->out ? payload : kv;
        lane->from[lane->spans] = job->out ? kv : payload;
        lane->bytes[lane->spans++] = region->bytes;
        payload += region->bytes;
        if (lane->spans == BATCH_SPANS) result = copy_spans(lane);
    }
    return result;
}

static cu_result launch(cuda_lane *lane) {
    cuda_copier *copier = lane->copier;
    uint64_t fence = 0;
    for (const kvo_copy_job *job = lane->batch.first; job != NULL; job = job->next)
        if (job->fence > fence) fence = job->fence;
    cu_result result = CU_SUCCESS;
    if (fence > lane->waited) result = CALL(copier, cuStreamWaitEvent, lane->stream, copier->fences[fence % FENCES], 0);
    if (result == CU_SUCCESS && fence > lane->waited) lane->waited = fence;
    lane->spans = 0;
    for (const kvo_copy_job *job = lane->batch.first; job != NULL && result == CU_SUCCESS; job = job->next)
        result = add_job(lane, job);
    if (result == CU_SUCCESS) result = copy_spans(lane);
    if (result == CU_SUCCESS) result = CALL(copier, cuEventRecord, lane->done, lane->stream);
    return result;
}

/* Copies the lane's batch. 0, or -EREMOTEIO. Then some of it may have begun, and this waits for its end; where that cannot be
 * had either, nobody knows what the device still does: it is lost, and what it may use is not settled. */
static int32_t copy_batch(cuda_lane *lane, bool *unsettled) {
    cuda_copier *copier = lane->copier;
    if (atomic_load(&copier->lost)) return -EREMOTEIO;
    cu_result result = launch(lane);
    if (result == CU_SUCCESS) result = CALL(copier, cuEventSynchronize, lane->done);
    if (result == CU_SUCCESS) return 0;
    *unsettled = CALL(copier, cuStreamSynchronize, lane->stream) != CU_SUCCESS;
    if (*unsettled) atomic_store(&copier->lost, true);
    return -EREMOTEIO;
}

/* ---- a lane: its thread ---- */

/* Takes the jobs at the front, at least one. The lock is held. */
static void take_batch(cuda_lane *lane) {
    kvo_copy_queue *todo = &lane->copier->todo[lane->out];
    uint64_t bytes = 0;
    for (uint32_t jobs = 0; todo->first != NULL && jobs < BATCH_JOBS; jobs++) {
        for (uint32_t i = 0; i < todo->first->region_count; i++) bytes += todo->first->regions[i].bytes;
        if (jobs > 0 && bytes > BATCH_BYTES) return;
        kvo_copy_queue_add(&lane->batch, kvo_copy_queue_take(todo));
    }
}

/* The lock is held. */
static void hand_back(cuda_lane *lane, int32_t result, bool unsettled) {
    cuda_copier *copier = lane->copier;
    for (kvo_copy_job *job; (job = kvo_copy_queue_take(&lane->batch)) != NULL;) {
        job->result = result;
        job->unsettled = unsettled;
        kvo_copy_queue_add(&copier->done, job);
    }
    if (unsettled) copier->unsettled = true;
    eventfd_write(copier->kick_fd, 1);
}

static void *work(void *argument) {
    cuda_lane *lane = argument;
    cuda_copier *copier = lane->copier;
    int mode = CU_CAPTURE_MODE_RELAXED; /* or this thread's calls spoil a graph that another one is capturing */
    bool current = CALL(copier, cuThreadExchangeStreamCaptureMode, &mode) == CU_SUCCESS &&
                   CALL(copier, cuCtxPushCurrent, copier->cuda.context) == CU_SUCCESS;
    if (!current) atomic_store(&copier->lost, true);
    pthread_mutex_lock(&copier->lock);
    copier->idle++;
    pthread_cond_signal(&copier->settled);
    while (!copier->stop) {
        if (copier->todo[lane->out].first == NULL) {
            pthread_cond_wait(&copier->work[lane->out], &copier->lock);
            continue;
        }
        take_batch(lane);
        copier->idle--;
        pthread_mutex_unlock(&copier->lock);
        bool unsettled = false;
        int32_t result = copy_batch(lane, &unsettled);
        pthread_mutex_lock(&copier->lock);
        copier->idle++;
        hand_back(lane, result, unsettled);
    }
    pthread_mutex_unlock(&copier->lock);
    cu_context popped;
    if (current) copier->cuda.cuCtxPopCurrent(&popped);
    return NULL;
}

/* ---- the face ---- */

/* A mark in a stream that is being captured would become a part of the graph, and the copies behind it as well. */
static bool is_capturing(cuda_copier *copier, cu_stream stream) {
    int status = CU_CAPTURE_STATUS_NONE;
    return CALL(copier, cuStreamIsCapturing, stream, &status) != CU_SUCCESS || status != CU_CAPTURE_STATUS_NONE;
}

static uint64_t cuda_fence(kvo_copier *self, uint64_t handle) {
    cuda_copier *copier = (cuda_copier *)self;
    cu_stream stream = (cu_stream)(uintptr_t)handle;
    if (atomic_load(&copier->lost)) return FENCE_FAILED;
    if (CALL(copier, cuCtxPushCurrent, copier->cuda.context) != CU_SUCCESS) return FENCE_FAILED;
    uint64_t fence = copier->fence + 1;
    bool made = !is_capturing(copier, stream) && CALL(copier, cuEventRecord, copier->mark, stream) == CU_SUCCESS &&
                CALL(copier, cuStreamWaitEvent, copier->order, copier->mark, 0) == CU_SUCCESS &&
                CALL(copier, cuEventRecord, copier->fences[fence % FENCES], copier->order) == CU_SUCCESS;
    if (made) copier->fence = fence;
    cu_context popped;
    CALL(copier, cuCtxPopCurrent, &popped);
    return made ? fence : FENCE_FAILED;
}

static void cuda_start(kvo_copier *self, kvo_copy_job *job) {
    cuda_copier *copier = (cuda_copier *)self;
    pthread_mutex_lock(&copier->lock);
    if (job->fence == FENCE_FAILED) {
        job->result = -EREMOTEIO;
        kvo_copy_queue_add(&copier->done, job);
        eventfd_write(copier->kick_fd, 1);
    } else {
        kvo_copy_queue_add(&copier->todo[job->out], job);
        pthread_cond_signal(&copier->work[job->out]);
    }
    pthread_mutex_unlock(&copier->lock);
}

static bool cuda_withdraw(kvo_copier *self, kvo_copy_job *job) {
    cuda_copier *copier = (cuda_copier *)self;
    pthread_mutex_lock(&copier->lock);
    bool withdrawn = kvo_copy_queue_remove(&copier->todo[job->out], job);
    pthread_mutex_unlock(&copier->lock);
    return withdrawn;
}

static kvo_copy_job *cuda_reap(kvo_copier *self) {
    cuda_copier *copier = (cuda_copier *)self;
    pthread_mutex_lock(&copier->lock);
    kvo_copy_job *job = kvo_copy_queue_take(&copier->done);
    pthread_mutex_unlock(&copier->lock);
    return job;
}

static void cuda_describe(kvo_copier *self, char *out, size_t bytes) {
    cuda_copier *copier = (cuda_copier *)self;
    const kvo_cuda *cuda = &copier->cuda;
    bool has_batch = cuda->batch_13000 != NULL || cuda->batch_12080 != NULL, lost = atomic_load(&copier->lost);
    bool refused = has_batch && atomic_load(&copier->batch) == BATCH_NEVER;
    pthread_mutex_lock(&copier->lock);
    const char *call = copier->failed_call;
    cu_result result = copier->failed_result;
    pthread_mutex_unlock(&copier->lock);
    snprintf(out, bytes, "CUDA device %d (%s), driver %d.%d, %s, pinned pieces: %llu%s%s%s%s%s", cuda->ordinal,
             cuda->name, cuda->version / 1000, cuda->version % 1000 / 10,
             refused     ? "a call for each span (cuMemcpyBatchAsync refused)"
             : has_batch ? "cuMemcpyBatchAsync"
                         : "a call for each span (no cuMemcpyBatchAsync)",
             (unsigned long long)kvo_cuda_pieces(cuda), lost ? ", LOST" : "", call != NULL ? ", first failure: " : "",
             call != NULL ? call : "", call != NULL ? " " : "", call != NULL ? kvo_cuda_error(cuda, result) : "");
}

/* Asks the lanes to end. False if one does not within the driver: then it goes on alone. */
static bool end_lanes(cuda_copier *copier) {
    uint32_t running = 0;
    for (uint32_t i = 0; i < 2 * LANES; i++) running += copier->lanes[i].runs;
    pthread_mutex_lock(&copier->lock);
    bool ends = copier->idle == running;
    copier->stop = true;
    for (uint32_t out = 0; out < 2; out++) pthread_cond_broadcast(&copier->work[out]);
    pthread_mutex_unlock(&copier->lock);
    for (uint32_t i = 0; i < 2 * LANES; i++) {
        if (!copier->lanes[i].runs) continue;
        if (ends) pthread_join(copier->lanes[i].thread, NULL);
        else pthread_detach(copier->lanes[i].thread);
    }
    return ends;
}

static bool cuda_close(kvo_copier *self) {
    cuda_copier *copier = (cuda_copier *)self;
    if (!end_lanes(copier) || copier->unsettled) return false;
    kvo_cuda *cuda = &copier->cuda;
    cu_context popped;
    if (cuda->context != NULL && cuda->cuCtxPushCurrent(cuda->context) == CU_SUCCESS) {
        for (uint32_t i = 0; i < 2 * LANES; i++) {
            if (copier->lanes[i].done != NULL) cuda->cuEventDestroy(copier->lanes[i].done);
            if (copier->lanes[i].stream != NULL) cuda->cuStreamDestroy(copier->lanes[i].stream);
        }
        if (copier->mark != NULL) cuda->cuEventDestroy(copier->mark);
        for (uint32_t i = 0; i < FENCES; i++)
            if (copier->fences[i] != NULL) cuda->cuEventDestroy(copier->fences[i]);
        if (copier->order != NULL) cuda->cuStreamDestroy(copier->order);
        cuda->cuCtxPopCurrent(&popped);
    }
    if (!kvo_cuda_close(cuda)) return false;
    for (uint32_t out = 0; out < 2; out++) pthread_cond_destroy(&copier->work[out]);
    pthread_cond_destroy(&copier->settled);
    pthread_mutex_destroy(&copier->lock);
    free(copier);
    return true;
}

static bool open_streams(cuda_copier *copier) {
    unsigned event = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;
    for (uint32_t i = 0; i < 2 * LANES; i++) {
        if (CALL(copier, cuStreamCreate, &copier->lanes[i].stream, CU_STREAM_NON_BLOCKING) != CU_SUCCESS) return false;
        if (CALL(copier, cuEventCreate, &copier->lanes[i].done, event) != CU_SUCCESS) return false;
    }
    for (uint32_t i = 0; i < FENCES; i++)
        if (CALL(copier, cuEventCreate, &copier->fences[i], CU_EVENT_DISABLE_TIMING) != CU_SUCCESS) return false;
    return CALL(copier, cuEventCreate, &copier->mark, CU_EVENT_DISABLE_TIMING) == CU_SUCCESS &&
           CALL(copier, cuStreamCreate, &copier->order, CU_STREAM_NON_BLOCKING) == CU_SUCCESS;
}

/* Returns when all of them are ready to take work, or one is not. */
static bool start_lanes(cuda_copier *copier) {
    uint32_t running = 0;
    for (uint32_t i = 0; i < 2 * LANES; i++) {
        cuda_lane *lane = &copier->lanes[i];
        lane->copier = copier;
        lane->out = i < LANES;
        lane->runs = pthread_create(&lane->thread, NULL, work, lane) == 0;
        running += lane->runs;
    }
    pthread_mutex_lock(&copier->lock);
    while (copier->idle < running) pthread_cond_wait(&copier->settled, &copier->lock);
    pthread_mutex_unlock(&copier->lock);
    return running == 2 * LANES && !atomic_load(&copier->lost);
}

static int open_parts(cuda_copier *copier, const kvo_copy_memory *memory, char err[KVO_ERR_BYTES]) {
    kvo_cuda *cuda = &copier->cuda;
    bool has_batch = cuda->batch_13000 != NULL || cuda->batch_12080 != NULL;
    atomic_store(&copier->batch, has_batch ? BATCH_UNTRIED : BATCH_NEVER);
    cu_context popped;
    int status = 0;
    bool opened = CALL(copier, cuCtxPushCurrent, cuda->context) == CU_SUCCESS;
    if (opened) {
        status = kvo_cuda_pin(cuda, memory->base, memory->bytes, memory->slot_bytes, err);
        opened = status == 0 && open_streams(copier);
        CALL(copier, cuCtxPopCurrent, &popped);
    }
    if (status != 0 || (opened && start_lanes(copier))) return status;
    if (copier->failed_call == NULL) snprintf(err, KVO_ERR_BYTES, "the copy threads could not be started");
    else
        snprintf(err, KVO_ERR_BYTES, "CUDA device %d cannot be used: %s: %s", cuda->ordinal, copier->failed_call,
                 kvo_cuda_error(cuda, copier->failed_result));
    return copier->failed_call == NULL ? -EAGAIN : -ENODEV;
}

int kvo_copy_cuda_open(kvo_copier **opened, int ordinal, const kvo_copy_memory *memory, int kick_fd,
                       char err[KVO_ERR_BYTES]) {
    cuda_copier *copier = calloc(1, sizeof *copier);
    if (copier == NULL) {
        snprintf(err, KVO_ERR_BYTES, "no memory for the copies");
        return -ENOMEM;
    }
    copier->face = (kvo_copier){.depth = DEPTH,
                                .fence = cuda_fence,
                                .start = cuda_start,
                                .withdraw = cuda_withdraw,
                                .reap = cuda_reap,
                                .describe = cuda_describe,
                                .close = cuda_close};
    copier->kick_fd = kick_fd;
    pthread_mutex_init(&copier->lock, NULL);
    pthread_cond_init(&copier->settled, NULL);
    for (uint32_t out = 0; out < 2; out++) pthread_cond_init(&copier->work[out], NULL);
    *opened = &copier->face;
    int status = kvo_cuda_open(&copier->cuda, ordinal, err);
    return status == 0 ? open_parts(copier, memory, err) : status;
}
