/* file_system.c - preloaded into a process, stands before pwrite, fallocate and fstat, and makes the file system one that is
 * full or lacks something, as the process asks by setting the variables below (through ctypes). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

volatile int fail_allocations;   /* errno to fail with, 0 for none */
volatile int largest_allocation; /* a larger one finds the disk full, 0 for no limit */
volatile int extra_blocks;       /* of 512 bytes that a file costs beyond its own */
volatile int refuse_direct;      /* fail the probe of direct I/O, a write of the superblock */

ssize_t pwrite(int fd, const void *buffer, size_t bytes, off_t at) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (next == NULL) next = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    if (at == 0 && refuse_direct) return errno = EINVAL, -1;
    return next(fd, buffer, bytes, at);
}

int fallocate(int fd, int mode, off_t at, off_t bytes) {
    static int (*next)(int, int, off_t, off_t);
    if (next == NULL) next = (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate");
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
