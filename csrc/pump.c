/* pump.c - the thread that owns all operations: starts them in order of urgency, takes in what drives and copies
 * finished, and lets the late ones go. It sleeps in poll() on one eventfd until there is something to do. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>

#include "engine.h"

#define WRITES_BESIDE_READS 2u     /* more of them would double the time of a read (the drive's queue, not ours) */
#define TURN_BYTES (1u << 20)      /* checksummed before drives are looked after again, so that none runs dry */
#define RETRY_MS 1                 /* when the kernel is short of memory */
#define CLOSE_PATIENCE_US 2000000u /* what close gives the kernel to finish */

static void list_add(kvo_list *list, kvo_record *record) {
    record->previous = list->last;
    record->next = NULL;
    *(list->last != NULL ? &list->last->next : &list->first) = record;
    list->last = record;
    list->count++;
}

static void list_remove(kvo_list *list, kvo_record *record) {
    *(record->previous != NULL ? &record->previous->next : &list->first) = record->next;
    *(record->next != NULL ? &record->next->previous : &list->last) = record->previous;
    list->count--;
}

static void move(kvo_list *from, kvo_list *to, kvo_record *record) {
    list_remove(from, record);
    list_add(to, record);
}

static bool is_io(const kvo_record *record) { return record->op.kind == KVO_READ || record->op.kind == KVO_WRITE; }

/* The block an operation is about. */
static kvo_block block_of(const kvo_engine *e, const kvo_op *op) {
    kvo_block block = {.generation = op->generation, .bytes = e->group_bytes[op->group], .key_len = op->key_len};
    memcpy(block.key, op->key, sizeof block.key);
    return block;
}

static kvo_store_file *file_of(kvo_engine *e, const kvo_record *record) {
    return &e->files[record->op.ssd_slot % e->file_count];
}

static uint32_t index_of(const kvo_engine *e, const kvo_record *record) { return record->op.ssd_slot / e->file_count; }

/* Counts an operation that begins (1) or ends (-1) to be in flight. */
static void count_io(kvo_engine *e, const kvo_record *record, int change) {
    kvo_store_file *files = file_of(e, record);
    *(record->op.kind == KVO_READ ? &e->reads : &e->writes) += (uint32_t)change;
    *(record->op.kind == KVO_READ ? &files->reads : &files->writes) += (uint32_t)change;
}

static void enqueue(kvo_engine *e, kvo_record *record) {
    list_add(&e->queued[record->op.kind], record);
    if (record->deadline < e->next_deadline) e->next_deadline = record->deadline;
}

static void complete(kvo_engine *e, const kvo_record *record, int32_t status) {
    uint64_t usec = kvo_now_us() - record->submitted;
    unsigned kind = record->op.kind;
    if (status == 0) {
        e->stats.ops[kind]++;
        e->stats.bytes[kind] += e->group_bytes[record->op.group];
        e->stats.usec[kind] += usec;
    } else {
        e->stats.failed[kind]++;
    }
    e->finished[e->finished_count++] = (kvo_completion){
        .id = record->op.id, .status = status, .usec = usec < UINT32_MAX ? (uint32_t)usec : UINT32_MAX};
}

static void release_memory(kvo_engine *e, kvo_record *record) {
    if (record->physical == KVO_NO_SLOT) return;
    if (record->op.kind == KVO_WRITE) e->slots.physical[record->physical].sealing = false;
    kvo_slots_release(&e->slots, record->physical);
    record->physical = KVO_NO_SLOT;
}

/* Completes the operation linked to this one, or lets it start. */
static void follow_link(kvo_engine *e, kvo_record *record, int32_t status) {
    kvo_record *next = record->linked;
    if (next == NULL) return;
    record->linked = NULL;
    if (status == 0) {
        if (record->op.dram_slot == KVO_NO_SLOT) { /* the staging memory goes with the block */
            next->physical = record->physical;
            record->physical = KVO_NO_SLOT;
        }
        enqueue(e, next);
    } else {
        complete(e, next, -ECANCELED);
        list_add(&e->unused, next);
    }
}

/* Ends an operation that is in `list` and that nothing works on any more. */
static void finish(kvo_engine *e, kvo_list *list, kvo_record *record, int32_t status) {
    complete(e, record, status);
    follow_link(e, record, status);
    release_memory(e, record);
    move(list, &e->unused, record);
}

