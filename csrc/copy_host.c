/* copy_host.c - copies by one thread, for a KV cache in host memory. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "copy.h"

#define DEPTH 4u /* few, so that a load never waits behind many stores */

typedef struct {
    kvo_copier face;
    int kick_fd;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    kvo_copy_queue todo, done;
    bool stop;
} host_copier;

static void run(const kvo_copy_job *job) {
    uint8_t *payload = job->payload;
    for (uint32_t i = 0; i < job->region_count; i++) {
        const kvo_region *region = &job->regions[i];
        uint8_t *kv = (uint8_t *)(uintptr_t)(region->base + job->kv_block * region->stride);
        if (job->out) memcpy(payload, kv, region->bytes);
        else memcpy(kv, payload, region->bytes);
        payload += region->bytes;
    }
}

static void *work(void *argument) {
    host_copier *copier = argument;
    pthread_mutex_lock(&copier->lock);
    while (copier->todo.first != NULL || !copier->stop) {
        kvo_copy_job *job = kvo_copy_queue_take(&copier->todo);
        if (job == NULL) {
            pthread_cond_wait(&copier->work, &copier->lock);
            continue;
        }
        pthread_mutex_unlock(&copier->lock);
        run(job);
        job->result = 0;
        pthread_mutex_lock(&copier->lock);
        kvo_copy_queue_add(&copier->done, job);
        /* Without the lock: who wakes another is often made to wait itself, and the pump would wait for the lock then. */
        pthread_mutex_unlock(&copier->lock);
        eventfd_write(copier->kick_fd, 1);
        pthread_mutex_lock(&copier->lock);
    }
    pthread_mutex_unlock(&copier->lock);
    return NULL;
}

/* A KV cache in host memory is written when the caller says so. */
static uint64_t host_fence(kvo_copier *self, uint64_t stream) {
    (void)self, (void)stream;
    return 0;
}

static void host_start(kvo_copier *self, kvo_copy_job *job) {
    host_copier *copier = (host_copier *)self;
    pthread_mutex_lock(&copier->lock);
    kvo_copy_queue_add(&copier->todo, job);
    pthread_cond_signal(&copier->work);
    pthread_mutex_unlock(&copier->lock);
}

static bool host_withdraw(kvo_copier *self, kvo_copy_job *job) {
    host_copier *copier = (host_copier *)self;
    pthread_mutex_lock(&copier->lock);
    bool withdrawn = kvo_copy_queue_remove(&copier->todo, job);
    pthread_mutex_unlock(&copier->lock);
    return withdrawn;
}

static kvo_copy_job *host_reap(kvo_copier *self) {
    host_copier *copier = (host_copier *)self;
    pthread_mutex_lock(&copier->lock);
    kvo_copy_job *job = kvo_copy_queue_take(&copier->done);
    pthread_mutex_unlock(&copier->lock);
    return job;
}

static void host_describe(kvo_copier *self, char *out, size_t bytes) {
    (void)self;
    snprintf(out, bytes, "host memory, 1 thread");
}

static bool host_close(kvo_copier *self) {
    host_copier *copier = (host_copier *)self;
    pthread_mutex_lock(&copier->lock);
    copier->stop = true;
    pthread_cond_signal(&copier->work);
    pthread_mutex_unlock(&copier->lock);
    pthread_join(copier->thread, NULL);
    pthread_cond_destroy(&copier->work);
    pthread_mutex_destroy(&copier->lock);
    free(copier);
    return true;
}

kvo_copier *kvo_copy_host_open(int kick_fd) {
    host_copier *copier = calloc(1, sizeof *copier);
    if (copier == NULL) return NULL;
    copier->face = (kvo_copier){.depth = DEPTH,
                                .fence = host_fence,
                                .start = host_start,
                                .withdraw = host_withdraw,
                                .reap = host_reap,
                                .describe = host_describe,
                                .close = host_close};
    copier->kick_fd = kick_fd;
    pthread_mutex_init(&copier->lock, NULL);
    pthread_cond_init(&copier->work, NULL);
    if (pthread_create(&copier->thread, NULL, work, copier) == 0) return &copier->face;
    pthread_cond_destroy(&copier->work);
    pthread_mutex_destroy(&copier->lock);
    free(copier);
    return NULL;
}
