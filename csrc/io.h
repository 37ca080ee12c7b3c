/* io.h - the seam to the drives. Two backends: io_uring.c and io_threads.c.
 *
 * The pump thread starts requests and reaps them; a backend writes to the pump's eventfd when there is something to
 * reap. A request is the caller's memory and stays put until it is reaped. Short transfers are continued and EINTR
 * and EAGAIN retried below the seam. */
#ifndef KVO_IO_H
#define KVO_IO_H

#include <stdbool.h>
#include <stdint.h>

enum kvo_io_kind { KVO_IO_READ, KVO_IO_WRITE, KVO_IO_CALL };

typedef struct kvo_io {
    enum kvo_io_kind kind;
    int fd;
    uint8_t *buffer;
    uint64_t bytes, offset;
    uint64_t done;  /* bytes transferred so far */
    int32_t result; /* when reaped: 0 or -errno; -ENODATA: the file ended before */
    void *owner;
    int32_t (*call)(void *owner); /* of a KVO_IO_CALL, which only threads take: 0 or -errno, -EINTR to be called again */
    struct kvo_io *next;
} kvo_io;

typedef struct kvo_drives {
    const char *name;
    uint32_t depth; /* requests it works on at once */
    /* Takes a request. At most as many are outstanding as were announced at opening. */
    void (*start)(struct kvo_drives *self, kvo_io *io);
    /* Hands started requests to the kernel. False: call again in a while, it is short of memory. */
    bool (*flush)(struct kvo_drives *self);
    /* A finished request, or NULL. */
    kvo_io *(*reap)(struct kvo_drives *self);
    /* REQUIRES: every request was reaped. */
    void (*close)(struct kvo_drives *self);
} kvo_drives;

/* NULL with a reason if io_uring cannot be used here. */
kvo_drives *kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes);
kvo_drives *kvo_io_threads_open(uint32_t depth, int kick_fd);

/* Takes in the outcome of one transfer: a byte count or -errno. True when the request is finished. */
bool kvo_io_advance(kvo_io *io, int64_t outcome);

#endif