/* Ends an operation for its caller while the kernel still works on it: record and memory stay aside. */
static void abandon(kvo_engine *e, kvo_record *record) {
    complete(e, record, -ETIMEDOUT);
    follow_link(e, record, -ETIMEDOUT);
    record->abandoned = true;
    move(&e->running, &e->abandoned, record);
}

/* ---- taking in what happened ---- */

static void take_one(kvo_engine *e, const kvo_submission *submission, kvo_record **waiting) {
    kvo_record *record = e->unused.first;
    list_remove(&e->unused, record);
    *record = (kvo_record){.op = submission->op, .submitted = submission->submitted, .physical = KVO_NO_SLOT};
    uint64_t timeout = record->op.timeout_us != 0 ? record->op.timeout_us : KVO_TIMEOUT_DEFAULT_US;
    record->deadline = kvo_later(record->submitted, timeout);
    if (record->op.flags & KVO_LINK) {
        *waiting = record;
        return;
    }
    kvo_record *first = *waiting;
    *waiting = NULL;
    if (first == NULL) {
        enqueue(e, record);
        return;
    }
    first->linked = record; /* a pair ends by the earlier of its two deadlines */
    if (record->deadline < first->deadline) first->deadline = record->deadline;
    enqueue(e, first);
}

static bool take_submissions(kvo_engine *e) {
    kvo_shared *shared = &e->shared;
    kvo_record *waiting = NULL; /* a batch has whole chains only */
    pthread_mutex_lock(&shared->lock);
    while (shared->submitted.count > 0) take_one(e, &shared->submissions[kvo_ring_pop(&shared->submitted)], &waiting);
    bool stop = shared->stop;
    e->slot_count = shared->slot_count;
    pthread_mutex_unlock(&shared->lock);
    return stop;
}

static int32_t read_status(kvo_engine *e, kvo_record *record) {
    if (record->io.result == -ENODATA) return -EBADMSG;
    if (record->io.result != 0) return record->io.result;
    kvo_block block = block_of(e, &record->op);
    e->summed += block.bytes;
    const uint8_t *memory = kvo_slots_memory(&e->slots, record->physical);
    if (!kvo_slot_verify(memory, &block, record->op.ssd_slot, e->fingerprint)) return -EBADMSG;
    kvo_slots_filled(&e->slots, record->physical, record->op.dram_slot, &block);
    return 0;
}

static void take_growth(kvo_engine *e, kvo_store_file *grown) {
    e->growths--;
    int32_t result = grown->growth.result;
    uint32_t needed = grown->needed;
    if (result == 0) grown->file.allocated = grown->reached;
    grown->needed = grown->wanted = 0;
    if (result == 0) return;
    for (kvo_record *record = e->queued[KVO_WRITE].first, *next; record != NULL; record = next) {
        next = record->next;
        if (file_of(e, record) == grown && index_of(e, record) + 1 >= needed) /* the ones before may fit */
            finish(e, &e->queued[KVO_WRITE], record, result);
    }
}

static void take_io(kvo_engine *e) {
    for (kvo_io *io; e->growths > 0 && (io = e->growers->reap(e->growers)) != NULL;) take_growth(e, io->owner);
    for (kvo_io *io; e->summed < TURN_BYTES && (io = e->io->reap(e->io)) != NULL;) {
        kvo_record *record = io->owner;
        count_io(e, record, -1);
        if (record->abandoned) {
            release_memory(e, record);
            move(&e->abandoned, &e->unused, record);
        } else {
            finish(e, &e->running, record, record->op.kind == KVO_READ ? read_status(e, record) : io->result);
        }
    }
}

static void take_copies(kvo_engine *e) {
    for (kvo_copy_job *job; (job = kvo_copy_reap(e->copy)) != NULL;) {
        kvo_record *record = job->owner;
        e->copies--;
        int32_t status = job->result;
        if (status == 0 && record->op.kind == KVO_COPY_OUT) {
            kvo_block block = block_of(e, &record->op);
            kvo_slots_filled(&e->slots, record->physical, record->op.dram_slot, &block);
        }
        finish(e, &e->running, record, status);
    }
}

static void expire(kvo_engine *e) {
    uint64_t now = kvo_now_us();
    if (now < e->next_deadline) return;
    e->next_deadline = UINT64_MAX;
    for (int kind = 0; kind < 4; kind++) {
        for (kvo_record *record = e->queued[kind].first, *next; record != NULL; record = next) {
            next = record->next;
            if (record->deadline <= now) finish(e, &e->queued[kind], record, -ETIMEDOUT);
            else if (record->deadline < e->next_deadline) e->next_deadline = record->deadline;
        }
    }
    for (kvo_record *record = e->running.first, *next; record != NULL; record = next) {
        next = record->next;
        if (!is_io(record)) continue; /* copies are short and waited for */
        if (record->deadline <= now) abandon(e, record);
        else if (record->deadline < e->next_deadline) e->next_deadline = record->deadline;
    }
}

