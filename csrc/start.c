/* start.c - which queued operations may start now: enough for drives and device to be busy, few enough that what comes
 * later and is more urgent need not wait for them. */
#include <errno.h>

#include "pump.h"

/* Writes of one file in the drive at once. These keep a drive busy; more would only make a read that comes now wait for
 * them, in the drive's queue, where no priority of ours counts. */
#define WRITE_BYTES (4u << 20)
#define WRITE_BYTES_OF_SMALL (8u << 20) /* of slots up to SMALL, which cost a drive more than their bytes */
#define SMALL (256u << 10)
#define WRITES_AT_LEAST 2u /* so that the drive has one while the next is sealed */
#define WRITE_BYTES_BESIDE_READS (2u << 20)
#define WRITES_BESIDE_READS 2u
/* Where a read came, the next is likely to come soon: so long the file is treated as if it were there already. */
#define READS_FOLLOW_US 100000u
/* Large slots are sealed while the drive is busy with the ones before: few fit into its queue, they tend to end together,
 * and the drive would be idle while their successors are summed. */
#define SEALED_AHEAD 2u
#define SEALED_AHEAD_FROM (512u << 10)

static void start_copy(kvo_engine *e, kvo_record *record) {
    const kvo_op *op = &record->op;
    uint32_t first = e->first_region[op->group];
    record->copy = (kvo_copy_job){.regions = &e->regions[first],
                                  .region_count = e->first_region[op->group + 1] - first,
                                  .kv_block = op->kv_block,
                                  .out = op->kind == KVO_COPY_OUT,
                                  .payload = kvo_slots_memory(&e->slots, record->physical) + KVO_HEADER_BYTES,
                                  .fence = record->fence,
                                  .owner = record};
    kvo_list_move(&e->queued[op->kind], &e->running, record);
    e->copies[op->kind]++;
    e->copier->start(e->copier, &record->copy);
}

void kvo_start_copies_in(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_COPY_IN];
    while (queue->first != NULL && e->copies[KVO_COPY_IN] < e->copier->depth) {
        kvo_record *record = queue->first;
        if (record->physical == KVO_NO_SLOT) record->physical = kvo_slots_use(&e->slots, record->op.dram_slot);
        kvo_block block = kvo_block_of(e, &record->op);
        if (kvo_slots_hold(&e->slots, record->physical, &block)) start_copy(e, record);
        else kvo_finish(e, queue, record, -EBADMSG);
    }
}

void kvo_start_copies_out(kvo_engine *e) {
    for (kvo_record *record = e->queued[KVO_COPY_OUT].first, *next; record != NULL; record = next) {
        if (e->copies[KVO_COPY_OUT] >= e->copier->depth) return;
        next = record->next;
        record->physical = kvo_slots_fill(&e->slots, record->op.dram_slot);
        if (record->physical != KVO_NO_SLOT) start_copy(e, record);
    }
}

/* Seals what is to be written, or verifies what was read. Often on a thread of the backend's: the record and the slot's
 * bytes are its own until the request is reaped, what else it looks at does not change. */
static int32_t seal(void *owner) {
    kvo_record *record = owner;
    kvo_block block = kvo_block_of(record->engine, &record->op);
    uint8_t *slot = kvo_slots_memory(&record->engine->slots, record->physical);
    kvo_slot_seal(slot, &block, record->op.ssd_slot, record->engine->fingerprint);
    return 0;
}

static int32_t verify(void *owner) {
    kvo_record *record = owner;
    kvo_block block = kvo_block_of(record->engine, &record->op);
    bool right = kvo_slot_verify(record->io.buffer, &block, record->op.ssd_slot, record->engine->fingerprint);
    return right ? 0 : -EBADMSG;
}

