/* fake_cuda.c - a libcuda.so.1 for tests. Device memory is host memory that the test announces. A thread for each stream
 * does what was put into it, late by a random while, in order within the stream and in any order between streams. It is
 * strict where a device would be: memory must be pinned, a copy stay within one registration, a context be current.
 * The test steers it through the variables and functions that begin with fake_. Built for one driver version. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 13000
#endif

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { INVALID_HANDLE = 400, REGISTERED = 712, NOT_REGISTERED = 713, LAUNCH_FAILED = 719 };
enum { CALLS_MAX = 64, RANGES_MAX = 512, STREAMS_MAX = 64 };

volatile int fake_devices = 1;
volatile int fake_delay_us;            /* a copy takes up to this long */
volatile unsigned fake_seed;           /* of the delays */
volatile int fake_hold;                /* while set, the device does nothing */
volatile int fake_captures;            /* streams are being captured */
volatile int fake_violations;          /* what a device would not forgive */
volatile uint64_t fake_register_limit; /* bytes of one registration, 0 for no limit */
volatile int fake_streams, fake_events, fake_registrations, fake_contexts; /* alive, of the engine's */

/* One recording of an event; an event may be recorded again, on another stream, while some wait for an earlier one. */
typedef struct {
    bool done;
} recording;

typedef struct {
    recording *latest;
} event;

typedef struct task {
    enum { COPY, WAIT, RECORD } kind;
    char *to;
    const char *from;
    size_t bytes;
    const char *host; /* must be pinned while the copy runs; NULL for the test's own kernels */
    unsigned delay_us;
    void *owned;
    recording *of;
    struct task *next;
} task;

typedef struct {
    task *first, *last;
    bool busy, ends, mine;
    unsigned random;
} stream;

typedef struct {
    const char *base;
    size_t bytes;
} range;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct {
    const char *name;
    int count, fail_at, code;
    bool forever;
} calls[CALLS_MAX];
static range pinned[RANGES_MAX], device[RANGES_MAX];
static stream *streams[STREAMS_MAX], *legacy;
static bool lost;
static __thread int depth;    /* contexts this thread has pushed */
static __thread bool relaxed; /* its calls spoil no capture */

static void wait_a_while(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&changed, &lock, &until);
}

static bool is_within(const range *ranges, const char *at, size_t bytes) {
    for (int i = 0; i < RANGES_MAX; i++)
        if (ranges[i].base != NULL && at >= ranges[i].base && at + bytes <= ranges[i].base + ranges[i].bytes) return true;
    return false;
}

/* ---- the device ---- */

static void run(stream *self, task *now) {
    if (now->kind == RECORD) {
        now->of->done = true; /* and never freed: whoever waits for it may look late */
    } else if (now->kind == WAIT) {
        while (!now->of->done && !lost) wait_a_while();
    } else {
        unsigned late = fake_delay_us > 0 ? (unsigned)rand_r(&self->random) % (unsigned)fake_delay_us : 0;
        pthread_mutex_unlock(&lock);
        if (now->delay_us + late > 0) usleep(now->delay_us + late);
        pthread_mutex_lock(&lock);
        if (lost) return;
        if (now->host != NULL && !is_within(pinned, now->host, now->bytes)) fake_violations++;
        else memcpy(now->to, now->from, now->bytes);
    }
}

static void *stream_thread(void *argument) {
    stream *self = argument;
    pthread_mutex_lock(&lock);
    while (self->first != NULL || !self->ends) {
        if (self->first == NULL || (fake_hold && !lost)) {
            wait_a_while();
            continue;
        }
        task *now = self->first;
        self->first = now->next;
        self->busy = true;
        if (!lost) run(self, now);
        self->busy = false;
        free(now->owned);
        free(now);
        pthread_cond_broadcast(&changed);
    }
    free(self);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void put(stream *into, task new) {
    task *made = malloc(sizeof *made);
    *made = new;
    made->next = NULL;
    if (into->first == NULL) into->first = made;
    else into->last->next = made;
    into->last = made;
    pthread_cond_broadcast(&changed);
}

static stream *make_stream(bool mine) {
    stream *made = calloc(1, sizeof *made);
    made->mine = mine;
    made->random = fake_seed++;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i] != NULL) continue;
        streams[i] = made;
        pthread_t thread;
        if (pthread_create(&thread, NULL, stream_thread, made) != 0) abort();
        pthread_detach(thread);
        return made;
    }
    abort();
}

