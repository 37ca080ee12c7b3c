/* slow_io.c - preloaded into a process, stands before pread, pwrite, fallocate and fstat: holds them, fails them or makes them
 * short, as the process asks by setting the variables below (through ctypes). Superblocks are let through. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

volatile int hold_reads, hold_writes, hold_allocations; /* while set, calls wait */
volatile int fail_reads, fail_writes, fail_allocations; /* errno to fail with, 0 for none */
volatile int only_fd;                                   /* hold calls on this file alone, 0 for all */
volatile int largest_allocation;                        /* a larger one finds the disk full, 0 for no limit */
volatile int extra_blocks;                              /* of 512 bytes that a file costs beyond its own */
volatile int short_transfers;                           /* transfer at most this many bytes a call, 0 for all */
volatile int refuse_direct;                             /* fail the probe of direct I/O, a write of the superblock */
volatile int held;                                      /* calls that wait now */

static void hold(volatile int *gate, int fd) {
    if (!*gate || (only_fd && fd != only_fd)) return;
    __atomic_add_fetch(&held, 1, __ATOMIC_SEQ_CST);
    while (*gate) usleep(500);
    __atomic_sub_fetch(&held, 1, __ATOMIC_SEQ_CST);
}

static size_t shorten(size_t bytes) {
    return short_transfers && bytes > (size_t)short_transfers ? (size_t)short_transfers : bytes;
}

ssize_t pread(int fd, void *buffer, size_t bytes, off_t at) {
    static ssize_t (*next)(int, void *, size_t, off_t);
    if (next == NULL) next = (ssize_t(*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    if (at == 0) return next(fd, buffer, bytes, at);
    hold(&hold_reads, fd);
    if (fail_reads) return errno = fail_reads, -1;
    return next(fd, buffer, shorten(bytes), at);
}

ssize_t pwrite(int fd, const void *buffer, size_t bytes, off_t at) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (next == NULL) next = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    if (at == 0) return refuse_direct ? (errno = EINVAL, -1) : next(fd, buffer, bytes, at);
    hold(&hold_writes, fd);
    if (fail_writes) return errno = fail_writes, -1;
    return next(fd, buffer, shorten(bytes), at);
}

int fallocate(int fd, int mode, off_t at, off_t bytes) {
    static int (*next)(int, int, off_t, off_t);
    if (next == NULL) next = (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate");
    hold(&hold_allocations, fd);
    if (fail_allocations) return errno = fail_allocations, -1;
    if (largest_allocation && bytes > largest_allocation) return errno = ENOSPC, -1;
    return next(fd, mode, at, bytes);
}

int fstat(int fd, struct stat *found) {
    static int (*next)(int, struct stat *);
    if (next == NULL) next = (int (*)(int, struct stat *))dlsym(RTLD_NEXT, "fstat");
    int status = next(fd, found);
    if (status == 0) found->st_blocks += extra_blocks;
    return status;
}
