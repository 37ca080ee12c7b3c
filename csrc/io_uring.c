/* io_uring.c - the drives by io_uring, through liburing. Used where a probe of every request we make succeeds. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

typedef struct {
    kvo_drives face;
    struct io_uring ring;
    kvo_io *again, **again_end; /* started, or short, and not in the submission queue yet */
} uring;

/* Puts what waits into the submission queue as far as it has room. */
static void prepare(uring *self) {
    while (self->again != NULL) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&self->ring);
        if (sqe == NULL) return;
        kvo_io *io = self->again;
        self->again = io->next;
        if (self->again == NULL) self->again_end = &self->again;
        uint8_t *at = io->buffer + io->done;
        uint64_t left = io->bytes - io->done, offset = io->offset + io->done;
        unsigned length = left < (1u << 30) ? (unsigned)left : 1u << 30; /* the kernel's counts are 32 bits wide */
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

static bool uring_flush(kvo_drives *face) {
    uring *self = (uring *)face;
    prepare(self);
    while (io_uring_sq_ready(&self->ring) > 0) {
        int sent = io_uring_submit(&self->ring);
        if (sent == -EINTR) continue;
        if (sent <= 0) return false;
        prepare(self);
    }
    return true;
}

static kvo_io *uring_reap(kvo_drives *face) {
    uring *self = (uring *)face;
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&self->ring, &cqe) == 0) {
        kvo_io *io = io_uring_cqe_get_data(cqe);
        int outcome = cqe->res;
        io_uring_cqe_seen(&self->ring, cqe);
        if (kvo_io_advance(io, outcome)) return io;
        uring_start(face, io);
    }
    return NULL;
}

static void uring_close(kvo_drives *face) {
    uring *self = (uring *)face;
    io_uring_queue_exit(&self->ring);
    free(self);
}

static int run_one(uring *self, kvo_io *io) {
    uring_start(&self->face, io);
    do {
        if (!uring_flush(&self->face)) return -EAGAIN;
        struct io_uring_cqe *cqe;
        int error = io_uring_wait_cqe(&self->ring, &cqe);
        if (error != 0 && error != -EINTR) return error;
    } while (uring_reap(&self->face) == NULL);
    return io->result;
}

/* Writes and reads a page of a memory file: what a sandbox denies or a kernel lacks fails here. */
static int probe(uring *self) {
    int fd = memfd_create("kvoffload-probe", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    uint8_t out[KVO_ALIGNMENT], in[KVO_ALIGNMENT] = {0};
    memset(out, 0x5a, sizeof out);
    kvo_io steps[] = {{.kind = KVO_IO_WRITE, .fd = fd, .buffer = out, .bytes = sizeof out},
                      {.kind = KVO_IO_READ, .fd = fd, .buffer = in, .bytes = sizeof in}};
    int status = 0;
    for (unsigned i = 0; i < sizeof steps / sizeof *steps && status == 0; i++) status = run_one(self, &steps[i]);
    close(fd);
    return status == 0 && memcmp(out, in, sizeof out) != 0 ? -EIO : status;
}

kvo_drives *kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes) {
    uring *self = calloc(1, sizeof *self);
    if (self == NULL) return NULL;
    self->face = (kvo_drives){.name = "io_uring",
                              .depth = depth,
                              .start = uring_start,
                              .flush = uring_flush,
                              .reap = uring_reap,
                              .close = uring_close};
    self->again_end = &self->again;
    int error = io_uring_queue_init(depth, &self->ring, 0);
    if (error != 0) {
        snprintf(reason, reason_bytes, "io_uring refused: %s", strerror(-error));
        free(self);
        return NULL;
    }
    error = probe(self);
    if (error == 0) error = io_uring_register_eventfd(&self->ring, kick_fd);
    if (error != 0) {
        snprintf(reason, reason_bytes, "io_uring failed its probe: %s", strerror(-error));
        uring_close(&self->face);
        return NULL;
    }
    snprintf(reason, reason_bytes, "probed");
    return &self->face;
}

#endif