/* NULL if there is no such stream. */
static stream *find_stream(stream *handle) {
    if (handle == NULL) {
        if (legacy == NULL) legacy = make_stream(true);
        return legacy;
    }
    for (int i = 0; i < STREAMS_MAX; i++)
        if (streams[i] == handle) return handle;
    return NULL;
}

/* ---- for the test ---- */

static int index_of(const char *name) {
    for (int i = 0; i < CALLS_MAX; i++) {
        if (calls[i].name == NULL) calls[i].name = strdup(name);
        if (strcmp(calls[i].name, name) == 0) return i;
    }
    abort();
}

/* The nth call from now on fails with `code`, and those after it if `forever`. nth 0: none does. */
void fake_fail(const char *name, int nth, int forever, int code) {
    pthread_mutex_lock(&lock);
    int i = index_of(name);
    calls[i].fail_at = nth > 0 ? calls[i].count + nth : 0;
    calls[i].forever = forever;
    calls[i].code = code;
    pthread_mutex_unlock(&lock);
}

/* How often a function was called, or any if name is NULL. */
int fake_calls(const char *name) {
    int sum = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < CALLS_MAX && calls[i].name != NULL; i++)
        if (name == NULL || strcmp(calls[i].name, name) == 0) sum += calls[i].count;
    pthread_mutex_unlock(&lock);
    return sum;
}

/* What the device has not done yet, it will never do. */
void fake_lose(int is_lost) {
    pthread_mutex_lock(&lock);
    lost = is_lost;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* When the device is done with everything, forgets what an engine could not give back. */
void fake_forget(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < STREAMS_MAX; i++)
        while (streams[i] != NULL && (streams[i]->first != NULL || streams[i]->busy)) wait_a_while();
    for (int i = 0; i < CALLS_MAX; i++) calls[i].fail_at = 0;
    for (int i = 0; i < STREAMS_MAX; i++) {
        if (streams[i] == NULL || streams[i]->mine) continue;
        streams[i]->ends = true;
        streams[i] = NULL;
    }
    memset(pinned, 0, sizeof pinned);
    fake_streams = fake_events = fake_registrations = fake_contexts = depth = 0;
    pthread_mutex_unlock(&lock);
}

void fake_device_memory(const char *base, size_t bytes) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < RANGES_MAX; i++) {
        if (device[i].base != NULL) continue;
        device[i] = (range){base, bytes};
        break;
    }
    pthread_mutex_unlock(&lock);
}

void *fake_stream(void) {
    pthread_mutex_lock(&lock);
    stream *made = make_stream(true);
    pthread_mutex_unlock(&lock);
    return made;
}

/* A kernel that takes a while: it writes what `from` holds now, or what it holds then. */
void fake_kernel(void *on, char *to, const char *from, size_t bytes, unsigned delay_us, int now) {
    void *owned = now ? malloc(bytes) : NULL;
    if (now) memcpy(owned, from, bytes);
    pthread_mutex_lock(&lock);
    put(find_stream(on), (task){.kind = COPY, .to = to, .from = now ? owned : from, .bytes = bytes, .delay_us = delay_us,
                                .owned = owned});
    pthread_mutex_unlock(&lock);
}

int fake_depth(void) { return depth; }

/* ---- libcuda ---- */

/* Takes the lock, whatever comes. */
static int enter(const char *name, bool in_context) {
    pthread_mutex_lock(&lock);
    int i = index_of(name), count = ++calls[i].count;
    if (calls[i].fail_at > 0 && (count == calls[i].fail_at || (calls[i].forever && count > calls[i].fail_at)))
        return calls[i].code;
    if (fake_captures && !relaxed && strncmp(name, "cuMemcpy", 8) == 0) fake_violations++;
    if (!in_context) return OK;
    if (lost) return LAUNCH_FAILED;
    if (depth > 0) return OK;
    fake_violations++;
    return INVALID_CONTEXT;
}

