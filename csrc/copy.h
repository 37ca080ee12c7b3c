/* copy.h - the seam between KV cache and arena. Two backends: copy_host.c and copy_cuda.c.
 *
 * The pump thread starts jobs, withdraws and reaps them; a backend writes to the pump's eventfd when there is something
 * to reap. A job is the caller's memory and stays put until it is reaped or withdrawn. */
#ifndef KVO_COPY_H
#define KVO_COPY_H

#include <stdbool.h>

#include "kvo.h"

typedef struct kvo_copy_job {
    const kvo_region *regions;
    uint32_t region_count;
    uint32_t kv_block;
    bool out;         /* KV cache -> payload, else payload -> KV cache */
    uint8_t *payload; /* the regions' bytes of the block, one after the other */
    uint64_t fence;   /* the copy starts after the work before this fence */
    int32_t result;   /* when reaped: 0 or -errno */
    bool unsettled;   /* when reaped: failed, and the device may use the payload at any later time */
    void *owner;
    struct kvo_copy_job *next; /* the backend's */
} kvo_copy_job;

typedef struct kvo_copier {
    uint32_t depth; /* jobs of each direction started and not yet reaped, at most */
    /* A fence behind the work now in a stream of the caller's. The one function that callers' threads call, one at a
     * time. Never fails: jobs with a fence that could not be made fail instead. */
    uint64_t (*fence)(struct kvo_copier *self, uint64_t stream);
    void (*start)(struct kvo_copier *self, kvo_copy_job *job);
    /* Takes a job back that nothing works on yet, as if it was never started. False: it will be reaped. */
    bool (*withdraw)(struct kvo_copier *self, kvo_copy_job *job);
    /* A finished job, or NULL. */
    kvo_copy_job *(*reap)(struct kvo_copier *self);
    /* One line for kvo_describe, without its end. */
    void (*describe)(struct kvo_copier *self, char *out, size_t bytes);
    /* False: a device still uses the copier and the payloads, or may; both stay for the life of the process, and kick_fd. */
    bool (*close)(struct kvo_copier *self);
} kvo_copier;

/* What payloads lie in. */
typedef struct {
    uint8_t *base;
    uint64_t bytes, slot_bytes; /* a payload crosses no multiple of slot_bytes */
} kvo_copy_memory;

/* The KV cache is in host memory. NULL if there is no memory or thread for it. */
kvo_copier *kvo_copy_host_open(int kick_fd);
/* The KV cache is in a CUDA device's memory. 0 or -errno with a sentence in err; *copier, if not NULL then, is to be closed
 * either way. */
int kvo_copy_cuda_open(kvo_copier **copier, int ordinal, const kvo_copy_memory *memory, int kick_fd,
                       char err[KVO_ERR_BYTES]);

/* Jobs in the order of their coming, for the backends. */
typedef struct {
    kvo_copy_job *first, *last;
} kvo_copy_queue;

static inline void kvo_copy_queue_add(kvo_copy_queue *queue, kvo_copy_job *job) {
    job->next = NULL;
    *(queue->last != NULL ? &queue->last->next : &queue->first) = job;
    queue->last = job;
}

static inline kvo_copy_job *kvo_copy_queue_take(kvo_copy_queue *queue) {
    kvo_copy_job *job = queue->first;
    if (job == NULL) return NULL;
    queue->first = job->next;
    if (queue->first == NULL) queue->last = NULL;
    return job;
}

/* Whether the job was in the queue; it is not any more. */
static inline bool kvo_copy_queue_remove(kvo_copy_queue *queue, kvo_copy_job *job) {
    kvo_copy_job *before = NULL;
    for (kvo_copy_job *at = queue->first; at != job; at = at->next) {
        if (at == NULL) return false;
        before = at;
    }
    *(before != NULL ? &before->next : &queue->first) = job->next;
    if (queue->last == job) queue->last = before;
    return true;
}

#endif
