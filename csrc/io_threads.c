/* io_threads.c - the drives by pread and pwrite on a pool of threads: for kernels, containers and sandboxes that offer
 * no io_uring. Everywhere such a pool makes slot files grow, which takes several calls that may block. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "internal.h"
#include "io.h"

#define THREADS_MAX 64u
#define STACK_BYTES (256u << 10)

typedef struct {
    kvo_io *first, **end;
} io_list;

typedef struct {
    kvo_drives face;
    int kick_fd;
    pthread_mutex_t lock;
    pthread_cond_t work;
    io_list todo, done;
    bool stop;
    uint32_t threads;
    pthread_t thread[THREADS_MAX];
} io_pool;

static void append(io_list *list, kvo_io *io) {
    io->next = NULL;
    *list->end = io;
    list->end = &io->next;
}

static kvo_io *take(io_list *list) {
    kvo_io *io = list->first;
    if (io == NULL) return NULL;
    list->first = io->next;
    if (list->first == NULL) list->end = &list->first;
    return io;
}

static int64_t transfer(const kvo_io *io) {
    int64_t outcome;
    off_t at = (off_t)(io->offset + io->done);
    if (io->kind == KVO_IO_READ) outcome = pread(io->fd, io->buffer + io->done, io->bytes - io->done, at);
    else outcome = pwrite(io->fd, io->buffer + io->done, io->bytes - io->done, at);
    return outcome < 0 ? -errno : outcome;
}

static void perform(kvo_io *io) {
    if (io->kind == KVO_IO_CALL) {
        do io->result = io->work(io->owner);
        while (io->result == -EINTR);
        return;
    }
    if (io->kind == KVO_IO_WRITE && io->work != NULL) io->work(io->owner);
    while (!kvo_io_advance(io, transfer(io))) continue;
    if (io->kind == KVO_IO_READ && io->result == 0) io->result = io->work(io->owner);
}

static void *run(void *argument) {
    io_pool *pool = argument;
    pthread_setname_np(pthread_self(), "kvo-io");
    pthread_mutex_lock(&pool->lock);
    while (!pool->stop) {
        kvo_io *io = take(&pool->todo);
        if (io == NULL) {
            pthread_cond_wait(&pool->work, &pool->lock);
            continue;
        }
        pthread_mutex_unlock(&pool->lock);
        perform(io);
        pthread_mutex_lock(&pool->lock);
        bool first = pool->done.first == NULL;
        append(&pool->done, io);
        if (!first) continue;
        /* Without the lock: who wakes another is often made to wait itself, and the pump would wait for the lock then. */
        pthread_mutex_unlock(&pool->lock);
        eventfd_write(pool->kick_fd, 1);
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void pool_start(kvo_drives *self, kvo_io *io) {
    io_pool *pool = (io_pool *)self;
    pthread_mutex_lock(&pool->lock);
    append(&pool->todo, io);
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

static kvo_io *pool_reap(kvo_drives *self) {
    io_pool *pool = (io_pool *)self;
    pthread_mutex_lock(&pool->lock);
    kvo_io *io = take(&pool->done);
    pthread_mutex_unlock(&pool->lock);
    return io;
}

static void pool_wait(kvo_drives *self, uint64_t timeout_us) {
    io_pool *pool = (io_pool *)self;
    uint64_t ms = timeout_us / 1000 + (timeout_us % 1000 != 0);
    struct pollfd kick = {.fd = pool->kick_fd, .events = POLLIN};
    if (poll(&kick, 1, timeout_us == UINT64_MAX ? -1 : ms < INT_MAX ? (int)ms : INT_MAX) <= 0) return;
    eventfd_t kicks;
    eventfd_read(pool->kick_fd, &kicks);
}

static void pool_close(kvo_drives *self) {
    io_pool *pool = (io_pool *)self;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads; i++) pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

kvo_drives *kvo_io_threads_open(uint32_t depth, int kick_fd) {
    io_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pool->face = (kvo_drives){
        .name = "threads", .threaded = true, .start = pool_start, .reap = pool_reap, .wait = pool_wait, .close = pool_close};
    pool->kick_fd = kick_fd;
    pool->todo.end = &pool->todo.first;
    pool->done.end = &pool->done.first;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    uint32_t wanted = depth < THREADS_MAX ? depth : THREADS_MAX;
    while (pool->threads < wanted && pthread_create(&pool->thread[pool->threads], &small, run, pool) == 0)
        pool->threads++;
    pthread_attr_destroy(&small);
    pool->face.depth = pool->threads;
    if (pool->threads == 0) {
        pool_close(&pool->face);
        return NULL;
    }
    return &pool->face;
}
