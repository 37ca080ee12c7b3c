/* copy_host.c - copies by one thread, for a KV cache in host memory. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "copy.h"
#include "ring.h"

struct kvo_copy {
    int kick_fd;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work;
    kvo_ring todo, done;
    kvo_copy_job *todo_jobs[KVO_COPY_DEPTH], *done_jobs[KVO_COPY_DEPTH];
    bool stop;
};

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
    kvo_copy *copy = argument;
    pthread_mutex_lock(&copy->lock);
    while (copy->todo.count > 0 || !copy->stop) {
        if (copy->todo.count == 0) {
            pthread_cond_wait(&copy->work, &copy->lock);
            continue;
        }
        kvo_copy_job *job = copy->todo_jobs[kvo_ring_pop(&copy->todo)];
        pthread_mutex_unlock(&copy->lock);
        run(job);
        job->result = 0;
        pthread_mutex_lock(&copy->lock);
        copy->done_jobs[kvo_ring_push(&copy->done)] = job;
        eventfd_write(copy->kick_fd, 1);
    }
    pthread_mutex_unlock(&copy->lock);
    return NULL;
}

kvo_copy *kvo_copy_open(int kick_fd) {
    kvo_copy *copy = calloc(1, sizeof *copy);
    if (copy == NULL) return NULL;
    copy->kick_fd = kick_fd;
    copy->todo.capacity = copy->done.capacity = KVO_COPY_DEPTH;
    pthread_mutex_init(&copy->lock, NULL);
    pthread_cond_init(&copy->work, NULL);
    if (pthread_create(&copy->thread, NULL, work, copy) == 0) return copy;
    pthread_cond_destroy(&copy->work);
    pthread_mutex_destroy(&copy->lock);
    free(copy);
    return NULL;
}

void kvo_copy_start(kvo_copy *copy, kvo_copy_job *job) {
    pthread_mutex_lock(&copy->lock);
    copy->todo_jobs[kvo_ring_push(&copy->todo)] = job;
    pthread_cond_signal(&copy->work);
    pthread_mutex_unlock(&copy->lock);
}

kvo_copy_job *kvo_copy_reap(kvo_copy *copy) {
    pthread_mutex_lock(&copy->lock);
    kvo_copy_job *job = copy->done.count > 0 ? copy->done_jobs[kvo_ring_pop(&copy->done)] : NULL;
    pthread_mutex_unlock(&copy->lock);
    return job;
}

void kvo_copy_close(kvo_copy *copy) {
    pthread_mutex_lock(&copy->lock);
    copy->stop = true;
    pthread_cond_signal(&copy->work);
    pthread_mutex_unlock(&copy->lock);
    pthread_join(copy->thread, NULL);
    pthread_cond_destroy(&copy->work);
    pthread_mutex_destroy(&copy->lock);
    free(copy);
}
