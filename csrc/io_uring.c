/* io_uring.c - the drives by io_uring, through liburing. Used where a probe of every request we make succeeds. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"
#include "io.h"

#ifndef KVO_HAVE_LIBURING

kvo_drives *kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes) {
    (void)depth;
    (void)kick_fd;
    snprintf(reason, reason_bytes, "built without liburing");
    return NULL;
}

#else

#include <liburing.h>

#define WORK_AT_ONCE (512u << 10) /* bytes of work in one visit, so that neither drives nor callers wait long */
#define RETRY_US 1000u            /* when the kernel refuses, for lack of memory mostly */
#define TRANSFER_BYTES (1u << 30) /* the kernel's counts are 32 bits wide */

typedef struct {
    kvo_drives face;
    struct io_uring ring;
    int kick_fd;
    eventfd_t kicks;            /* what the read below delivers */
    int kick_error;             /* of the last such read */
    bool armed;                 /* a read of kick_fd is in the ring, so that one system call waits for everything */
    kvo_io *again, **again_end; /* started, or short, and not in the submission queue yet */
} uring;

static kvo_io *take(uring *self) {
    kvo_io *io = self->again;
    self->again = io->next;
    if (self->again == NULL) self->again_end = &self->again;
    return io;
}

/* Puts what waits into the submission queue, as far as it has room and until enough work was done. */
static void prepare(uring *self) {
    uint64_t worked = 0;
    while (self->again != NULL) {
        kvo_io *io = self->again;
        bool has_work = io->kind == KVO_IO_WRITE && io->done == 0 && io->work != NULL;
        if (has_work && worked + io->bytes > WORK_AT_ONCE) {
            if (worked > 0) return;
            io_uring_submit(&self->ring); /* what is ready first; should it fail, the next visit tries again */
        }
        struct io_uring_sqe *sqe = io_uring_get_sqe(&self->ring);
        if (sqe == NULL) return;
        take(self);
        if (has_work) {
            io->work(io->owner);
            worked += io->bytes;
        }
        uint8_t *at = io->buffer + io->done;
        uint64_t left = io->bytes - io->done, offset = io->offset + io->done;
        unsigned length = left < TRANSFER_BYTES ? (unsigned)left : TRANSFER_BYTES;
        if (io->kind == KVO_IO_READ) io_uring_prep_read(sqe, io->fd, at, length, offset);
        else io_uring_prep_write(sqe, io->fd, at, length, offset);
        io_uring_sqe_set_data(sqe, io);
    }
}

static void uring_start(kvo_drives *face, kvo_io *io) {
    uring *self = (uring *)face;
    io->next = NULL;
    *self->again_end = io;
    self->again_end = &io->next;
}

static void arm(uring *self) {
    struct io_uring_sqe *sqe = self->armed ? NULL : io_uring_get_sqe(&self->ring);
    if (sqe == NULL) return;
    io_uring_prep_read(sqe, self->kick_fd, &self->kicks, sizeof self->kicks, 0);
    io_uring_sqe_set_data(sqe, self);
    self->armed = true;
}

static void uring_wait(kvo_drives *face, uint64_t timeout_us) {
    uring *self = (uring *)face;
    arm(self);
    prepare(self);
    if (!self->armed || self->again != NULL) timeout_us = 0;
    struct __kernel_timespec timeout = {.tv_sec = (int64_t)(timeout_us / 1000000u),
                                        .tv_nsec = (long long)(timeout_us % 1000000u) * 1000};
    struct io_uring_cqe *cqe;
    int error = timeout_us == 0 ? io_uring_submit_and_get_events(&self->ring)
                                : io_uring_submit_and_wait_timeout(&self->ring, &cqe, 1,
                                                                   timeout_us == UINT64_MAX ? NULL : &timeout, NULL);
    if (error < 0 && error != -ETIME && error != -EINTR) usleep(RETRY_US);
}

static kvo_io *uring_reap(kvo_drives *face) {
    uring *self = (uring *)face;
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&self->ring, &cqe) == 0) {
        void *data = io_uring_cqe_get_data(cqe);
        int outcome = cqe->res;
        io_uring_cqe_seen(&self->ring, cqe);
        if (data == self) {
            self->armed = false;
            self->kick_error = outcome < 0 ? outcome : 0;
            continue;
        }
        kvo_io *io = data;
        if (!kvo_io_advance(io, outcome)) {
            uring_start(face, io);
            continue;
        }
        if (io->kind == KVO_IO_READ && io->result == 0) io->result = io->work(io->owner);
        return io;
    }
    return NULL;
}

static void uring_close(kvo_drives *face) {
    uring *self = (uring *)face;
    io_uring_queue_exit(&self->ring);
    free(self);
}

static int32_t no_work(void *owner) {
    (void)owner;
    return 0;
}

/* Runs one request to its end, or, without one, a read of a kick. */
static int run_one(uring *self, kvo_io *io) {
    if (io != NULL) uring_start(&self->face, io);
    else arm(self);
    prepare(self);
    while (uring_reap(&self->face) == NULL && (io != NULL || self->armed)) {
        struct io_uring_cqe *cqe;
        int error = io_uring_submit_and_wait_timeout(&self->ring, &cqe, 1, NULL, NULL);
        if (error < 0 && error != -EINTR) return error;
        prepare(self);
    }
    return io != NULL ? io->result : self->kick_error;
}

/* Writes and reads a page of a memory file, and reads a kick: what a sandbox denies or a kernel lacks fails here. */
static int probe(uring *self) {
    if (eventfd_write(self->kick_fd, 1) != 0) return -errno;
    int status = run_one(self, NULL);
    if (status != 0) return status;
    int fd = memfd_create("kvoffload-probe", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    uint8_t out[KVO_ALIGNMENT], in[KVO_ALIGNMENT] = {0};
    memset(out, 0x5a, sizeof out);
    kvo_io steps[] = {{.kind = KVO_IO_WRITE, .fd = fd, .buffer = out, .bytes = sizeof out, .work = no_work},
                      {.kind = KVO_IO_READ, .fd = fd, .buffer = in, .bytes = sizeof in, .work = no_work}};
    for (unsigned i = 0; i < sizeof steps / sizeof *steps && status == 0; i++) status = run_one(self, &steps[i]);
    close(fd);
    return status == 0 && memcmp(out, in, sizeof out) != 0 ? -EIO : status;
}

/* What the kernel has to do for a completion it does when we visit it, not by interrupting a processor: for kernels
 * from 6.1 on. */
#define QUIET (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG)

kvo_drives *kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes) {
    uring *self = calloc(1, sizeof *self);
    if (self == NULL) return NULL;
    self->face = (kvo_drives){.name = "io_uring",
                              .depth = depth,
                              .start = uring_start,
                              .reap = uring_reap,
                              .wait = uring_wait,
                              .close = uring_close};
    self->kick_fd = kick_fd;
    self->again_end = &self->again;
    int error = io_uring_queue_init(depth + 1, &self->ring, QUIET);
    if (error == -EINVAL) error = io_uring_queue_init(depth + 1, &self->ring, 0);
    if (error != 0) {
        snprintf(reason, reason_bytes, "io_uring refused: %s", strerror(-error));
        free(self);
        return NULL;
    }
    error = probe(self);
    if (error != 0) {
        snprintf(reason, reason_bytes, "io_uring failed its probe: %s", strerror(-error));
        uring_close(&self->face);
        return NULL;
    }
    snprintf(reason, reason_bytes, "probed");
    return &self->face;
}

#endif
