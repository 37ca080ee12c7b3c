/* slotfile.c - the format on the medium: superblock, slot header, and opening a file of slots. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "internal.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the format is little endian and these structures are written as they lie in memory"
#endif

typedef struct {
    char magic[8];
    uint32_t version;
    uint32_t ssd_slot; /* over all files, so that a slot copied to another place is recognised */
    uint64_t generation;
    uint64_t bytes;
    uint8_t fingerprint[KVO_FINGERPRINT_BYTES];
    uint8_t key_len;
    uint8_t zero0[7];
    uint8_t key[KVO_KEY_BYTES];
    uint64_t payload_checksum;
    uint8_t zero1[16];
    uint64_t header_checksum; /* of everything before it */
} slot_header;
_Static_assert(sizeof(slot_header) == 128, "slot header");
_Static_assert(offsetof(slot_header, payload_checksum) == 96, "slot header");
_Static_assert(offsetof(slot_header, header_checksum) == 120, "slot header");

typedef struct {
    char magic[8];
    uint32_t version;
    uint32_t rank, ranks;
    uint32_t path_index, path_count;
    uint32_t zero;
    uint64_t payload_bytes;
    uint8_t fingerprint[KVO_FINGERPRINT_BYTES];
    uint64_t checksum; /* of everything before it */
} superblock;
_Static_assert(sizeof(superblock) == 64, "superblock");

static slot_header header_of(const kvo_block *block, uint32_t ssd_slot, const uint8_t *fingerprint) {
    slot_header header = {.magic = {'K', 'V', 'O', 'S', 'L', 'O', 'T', '1'},
                          .version = KVO_FORMAT_VERSION,
                          .ssd_slot = ssd_slot,
                          .generation = block->generation,
                          .bytes = block->bytes,
                          .key_len = block->key_len};
    memcpy(header.fingerprint, fingerprint, sizeof header.fingerprint);
    memcpy(header.key, block->key, sizeof header.key);
    return header;
}

static void sum_header(slot_header *header, const uint8_t *payload) {
    header->payload_checksum = kvo_checksum(payload, header->bytes);
    header->header_checksum = kvo_checksum(header, offsetof(slot_header, header_checksum));
}

void kvo_slot_seal(uint8_t *slot, const kvo_block *block, uint32_t ssd_slot, const uint8_t *fingerprint) {
    slot_header header = header_of(block, ssd_slot, fingerprint);
    sum_header(&header, slot + KVO_HEADER_BYTES);
    memset(slot, 0, KVO_HEADER_BYTES);
    memcpy(slot, &header, sizeof header);
    uint64_t end = KVO_HEADER_BYTES + block->bytes;
    memset(slot + end, 0, kvo_round_up(end, KVO_ALIGNMENT) - end);
}

bool kvo_slot_verify(const uint8_t *slot, const kvo_block *block, uint32_t ssd_slot, const uint8_t *fingerprint) {
    /* Everything a right header says is known before, so the test is equality. */
    slot_header right = header_of(block, ssd_slot, fingerprint);
    if (memcmp(slot, &right, offsetof(slot_header, payload_checksum)) != 0) return false;
    sum_header(&right, slot + KVO_HEADER_BYTES);
    return memcmp(slot, &right, sizeof right) == 0;
}

/* A refusal: names the file, what is wrong with it, and what helps. */
static int refuse(char err[KVO_ERR_BYTES], int error, const char *path, const char *what) {
    snprintf(err, KVO_ERR_BYTES, "slot file %s: %s", path, what);
    return -error;
}

