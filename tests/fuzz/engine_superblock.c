/* engine_superblock.c - any bytes in a slot file's place: the file is opened if its superblock is the right one, and refused
 * with a sentence if not. Also for what no accident makes: wrong fields under a right checksum. */
#include "fuzz.h"

#define PAYLOAD_BYTES 9000u
#define SLOT_BYTES 16384u /* header and payload, rounded up */
#define SIZE_MAX_BYTES (1u << 18)

enum { EDIT_A_RIGHT_ONE = 1, SUM_AGAIN = 2 };

typedef struct {
    char magic[8];
    uint32_t version, rank, ranks, path_index, path_count, zero;
    uint64_t payload_bytes;
    uint8_t fingerprint[KVO_FINGERPRINT_BYTES];
    uint64_t checksum;
} superblock;
_Static_assert(sizeof(superblock) == 64, "docs/format.md");

static const superblock right = {"KVOFILE1", 1, 0, 1, 1, 2, 0, PAYLOAD_BYTES, "fingerprint 16 b", 0};
static char path[PATH_BYTES];
static int fd = -1;

static uint64_t sum_of(const superblock *block) { return kvo_checksum(block, offsetof(superblock, checksum)); }

static void remove_file(void) { unlink(path); }

static superblock block_of(input *in, uint8_t flags) {
    superblock block;
    take_bytes(in, &block, sizeof block);
    if (flags & EDIT_A_RIGHT_ONE) {
        superblock begun = right;
        begun.checksum = sum_of(&begun);
        for (size_t i = 0; i < sizeof block; i++) ((uint8_t *)&block)[i] ^= ((const uint8_t *)&begun)[i];
    }
    if (flags & SUM_AGAIN) block.checksum = sum_of(&block);
    return block;
}

/* Rank, number of ranks and the zeros are the store's to compare. */
static bool is_right(const superblock *block) {
    return memcmp(block->magic, right.magic, sizeof right.magic) == 0 && block->version == right.version &&
           block->path_index == right.path_index && block->path_count == right.path_count &&
           block->payload_bytes == right.payload_bytes && block->checksum == sum_of(block) &&
           memcmp(block->fingerprint, right.fingerprint, sizeof right.fingerprint) == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (fd < 0) {
        fd = make_file(path);
        atexit(remove_file);
    }
    input in = {data, data + size};
    uint8_t flags = take_u8(&in);
    uint32_t file_bytes = take_u32(&in) % SIZE_MAX_BYTES, slots = take_u8(&in) % 16u;
    superblock block = block_of(&in, flags);
    MUST(ftruncate(fd, 0) == 0 && pwrite(fd, &block, sizeof block, 0) == (ssize_t)sizeof block);
    MUST(ftruncate(fd, file_bytes) == 0);

    char err[KVO_ERR_BYTES] = "";
    kvo_file file;
    kvo_expected expected = {.payload_bytes = PAYLOAD_BYTES,
                             .path_index = right.path_index,
                             .path_count = right.path_count,
                             .fingerprint = right.fingerprint};
    int status = kvo_file_open(&file, path, &expected, slots, err);
    MUST((status == 0) == (file_bytes >= KVO_SUPERBLOCK_BYTES && is_right(&block)));
    if (status != 0) {
        MUST(status == -EINVAL && file.fd == -1 && file.path == NULL);
        MUST(strncmp(err, "slot file ", 10) == 0 && strstr(err, "found ") != NULL && strstr(err, "expected ") != NULL);
        return 0;
    }
    uint32_t whole = (file_bytes - KVO_SUPERBLOCK_BYTES) / SLOT_BYTES;
    MUST(file.slot_bytes == SLOT_BYTES && file.slots == slots && file.allocated == (whole < slots ? whole : slots));
    superblock after;
    MUST(pread(fd, &after, sizeof after, 0) == (ssize_t)sizeof after && memcmp(&after, &block, sizeof after) == 0);
    kvo_file_close(&file);
    return 0;
}