static void start_io(kvo_engine *e, kvo_record *record, enum kvo_io_kind kind) {
    kvo_drives *drives = kvo_file_of(e, record)->drives;
    const kvo_file *file = &kvo_file_of(e, record)->file;
    record->io = (kvo_io){.kind = kind,
                          .fd = file->fd,
                          .direct = file->direct,
                          .buffer = kvo_slots_memory(&e->slots, record->physical),
                          .bytes = kvo_round_up(KVO_HEADER_BYTES + e->group_bytes[record->op.group], KVO_ALIGNMENT),
                          .offset = kvo_file_offset(file, kvo_index_of(e, record)),
                          .owner = record,
                          .work = kind == KVO_IO_READ ? verify : record->sealed ? NULL : seal};
    kvo_list_move(&e->queued[record->op.kind], &e->running, record);
    kvo_count_io(e, record, 1);
    drives->start(drives, &record->io);
}

/* Whether an abandoned write may still land in the SSD slot. */
static bool is_haunted(const kvo_engine *e, uint32_t ssd_slot) {
    for (const kvo_record *record = e->abandoned.first; record != NULL; record = record->next)
        if (record->op.kind == KVO_WRITE && record->op.ssd_slot == ssd_slot) return true;
    return false;
}

/* At least `least` if `most` allows. */
static uint32_t clamp(uint64_t number, uint32_t least, uint32_t most) {
    if (number < least) number = least;
    return number < most ? (uint32_t)number : most;
}

/* Writes in flight on one file at most. A write costs reads of the same drive only. */
static uint32_t writes_at_most(kvo_engine *e, const kvo_store_file *files) {
    uint64_t slot_bytes = files->file.slot_bytes;
    uint32_t most = files->depth > 1 ? files->depth / 2 : 1;
    uint64_t now = kvo_now_us(), reads_end = kvo_later(files->read_at, READS_FOLLOW_US);
    if (now < reads_end && reads_end < e->next_deadline) e->next_deadline = reads_end; /* to look again then */
    if (files->reads + e->queued[KVO_READ].count > 0 || now < reads_end)
        return clamp(WRITE_BYTES_BESIDE_READS / slot_bytes, 1, most < WRITES_BESIDE_READS ? most : WRITES_BESIDE_READS);
    return clamp((slot_bytes > SMALL ? WRITE_BYTES : WRITE_BYTES_OF_SMALL) / slot_bytes, WRITES_AT_LEAST, most);
}

static bool is_full(const kvo_store_file *files) {
    return files->reads + files->writes >= files->depth;
}

/* Whether a file takes no more reads. One place is kept for a write that waits: a steady flow of reads must not keep
 * writes from ever being started. */
static bool is_full_of_reads(kvo_engine *e, const kvo_store_file *files) {
    bool keep = e->queued[KVO_WRITE].count > 0 && files->depth > 1 && files->writes < writes_at_most(e, files);
    return files->reads + files->writes + keep >= files->depth;
}

/* Whether a file was noted in this scan: what could be started there was, and that is not asked again for each that waits. */
static bool is_noted(const kvo_engine *e, const kvo_store_file *files, uint64_t full) {
    return full >> (files - e->files) & 1;
}

/* Notes a file that takes no more in this scan. True when none does, so that the scan can end. */
static bool note_full(const kvo_engine *e, const kvo_store_file *files, uint64_t *full) {
    _Static_assert(KVO_FILES_MAX <= 64, "a bit for each file");
    *full |= 1ull << (files - e->files);
    return (uint32_t)__builtin_popcountll(*full) == e->file_count;
}

/* Whether a staged read may take a spare slot. There are few; a stuck drive must not hold all of these either. */
static bool has_spares_for(kvo_engine *e, const kvo_record *record) {
    if (record->op.dram_slot != KVO_NO_SLOT || e->file_count == 1) return true;
    uint32_t most = e->options.spare_slots / e->file_count;
    return kvo_file_of(e, record)->staged < (most > 0 ? most : 1);
}

void kvo_start_reads(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_READ];
    uint64_t full = 0;
    for (kvo_record *record = queue->first, *next; record != NULL; record = next) {
        if (e->reads + e->writes >= e->options.io_depth) return;
        next = record->next;
        if (record->op.ssd_slot >= e->slot_count) {
            kvo_finish(e, queue, record, -ENXIO);
        } else if (kvo_index_of(e, record) >= kvo_file_of(e, record)->file.allocated) {
            kvo_finish(e, queue, record, -EBADMSG);
        } else if (is_noted(e, kvo_file_of(e, record), full)) {
            continue;
        } else if (is_full_of_reads(e, kvo_file_of(e, record))) {
            if (note_full(e, kvo_file_of(e, record), &full)) return;
        } else if (has_spares_for(e, record) && !is_haunted(e, record->op.ssd_slot)) {
            record->physical = kvo_slots_fill(&e->slots, record->op.dram_slot);
            if (record->physical == KVO_NO_SLOT) continue;
            start_io(e, record, KVO_IO_READ);
        }
    }
}