static int check_superblock(const superblock *found, const char *path, const kvo_expected *expected,
                            char err[KVO_ERR_BYTES]) {
    char what[160];
    if (memcmp(found->magic, "KVOFILE1", sizeof found->magic) != 0)
        return refuse(err, EINVAL, path, "found no superblock, expected one that begins with KVOFILE1");
    if (found->checksum != kvo_checksum(found, offsetof(superblock, checksum)))
        return refuse(err, EINVAL, path, "found a damaged superblock, expected a matching checksum");
    if (found->version != KVO_FORMAT_VERSION) {
        snprintf(what, sizeof what, "found format version %u, expected %d", found->version, KVO_FORMAT_VERSION);
        return refuse(err, EINVAL, path, what);
    }
    if (memcmp(found->fingerprint, expected->fingerprint, KVO_FINGERPRINT_BYTES) != 0)
        return refuse(err, EINVAL, path, "found another namespace's fingerprint, expected this model and layout's");
    if (found->payload_bytes != expected->payload_bytes) {
        snprintf(what, sizeof what, "found slots of %llu payload bytes, expected %llu",
                 (unsigned long long)found->payload_bytes, (unsigned long long)expected->payload_bytes);
        return refuse(err, EINVAL, path, what);
    }
    if (found->path_index != expected->path_index || found->path_count != expected->path_count) {
        snprintf(what, sizeof what, "found file %u of %u, expected file %u of %u", found->path_index, found->path_count,
                 expected->path_index, expected->path_count);
        return refuse(err, EINVAL, path, what);
    }
    return 0;
}

static int change_flags(int fd, int add, int remove) {
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, (flags | add) & ~remove) != 0) return errno;
    return 0;
}

/* Reads the superblock with direct I/O and writes the same bytes back; some file systems accept the flag and then
 * refuse the transfer. tmpfs accepts both, but it has nothing to transfer to: it copies. Returns 0, or the errno of the
 * refusal with the file back in buffered mode. */
static int probe_direct(int fd, void *page) {
    struct statfs system;
    if (fstatfs(fd, &system) == 0 && system.f_type == TMPFS_MAGIC) return EOPNOTSUPP;
    int error = change_flags(fd, O_DIRECT, 0);
    if (error != 0) return error;
    errno = 0; /* a short transfer sets none */
    if (pread(fd, page, KVO_SUPERBLOCK_BYTES, 0) == KVO_SUPERBLOCK_BYTES &&
        pwrite(fd, page, KVO_SUPERBLOCK_BYTES, 0) == KVO_SUPERBLOCK_BYTES)
        return 0;
    error = errno != 0 ? errno : EIO;
    change_flags(fd, 0, O_DIRECT);
    return error;
}

static int check_and_probe(kvo_file *file, void *page, const kvo_expected *expected, char err[KVO_ERR_BYTES]) {
    struct stat found;
    if (fstat(file->fd, &found) != 0) return refuse(err, errno, file->path, strerror(errno));
    ssize_t got = pread(file->fd, page, KVO_SUPERBLOCK_BYTES, 0);
    if (got < 0) return refuse(err, errno, file->path, strerror(errno));
    if (got != KVO_SUPERBLOCK_BYTES)
        return refuse(err, EINVAL, file->path, "found less than a superblock, expected 4096 bytes");
    int status = check_superblock(page, file->path, expected, err);
    if (status != 0) return status;
    uint64_t slots = ((uint64_t)found.st_size - KVO_SUPERBLOCK_BYTES) / file->slot_bytes;
    file->allocated = slots < file->slots ? (uint32_t)slots : file->slots;
    file->direct_error = probe_direct(file->fd, page);
    file->direct = file->direct_error == 0;
    return 0;
}

/* Held while the file is open, even by an engine that left it to the kernel: who shortens or resets a file locks it
 * exclusively first, so that no engine still writes slots which are gone for the others. */
static int lock_file(const kvo_file *file, char err[KVO_ERR_BYTES]) {
    if (flock(file->fd, LOCK_SH | LOCK_NB) == 0) return 0;
    int error = errno;
    if (error == EWOULDBLOCK)
        return refuse(err, error, file->path, "found it locked: the file is being resized by another engine");
    char what[160];
    snprintf(what, sizeof what, "it cannot be locked against being resized (%s)", strerror(error));
    return refuse(err, error, file->path, what);
}