static int leave(int result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#define ENTER(name, in_context)                 \
    int error = enter(name, in_context);        \
    if (error != OK) return leave(error)

int cuInit(unsigned flags) {
    (void)flags;
    ENTER("cuInit", false);
    return leave(fake_devices > 0 ? OK : NO_DEVICE);
}

int cuDriverGetVersion(int *version) {
    ENTER("cuDriverGetVersion", false);
    *version = FAKE_VERSION;
    return leave(OK);
}

int cuGetErrorName(int result, const char **name) {
    ENTER("cuGetErrorName", false);
    *name = result == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_LAUNCH_FAILED";
    return leave(result == OUT_OF_MEMORY || result == LAUNCH_FAILED ? OK : INVALID_VALUE);
}

int cuDeviceGetCount(int *count) {
    ENTER("cuDeviceGetCount", false);
    *count = fake_devices;
    return leave(OK);
}

int cuDeviceGet(int *found, int ordinal) {
    ENTER("cuDeviceGet", false);
    *found = ordinal;
    return leave(ordinal < fake_devices ? OK : INVALID_DEVICE);
}

int cuDeviceGetName(char *name, int bytes, int of) {
    (void)of;
    ENTER("cuDeviceGetName", false);
    strncpy(name, "Fake H0", (size_t)bytes);
    return leave(OK);
}

int cuDevicePrimaryCtxRetain(void **context, int of) {
    (void)of;
    ENTER("cuDevicePrimaryCtxRetain", false);
    *context = &lock;
    fake_contexts++;
    return leave(OK);
}

int cuDevicePrimaryCtxRelease_v2(int of) {
    (void)of;
    ENTER("cuDevicePrimaryCtxRelease_v2", false);
    fake_contexts--;
    return leave(OK);
}

int cuCtxPushCurrent_v2(void *context) {
    ENTER("cuCtxPushCurrent_v2", false);
    if (context != &lock) return leave(INVALID_CONTEXT);
    depth++;
    return leave(OK);
}

int cuCtxPopCurrent_v2(void **context) {
    ENTER("cuCtxPopCurrent_v2", true);
    *context = &lock;
    depth--;
    return leave(OK);
}

int cuMemHostRegister_v2(void *at, size_t bytes, unsigned flags) {
    ENTER("cuMemHostRegister_v2", true);
    if (flags != 1 || (uintptr_t)at % 4096 != 0 || bytes % 4096 != 0) fake_violations++;
    if (fake_register_limit > 0 && bytes > fake_register_limit) return leave(OUT_OF_MEMORY);
    const char *from = at;
    range *free_one = NULL;
    for (int i = 0; i < RANGES_MAX; i++) {
        if (pinned[i].base == NULL) free_one = &pinned[i];
        else if (from < pinned[i].base + pinned[i].bytes && from + bytes > pinned[i].base) return leave(REGISTERED);
    }
    if (free_one == NULL) return leave(OUT_OF_MEMORY);
    *free_one = (range){at, bytes};
    fake_registrations++;
    return leave(OK);
}

int cuMemHostUnregister(void *at) {
    ENTER("cuMemHostUnregister", true);
    for (int i = 0; i < RANGES_MAX; i++) {
        if (pinned[i].base != at) continue;
        pinned[i].base = NULL;
        fake_registrations--;
        return leave(OK);
    }
    fake_violations++;
    return leave(NOT_REGISTERED);
}

int cuStreamCreate(stream **made, unsigned flags) {
    ENTER("cuStreamCreate", true);
    if (flags != 1) fake_violations++;
    *made = make_stream(false);
    fake_streams++;
    return leave(OK);
}

int cuStreamDestroy_v2(stream *gone) {
    ENTER("cuStreamDestroy_v2", true);
    for (int i = 0; i < STREAMS_MAX; i++)
        if (streams[i] == gone) streams[i] = NULL;
    gone->ends = true; /* when it has done everything */
    fake_streams--;
    return leave(OK);
}

int cuStreamWaitEvent(stream *waiting, event *of, unsigned flags) {
    ENTER("cuStreamWaitEvent", true);
    waiting = find_stream(waiting);
    if (waiting == NULL || flags != 0) return leave(INVALID_HANDLE);
    if (of->latest != NULL) put(waiting, (task){.kind = WAIT, .of = of->latest});
    return leave(OK);
}

int cuStreamSynchronize(stream *awaited) {
    ENTER("cuStreamSynchronize", true);
    while ((awaited->first != NULL || awaited->busy) && !lost) wait_a_while();
    return leave(lost ? LAUNCH_FAILED : OK);
}

int cuStreamIsCapturing(stream *on, int *status) {
    ENTER("cuStreamIsCapturing", true);
    *status = fake_captures;
    return leave(find_stream(on) == NULL ? INVALID_HANDLE : OK);
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER("cuThreadExchangeStreamCaptureMode", false);
    relaxed = *mode == 2;
    *mode = 0;
    return leave(OK);
}

int cuEventCreate(event **made, unsigned flags) {
    ENTER("cuEventCreate", true);
    if ((flags & 2) == 0) fake_violations++;
    *made = calloc(1, sizeof **made);
    fake_events++;
    return leave(OK);
}

int cuEventDestroy_v2(event *gone) {
    ENTER("cuEventDestroy_v2", true);
    (void)gone; /* a stream may still need it */
    fake_events--;
    return leave(OK);
}

int cuEventRecord(event *recorded, stream *on) {
    ENTER("cuEventRecord", true);
    on = find_stream(on);
    if (on == NULL) return leave(INVALID_HANDLE);
    if (fake_captures && on->mine) fake_violations++;
    recorded->latest = calloc(1, sizeof *recorded->latest);
    put(on, (task){.kind = RECORD, .of = recorded->latest});
    return leave(OK);
}

int cuEventSynchronize(event *awaited) {
    ENTER("cuEventSynchronize", true);
    for (recording *of = awaited->latest; of != NULL && !of->done && !lost;) wait_a_while();
    return leave(lost ? LAUNCH_FAILED : OK);
}

/* The lock is held. */
static int copy(char *to, const char *from, size_t bytes, stream *on) {
    bool in = is_within(device, to, bytes);
    const char *host = in ? from : to;
    if (on == NULL || !is_within(device, in ? to : from, bytes) || !is_within(pinned, host, bytes)) {
        fake_violations++;
        return INVALID_VALUE;
    }
    put(on, (task){.kind = COPY, .to = to, .from = from, .bytes = bytes, .host = host});
    return OK;
}

int cuMemcpyHtoDAsync_v2(char *to, const char *from, size_t bytes, stream *on) {
    ENTER("cuMemcpyHtoDAsync_v2", true);
    return leave(copy(to, from, bytes, on));
}

int cuMemcpyDtoHAsync_v2(char *to, const char *from, size_t bytes, stream *on) {
    ENTER("cuMemcpyDtoHAsync_v2", true);
    return leave(copy(to, from, bytes, on));
}

#if FAKE_VERSION >= 12080
typedef struct {
    int access, source[2], target[2];
    unsigned flags;
} attributes;

/* Begins half of the copies where it is to fail. */
static int batch(const char *name, char **to, char **from, size_t *bytes, size_t count, attributes *attribute,
                 size_t *first, size_t attribute_count, stream *on) {
    int error = enter(name, true);
    if (attribute_count != 1 || first[0] != 0 || attribute->access != 1 || attribute->flags != 0) fake_violations++;
    size_t begin = error != OK ? (lost ? 0 : count / 2) : count;
    for (size_t i = 0; i < begin; i++) {
        int failed = copy(to[i], from[i], bytes[i], on);
        if (failed != OK) return leave(failed);
    }
    return leave(error);
}

int cuMemcpyBatchAsync(char **to, char **from, size_t *bytes, size_t count, attributes *attribute, size_t *first,
                       size_t attribute_count, size_t *failed, stream *on) {
    *failed = SIZE_MAX;
    return batch("cuMemcpyBatchAsync", to, from, bytes, count, attribute, first, attribute_count, on);
}
#endif

#if FAKE_VERSION >= 13000
int cuMemcpyBatchAsync_v2(char **to, char **from, size_t *bytes, size_t count, attributes *attribute, size_t *first,
                          size_t attribute_count, stream *on) {
    return batch("cuMemcpyBatchAsync_v2", to, from, bytes, count, attribute, first, attribute_count, on);
}
#endif