/* ---- starting operations ---- */

static void start_copy(kvo_engine *e, kvo_record *record) {
    const kvo_op *op = &record->op;
    uint32_t first = e->first_region[op->group];
    record->copy = (kvo_copy_job){.regions = &e->regions[first],
                                  .region_count = e->first_region[op->group + 1] - first,
                                  .kv_block = op->kv_block,
                                  .out = op->kind == KVO_COPY_OUT,
                                  .payload = kvo_slots_memory(&e->slots, record->physical) + KVO_HEADER_BYTES,
                                  .owner = record};
    move(&e->queued[op->kind], &e->running, record);
    e->copies++;
    kvo_copy_start(e->copy, &record->copy);
}

static void start_copies_in(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_COPY_IN];
    while (queue->first != NULL && e->copies < KVO_COPY_DEPTH) {
        kvo_record *record = queue->first;
        if (record->physical == KVO_NO_SLOT) record->physical = kvo_slots_use(&e->slots, record->op.dram_slot);
        kvo_block block = block_of(e, &record->op);
        if (kvo_slots_hold(&e->slots, record->physical, &block)) start_copy(e, record);
        else finish(e, queue, record, -EBADMSG);
    }
}

static void start_copies_out(kvo_engine *e) {
    for (kvo_record *record = e->queued[KVO_COPY_OUT].first, *next; record != NULL && e->copies < KVO_COPY_DEPTH;
         record = next) {
        next = record->next;
        record->physical = kvo_slots_fill(&e->slots, record->op.dram_slot);
        if (record->physical != KVO_NO_SLOT) start_copy(e, record);
    }
}

static void start_io(kvo_engine *e, kvo_record *record, enum kvo_io_kind kind) {
    const kvo_file *file = &file_of(e, record)->file;
    record->io = (kvo_io){.kind = kind,
                          .fd = file->fd,
                          .buffer = kvo_slots_memory(&e->slots, record->physical),
                          .bytes = kvo_round_up(KVO_HEADER_BYTES + e->group_bytes[record->op.group], KVO_ALIGNMENT),
                          .offset = kvo_file_offset(file, index_of(e, record)),
                          .owner = record};
    move(&e->queued[record->op.kind], &e->running, record);
    count_io(e, record, 1);
    e->io->start(e->io, &record->io);
}

/* Whether an abandoned write may still land in the SSD slot. */
static bool is_haunted(const kvo_engine *e, uint32_t ssd_slot) {
    for (const kvo_record *record = e->abandoned.first; record != NULL; record = record->next)
        if (record->op.kind == KVO_WRITE && record->op.ssd_slot == ssd_slot) return true;
    return false;
}

static bool is_full(const kvo_engine *e, const kvo_store_file *files) {
    return files->reads + files->writes >= e->file_depth;
}

/* Writes in flight on one file at most. A write costs reads of the same drive only. */
static uint32_t writes_at_most(const kvo_engine *e, const kvo_store_file *files) {
    uint32_t most = e->file_depth / 2;
    if (files->reads + e->queued[KVO_READ].count > 0 && most > WRITES_BESIDE_READS) most = WRITES_BESIDE_READS;
    return most > 0 ? most : 1;
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
    return file_of(e, record)->reads < (most > 0 ? most : 1);
}