/* Where the last `count` components of a path begin. */
static char *last_components(char *path, uint32_t count) {
    char *at = path + strlen(path);
    while (at > path && (at[-1] != '/' || --count > 0)) at--;
    return at;
}

/* Opens a directory on the way to a slot file and leaves the one before. The first is the user's nvme path, which may be
 * root's, as mount points are; the others are ours. -1 with errno; EPERM: it is another user's. */
static int enter(int before, const char *name, bool is_first, int flags) {
    int fd = openat(before, name, O_PATH | O_DIRECTORY | O_CLOEXEC | flags), error = errno;
    if (before >= 0) close(before);
    struct stat found;
    if (fd >= 0 && flags != 0 && (fstat(fd, &found) != 0 || (found.st_uid != geteuid() && !(is_first && found.st_uid == 0)))) {
        close(fd);
        fd = -1;
        error = EPERM;
    }
    errno = error;
    return fd;
}

/* Opens what a path names. The directory before the last own_directories is the user's, and how the path leads there is the
 * user's affair; from there on it goes component by component and follows no symlink, so that nobody who may write in one of
 * them can lead us elsewhere. */
static int open_by_components(const char *path, uint32_t own_directories, char err[KVO_ERR_BYTES]) {
    char *copy = strdup(path), *rest = NULL;
    if (copy == NULL) return refuse(err, ENOMEM, path, strerror(ENOMEM));
    char *names = last_components(copy, own_directories + 1);
    const char *base = names == copy ? "." : names == copy + 1 ? "/" : copy;
    if (names > copy + 1) names[-1] = '\0'; /* with a slash at its end a symlink would be followed */
    int flags = own_directories > 0 ? O_NOFOLLOW : 0;
    int directory = enter(AT_FDCWD, base, true, flags);
    char *name = strtok_r(names, "/", &rest);
    for (uint32_t i = 0; directory >= 0 && i < own_directories && name != NULL; i++, name = strtok_r(NULL, "/", &rest))
        directory = enter(directory, name, false, flags);
    int status;
    if (directory < 0) {
        status = refuse(err, errno, path,
                        errno == ENOTDIR || errno == ELOOP ? "found a symbolic link or a file for a directory of its path"
                        : errno == EPERM                   ? "found a directory of its path to be another user's"
                                                           : strerror(errno));
    } else {
        /* O_NONBLOCK: a fifo or a device must not stop us before we can see that it is one. */
        status = openat(directory, name == NULL ? "" : name, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (status < 0)
            status = refuse(err, errno, path, errno == ELOOP ? "found a symbolic link, expected a slot file" : strerror(errno));
        close(directory);
    }
    free(copy);
    return status;
}

/* What has the name must be a file that nobody else has a hand in: by a second name another user could read and change it,
 * and what we write could land in a file that is none of ours. */
static int check_file(const kvo_file *file, char err[KVO_ERR_BYTES]) {
    struct stat found;
    if (fstat(file->fd, &found) != 0) return refuse(err, errno, file->path, strerror(errno));
    if (!S_ISREG(found.st_mode)) return refuse(err, EINVAL, file->path, "found no regular file, expected a slot file");
    if (found.st_uid != geteuid()) return refuse(err, EPERM, file->path, "found a file of another user, expected our own");
    if (found.st_nlink > 1) return refuse(err, EPERM, file->path, "found a file with a second name (a hard link): remove it");
    int error = change_flags(file->fd, 0, O_NONBLOCK);
    return error == 0 ? 0 : refuse(err, error, file->path, strerror(error));
}

int kvo_file_open(kvo_file *file, const char *path, const kvo_expected *expected, uint32_t slots,
                  char err[KVO_ERR_BYTES]) {
    *file = (kvo_file){.fd = -1, .slots = slots};
    file->slot_bytes = kvo_round_up(KVO_HEADER_BYTES + expected->payload_bytes, KVO_ALIGNMENT);
    file->path = strdup(path);
    void *page = aligned_alloc(KVO_ALIGNMENT, KVO_SUPERBLOCK_BYTES);
    int status = file->path == NULL || page == NULL ? refuse(err, ENOMEM, path, strerror(ENOMEM)) : 0;
    if (status == 0) {
        file->fd = open_by_components(path, expected->own_directories, err);
        if (file->fd < 0) status = file->fd;
    }
    if (status == 0) status = check_file(file, err);
    if (status == 0) status = lock_file(file, err);
    if (status == 0) status = check_and_probe(file, page, expected, err);
    free(page);
    if (status != 0) kvo_file_close(file);
    return status;
}

void kvo_file_close(kvo_file *file) {
    if (file->fd >= 0) {
        flock(file->fd, LOCK_UN); /* also for a forked child, which holds a copy of the descriptor */
        close(file->fd);
    }
    free(file->path);
    *file = (kvo_file){.fd = -1};
}

/* ---- growing ---- */

#define FLOOR_SHARE 50u
#define FLOOR_BYTES_MAX (10ull << 30)

/* What the file system may charge to a file beyond its bytes: the blocks that list its extents. */
static uint64_t space_at_most(const kvo_file *file) {
    uint64_t bytes = kvo_file_offset(file, file->slots), listing = bytes / 200;
    return bytes + (listing > KVO_ALIGNMENT ? listing : KVO_ALIGNMENT);
}

/* Whether the file system keeps free what others need when `bytes` more are taken: 0, ENOSPC, or why it does not tell. The
 * cap says what may be ours, but others fill the drive meanwhile. Mirrored by layout.free_floor. */
static int check_floor(const kvo_file *file, uint64_t bytes) {
    struct statvfs system;
    if (fstatvfs(file->fd, &system) != 0) return errno;
    uint64_t floor = (uint64_t)system.f_blocks * system.f_frsize / FLOOR_SHARE;
    if (floor > FLOOR_BYTES_MAX) floor = FLOOR_BYTES_MAX;
    return (uint64_t)system.f_bavail * system.f_frsize < floor + bytes ? ENOSPC : 0;
}

/* Gives the file room for `slots` slots, or leaves it as it was. */
static int extend(const kvo_file *file, uint32_t slots) {
    struct stat before, after;
    if (fstat(file->fd, &before) != 0) return -errno;
    off_t from = (off_t)kvo_file_offset(file, file->allocated), to = (off_t)kvo_file_offset(file, slots);
    int error = check_floor(file, (uint64_t)(to - from));
    if (error != 0) return -error;
    error = fallocate(file->fd, 0, from, to - from) == 0 ? 0 : errno;
    /* Such a file system makes room when it is written to, but a file is as long as its slots everywhere: one that
     * ends within a slot would look truncated by somebody's hand. */
    if (error == EOPNOTSUPP) error = before.st_size >= to || ftruncate(file->fd, to) == 0 ? 0 : errno;
    if (error == 0 && fstat(file->fd, &after) != 0) error = errno;
    /* In many fragments a file costs more than its bytes, and the caller's limit counts what it costs. */
    if (error == 0 && (uint64_t)after.st_blocks * 512 > space_at_most(file)) error = ENOSPC;
    if (error == 0) error = check_floor(file, 0); /* again: other ranks may have grown their files at the same time */
    if (error == 0 || error == EINTR) return -error; /* after a signal the next attempt goes on from here */
    return ftruncate(file->fd, before.st_size) == 0 ? -error : -errno;
}

int kvo_file_grow(const kvo_file *file, uint32_t needed, uint32_t wanted, uint32_t *reached) {
    *reached = wanted;
    int status = extend(file, wanted);
    if ((status != -ENOSPC && status != -EDQUOT) || needed >= wanted) return status;
    *reached = needed;
    return extend(file, needed);
}
