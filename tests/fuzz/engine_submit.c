/* engine_submit.c - any bytes as operations: a batch is taken exactly if kvo.h allows it, what is taken completes exactly once,
 * and what is delivered are the bytes that were stored under that generation. */
#include "fuzz.h"

#define GROUPS 2u
#define PAYLOAD_BYTES 3000u
#define SMALL_BYTES 1111u /* of the second group */
#define DRAM_SLOTS 8u
#define SSD_SLOTS 20u
#define SOURCES 8u /* KV blocks that are stored; the ones behind them are loaded to */
#define MAX_OPS 32u
#define BATCH_MAX 40u
#define PATIENCE_US 20000000u

enum { RAW = 1 };

static uint8_t kv[GROUPS][SOURCES + BATCH_MAX][PAYLOAD_BYTES];
static const uint64_t group_bytes[GROUPS] = {PAYLOAD_BYTES, SMALL_BYTES};
static kvo_engine *engine;
static char path[PATH_BYTES];

static void end(void) {
    kvo_close(engine);
    unlink(path);
}

static void write_superblock(int fd, const uint8_t *fingerprint) {
    struct {
        char magic[8];
        uint32_t version, rank, ranks, path_index, path_count, zero;
        uint64_t payload_bytes;
        uint8_t fingerprint[KVO_FINGERPRINT_BYTES];
        uint64_t checksum;
    } block = {"KVOFILE1", 1, 0, 1, 0, 1, 0, PAYLOAD_BYTES, {0}, 0};
    memcpy(block.fingerprint, fingerprint, sizeof block.fingerprint);
    block.checksum = kvo_checksum(&block, sizeof block - sizeof block.checksum);
    MUST(pwrite(fd, &block, sizeof block, 0) == (ssize_t)sizeof block && ftruncate(fd, KVO_SUPERBLOCK_BYTES) == 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    static const uint8_t fingerprint[KVO_FINGERPRINT_BYTES] = "fingerprint 16 b";
    kvo_options options = {PAYLOAD_BYTES, DRAM_SLOTS, 4, MAX_OPS, 4, KVO_IO_THREADS, KVO_NO_DEVICE};
    kvo_region regions[GROUPS];
    const uint32_t first[] = {0, 1, 2};
    char err[KVO_ERR_BYTES];
    for (uint32_t g = 0; g < GROUPS; g++) {
        regions[g] = (kvo_region){(uint64_t)(uintptr_t)kv[g], PAYLOAD_BYTES, group_bytes[g]};
        for (uint32_t b = 0; b < SOURCES; b++) memset(kv[g][b], (int)(1 + b + g * SOURCES), PAYLOAD_BYTES);
    }
    int fd = make_file(path);
    write_superblock(fd, fingerprint);
    close(fd);
    const char *paths[] = {path};
    MUST(kvo_open(&engine, &options, err) == 0 && kvo_bind(engine, regions, first, GROUPS, err) == 0);
    MUST(kvo_attach(engine, paths, 1, 0, SSD_SLOTS, fingerprint, err) == 0);
    return atexit(end);
}

/* ---- what kvo.h allows ---- */

static bool is_allowed_alone(const kvo_op *op, bool in_pair) {
    bool is_ssd = op->kind == KVO_WRITE || op->kind == KVO_READ;
    if (op->kind > KVO_READ || op->flags > KVO_LINK || op->group >= GROUPS) return false;
    if (op->key_len < 1 || op->key_len > KVO_KEY_BYTES) return false;
    for (uint32_t i = op->key_len; i < KVO_KEY_BYTES; i++)
        if (op->key[i] != 0) return false;
    if (is_ssd && op->ssd_slot >= SSD_SLOTS) return false;
    return op->dram_slot < DRAM_SLOTS || (op->dram_slot == KVO_NO_SLOT && in_pair);
}

static bool is_allowed(const kvo_op *ops, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        bool leads = ops[i].flags == KVO_LINK, follows = i > 0 && ops[i - 1].flags == KVO_LINK;
        if (!is_allowed_alone(&ops[i], leads || follows)) return false;
        if (!leads) continue;
        if (ops[i].kind != KVO_READ || i + 1 == count) return false;
        if (ops[i + 1].kind != KVO_COPY_IN || ops[i + 1].flags != 0 || ops[i + 1].dram_slot != ops[i].dram_slot) return false;
    }
    return true;
}

/* ---- one input ---- */

/* An operation in few bytes, most of them allowed: what the fuzzer changes in it soon means something. */
static void take_short(input *in, kvo_op *op) {
    static const uint64_t timeouts[] = {0, 1, 100, UINT64_MAX};
    uint8_t what = take_u8(in), dram = take_u8(in);
    *op = (kvo_op){.kind = what & 3, .flags = what >> 2 & 1, .group = what >> 3 & 1, .timeout_us = timeouts[what >> 4 & 3]};
    op->dram_slot = dram == UINT8_MAX ? KVO_NO_SLOT : dram % (DRAM_SLOTS + 1);
    op->ssd_slot = take_u8(in) % (SSD_SLOTS + 1);
    op->generation = take_u8(in) % 16u;
    op->key_len = (uint8_t)(1 + op->generation % KVO_KEY_BYTES);
    memset(op->key, 'k', op->key_len);
}

/* What the caller promises: KV blocks that exist, one content under one generation, and a target of its own for each load. */
static void keep_promises(kvo_op *op, uint32_t index) {
    op->id = index;
    op->kv_block = op->kind == KVO_COPY_OUT ? (uint32_t)(op->generation % SOURCES) : SOURCES + index;
}

static void check_delivery(const kvo_op *op) {
    const uint8_t *stored = kv[op->group][op->generation % SOURCES], *delivered = kv[op->group][op->kv_block];
    MUST(memcmp(stored, delivered, group_bytes[op->group]) == 0);
}

/* Takes every completion of the first `count` operations. */
static void complete(const kvo_op *ops, uint32_t count) {
    bool done[BATCH_MAX] = {false};
    for (uint32_t left = count; left > 0;) {
        kvo_completion completions[MAX_OPS + 1];
        MUST(kvo_wait(engine, PATIENCE_US) == 1);
        int got = kvo_poll(engine, completions, MAX_OPS + 1);
        MUST(got > 0 && (uint32_t)got <= left);
        left -= (uint32_t)got;
        for (int i = 0; i < got; i++) {
            uint64_t id = completions[i].id;
            MUST(id < count && !done[id] && completions[i].status <= 0);
            done[id] = true;
            if (completions[i].status == 0 && ops[id].kind == KVO_COPY_IN) check_delivery(&ops[id]);
        }
    }
    MUST(kvo_wait(engine, 0) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, data + size};
    uint8_t flags = take_u8(&in);
    kvo_op ops[BATCH_MAX];
    uint32_t count = 0;
    for (; count < BATCH_MAX && in.at < in.end; count++) {
        if (flags & RAW) take_bytes(&in, &ops[count], sizeof ops[count]);
        else take_short(&in, &ops[count]);
        keep_promises(&ops[count], count);
    }
    int taken = kvo_submit(engine, ops, count, flags);
    MUST((taken == -EINVAL) == !is_allowed(ops, count));
    if (taken < 0) return 0;
    uint32_t room = count < MAX_OPS ? count : MAX_OPS;
    MUST((uint32_t)taken == room - (room < count && ops[room - 1].flags == KVO_LINK));
    complete(ops, (uint32_t)taken);
    return 0;
}