static void start_reads(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_READ];
    uint64_t full = 0;
    for (kvo_record *record = queue->first, *next; record != NULL; record = next) {
        if (e->reads + e->writes >= e->io->depth) return;
        next = record->next;
        if (record->op.ssd_slot >= e->slot_count) {
            finish(e, queue, record, -ENXIO);
        } else if (index_of(e, record) >= file_of(e, record)->file.allocated) {
            finish(e, queue, record, -EBADMSG);
        } else if (is_full(e, file_of(e, record))) {
            if (note_full(e, file_of(e, record), &full)) return;
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
    files->growth = (kvo_io){.kind = KVO_IO_CALL, .fd = -1, .call = grow_file, .owner = files};
    e->growths++;
    e->growers->start(e->growers, &files->growth);
}

static void start_write(kvo_engine *e, kvo_record *record) {
    kvo_block block = block_of(e, &record->op);
    record->physical = kvo_slots_use(&e->slots, record->op.dram_slot);
    e->slots.physical[record->physical].sealing = true;
    if (!kvo_slots_hold(&e->slots, record->physical, &block)) {
        finish(e, &e->queued[KVO_WRITE], record, -EBADMSG);
        return;
    }
    e->summed += block.bytes;
    kvo_slot_seal(kvo_slots_memory(&e->slots, record->physical), &block, record->op.ssd_slot, e->fingerprint);
    start_io(e, record, KVO_IO_WRITE);
}

static void start_writes(kvo_engine *e) {
    kvo_list *queue = &e->queued[KVO_WRITE];
    uint64_t full = 0;
    for (kvo_record *record = queue->first, *next; record != NULL; record = next) {
        if (e->reads + e->writes >= e->io->depth || e->summed >= TURN_BYTES) return;
        next = record->next;
        if (record->op.ssd_slot >= e->slot_count) {
            finish(e, queue, record, -ENXIO);
        } else if (index_of(e, record) >= file_of(e, record)->file.allocated) {
            grow(e, file_of(e, record), index_of(e, record));
        } else if (is_full(e, file_of(e, record)) ||
                   file_of(e, record)->writes >= writes_at_most(e, file_of(e, record))) {
            if (note_full(e, file_of(e, record), &full)) return;
        } else if (!is_haunted(e, record->op.ssd_slot) &&
                   !e->slots.physical[e->slots.of_dram[record->op.dram_slot]].sealing) {
            start_write(e, record);
        }
    }
}

/* ---- the loop ---- */

/* Hands completions and counts to the callers. */
static void publish(kvo_engine *e) {
    kvo_shared *shared = &e->shared;
    e->stats.queued = 0;
    for (int kind = 0; kind < 4; kind++) e->stats.queued += e->queued[kind].count;
    e->stats.in_flight = e->running.count;
    e->stats.abandoned = e->abandoned.count;
    pthread_mutex_lock(&shared->lock);
    for (uint32_t i = 0; i < e->finished_count; i++) shared->completions[kvo_ring_push(&shared->done)] = e->finished[i];
    shared->stats = e->stats;
    if (e->finished_count > 0) pthread_cond_broadcast(&shared->completed);
    pthread_mutex_unlock(&shared->lock);
    e->finished_count = 0;
}

static void sleep_until_kicked(kvo_engine *e, uint64_t until, bool flushed) {
    int timeout_ms = flushed ? -1 : RETRY_MS;
    if (e->summed >= TURN_BYTES) {
        timeout_ms = 0; /* there may be more to do */
    } else if (flushed && until != UINT64_MAX) {
        uint64_t now = kvo_now_us(), ms = until > now ? (until - now + 999) / 1000 : 0;
        timeout_ms = ms < INT_MAX ? (int)ms : INT_MAX;
    }
    struct pollfd kick = {.fd = e->kick_fd, .events = POLLIN};
    poll(&kick, 1, timeout_ms);
    eventfd_t kicks;
    eventfd_read(e->kick_fd, &kicks); /* non-blocking */
}

/* Lets what is in flight finish, for a while, and tells when that is over. */
static void drain(kvo_engine *e) {
    uint64_t end = kvo_later(kvo_now_us(), CLOSE_PATIENCE_US);
    while (e->reads + e->writes + e->growths + e->copies > 0 && kvo_now_us() < end) {
        bool flushed = e->io->flush(e->io);
        sleep_until_kicked(e, end, flushed);
        e->summed = 0;
        take_io(e);
        take_copies(e);
    }
    e->left_behind = e->reads + e->writes + e->growths > 0;
    pthread_mutex_lock(&e->shared.lock);
    e->shared.drained = true;
    pthread_cond_broadcast(&e->shared.completed);
    pthread_mutex_unlock(&e->shared.lock);
}

void *kvo_pump(void *engine) {
    kvo_engine *e = engine;
    e->next_deadline = UINT64_MAX;
    while (!take_submissions(e)) {
        e->summed = 0;
        take_io(e);
        take_copies(e);
        expire(e);
        /* In this order: what a step gives back, the later ones can use. */
        start_copies_in(e);
        start_reads(e);
        start_copies_out(e);
        start_writes(e);
        bool flushed = e->io->flush(e->io);
        publish(e);
        sleep_until_kicked(e, e->next_deadline, flushed);
    }
    drain(e);
    return NULL;
}
