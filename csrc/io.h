/* io.h - the seam to the drives. Two backends: io_uring.c and io_threads.c; io.c is what they share.
 *
 * The pump thread opens a backend, starts requests, reaps them and sleeps in its wait(). A request is the caller's
 * memory and stays put until it is reaped. Short transfers are continued and EINTR and EAGAIN retried below the seam. */
#ifndef KVO_IO_H
#define KVO_IO_H

#include <stdbool.h>
#include <stdint.h>

enum kvo_io_kind { KVO_IO_READ, KVO_IO_WRITE, KVO_IO_CALL };

typedef struct kvo_io {
    enum kvo_io_kind kind;
    int fd;
    bool direct; /* fd was opened with O_DIRECT */
    uint8_t *buffer;
    uint64_t bytes, offset;
    uint64_t done;  /* bytes transferred so far */
    int32_t result; /* when reaped: 0 or -errno; -ENODATA: the file ended before */
    void *owner;
    /* The processor's part: before a WRITE (which it cannot refuse; NULL if done before), after a READ that succeeded,
     * all there is of a KVO_IO_CALL. Runs where the backend has time for it. 0 or -errno; -EINTR: a KVO_IO_CALL wants to
     * be called again. */
    int32_t (*work)(void *owner);
    struct kvo_io *next;
} kvo_io;

typedef struct kvo_drives {
    const char *name;
    uint32_t depth; /* requests it works on at once */
    bool threaded;  /* work and buffered transfers run on threads of its own, not on the pump's */
    /* Takes a request. At most as many are outstanding as were announced at opening. */
    void (*start)(struct kvo_drives *self, kvo_io *io);
    /* A finished request, or NULL. */
    kvo_io *(*reap)(struct kvo_drives *self);
    /* Sees that what was started is on its way, then sleeps until there may be something to reap, somebody wrote to
     * kick_fd, or timeout_us passed (UINT64_MAX: no limit). */
    void (*wait)(struct kvo_drives *self, uint64_t timeout_us);
    /* REQUIRES: every request was reaped. */
    void (*close)(struct kvo_drives *self);
} kvo_drives;

/* Both are given the pump's eventfd (blocking) to be woken by; threads write to it when a request is finished.
 * NULL with a reason if io_uring cannot be used here. Only the thread that opened it may use it, but any may close it. */
kvo_drives *kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes);
/* Requests are performed by threads: one for each of depth, at most 64. KVO_IO_CALL is theirs only. */
kvo_drives *kvo_io_threads_open(uint32_t depth, int kick_fd);

/* Takes in the outcome of one transfer: a byte count or -errno. True when the transfer is finished. */
bool kvo_io_advance(kvo_io *io, int64_t outcome);

#endif