static int32_t grow_file(void *owner) {
    kvo_store_file *files = owner;
    return kvo_file_grow(&files->file, files->needed, files->wanted, &files->reached);
}

/* Makes room in the file for slot `index` and the ones that will follow it. */
static void grow(kvo_engine *e, kvo_store_file *files, uint32_t index) {
    const kvo_file *file = &files->file;
    if (files->wanted != 0) return;
    uint64_t extent = KVO_EXTENT_BYTES / file->slot_bytes;
    if (extent < KVO_EXTENT_SLOTS) extent = KVO_EXTENT_SLOTS;
    uint64_t to = kvo_round_up((uint64_t)index + 1, extent);
    files->needed = index + 1;
    files->wanted = to < file->slots ? (uint32_t)to : file->slots;
    files->growth = (kvo_io){.kind = KVO_IO_CALL, .fd = -1, .work = grow_file, .owner = files};
    e->growths++;
    e->growers->start(e->growers, &files->growth);
}

/* Becomes the one user of the DRAM slot that may write its header. False: it does not hold the block, which ended the
 * operation. */
static bool begin_write(kvo_engine *e, kvo_record *record) {
    kvo_block block = kvo_block_of(e, &record->op);
    record->physical = kvo_slots_use(&e->slots, record->op.dram_slot);
    e->slots.physical[record->physical].sealing = true;
    if (kvo_slots_hold(&e->slots, record->physical, &block)) return true;
    kvo_finish(e, &e->queued[KVO_WRITE], record, -EBADMSG);
    return false;
}

/* Whether nothing but its turn keeps a queued write from being sealed. */
static bool may_seal(kvo_engine *e, const kvo_record *record) {
    return !is_haunted(e, record->op.ssd_slot) && !e->slots.physical[e->slots.of_dram[record->op.dram_slot]].sealing;
}

bool kvo_seal_ahead(kvo_engine *e) {
    if (e->reads + e->queued[KVO_READ].count > 0 || e->slots.slot_bytes < SEALED_AHEAD_FROM) return false;
    uint32_t ahead = 0;
    for (kvo_record *record = e->queued[KVO_WRITE].first; record != NULL && ahead < SEALED_AHEAD; record = record->next) {
        ahead++;
        if (record->sealed) continue;
        if (record->op.ssd_slot >= e->slot_count || kvo_file_of(e, record)->drives->threaded) return false;
        if (!may_seal(e, record)) return false;
        e->io->wait(e->io, 0); /* the drive first */
        if (begin_write(e, record)) record->sealed = seal(record) == 0;
        return true;
    }
    return false;
}

void kvo_start_writes(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_WRITE];
    uint64_t full = 0;
    for (kvo_record *record = queue->first, *next; record != NULL; record = next) {
        if (e->reads + e->writes >= e->options.io_depth) return;
        next = record->next;
        if (record->op.ssd_slot >= e->slot_count) {
            kvo_finish(e, queue, record, -ENXIO);
        } else if (kvo_index_of(e, record) >= kvo_file_of(e, record)->file.allocated) {
            grow(e, kvo_file_of(e, record), kvo_index_of(e, record));
        } else if (is_noted(e, kvo_file_of(e, record), full)) {
            continue;
        } else if (is_full(kvo_file_of(e, record)) ||
                   kvo_file_of(e, record)->writes >= writes_at_most(e, kvo_file_of(e, record))) {
            if (note_full(e, kvo_file_of(e, record), &full)) return;
        } else if (record->sealed || (may_seal(e, record) && begin_write(e, record))) {
            start_io(e, record, KVO_IO_WRITE);
        }
    }
}
