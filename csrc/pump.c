/* pump.c - the thread that owns all operations: has them started in order of urgency, takes in what drives and copies
 * finished, lets the late ones go, and sleeps until there is something to do. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "pump.h"

#define TURN_BYTES (1u << 20)      /* verified before drives are looked after again, so that none runs dry */
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

void kvo_list_move(kvo_list *from, kvo_list *to, kvo_record *record) {
    list_remove(from, record);
    list_add(to, record);
}

static bool is_io(const kvo_record *record) { return record->op.kind == KVO_READ || record->op.kind == KVO_WRITE; }

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

void kvo_finish(kvo_engine *e, kvo_list *list, kvo_record *record, int32_t status) {
    complete(e, record, status);
    follow_link(e, record, status);
    release_memory(e, record);
    kvo_list_move(list, &e->unused, record);
}

/* Ends an operation for its caller while kernel or device still work on it: record and memory stay aside. */
static void abandon(kvo_engine *e, kvo_record *record) {
    complete(e, record, -ETIMEDOUT);
    follow_link(e, record, -ETIMEDOUT);
    record->abandoned = true;
    kvo_list_move(&e->running, &e->abandoned, record);
}

/* ---- taking in what happened ---- */

static void take_one(kvo_engine *e, const kvo_submission *submission, kvo_record **waiting) {
    kvo_record *record = e->unused.first;
    list_remove(&e->unused, record);
    *record = (kvo_record){.engine = e,
                           .op = submission->op,
                           .submitted = submission->submitted,
                           .fence = submission->fence,
                           .physical = KVO_NO_SLOT};
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
    kvo_block block = kvo_block_of(e, &record->op);
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
        if (kvo_file_of(e, record) == grown && kvo_index_of(e, record) + 1 >= needed) /* the ones before may fit */
            kvo_finish(e, &e->queued[KVO_WRITE], record, result);
    }
}

static void take_drives(kvo_engine *e, kvo_drives *drives) {
    uint64_t verified = 0; /* by this thread */
    for (kvo_io *io; verified < TURN_BYTES && (io = drives->reap(drives)) != NULL;) {
        kvo_record *record = io->owner;
        if (record->op.kind == KVO_READ && !drives->threaded) verified += io->bytes;
        kvo_count_io(e, record, -1);
        if (record->abandoned) {
            release_memory(e, record);
            kvo_list_move(&e->abandoned, &e->unused, record);
        } else {
            kvo_finish(e, &e->running, record, record->op.kind == KVO_READ ? read_status(e, record) : io->result);
        }
    }
    e->more = e->more || verified >= TURN_BYTES;
}

/* Takes in what wrote to kick_fd, too. What a kick announces (finished growths, buffered transfers and copies,
 * submissions) must be looked at after it was taken in: the next sleep does not see that kick any more. */
static void take_io(kvo_engine *e) {
    e->more = false;
    take_drives(e, e->io);
    for (kvo_io *io; e->growths > 0 && (io = e->growers->reap(e->growers)) != NULL;) take_growth(e, io->owner);
    if (e->slot_count != 0 && e->buffered != NULL) take_drives(e, e->buffered); /* slot_count publishes it */
}

static void take_copies(kvo_engine *e) {
    for (kvo_copy_job *job; (job = e->copier->reap(e->copier)) != NULL;) {
        kvo_record *record = job->owner;
        e->copies[record->op.kind]--;
        if (job->unsettled) record->physical = KVO_NO_SLOT; /* in use for good */
        if (record->abandoned) {
            release_memory(e, record);
            kvo_list_move(&e->abandoned, &e->unused, record);
            continue;
        }
        if (job->result == 0 && record->op.kind == KVO_COPY_OUT) {
            kvo_block block = kvo_block_of(e, &record->op);
            kvo_slots_filled(&e->slots, record->physical, record->op.dram_slot, &block);
        }
        kvo_finish(e, &e->running, record, job->result);
    }
}

/* Ends a running copy that is late, but not a COPY_IN that has begun: once that is complete the caller may give the KV
 * block to another, and nothing could keep the copy from writing to it then. */
static void end_late_copy(kvo_engine *e, kvo_record *record) {
    if (e->copier->withdraw(e->copier, &record->copy)) {
        e->copies[record->op.kind]--;
        kvo_finish(e, &e->running, record, -ETIMEDOUT);
    } else if (record->op.kind == KVO_COPY_OUT) {
        abandon(e, record);
    }
}

static void expire(kvo_engine *e) {
    uint64_t now = kvo_now_us();
    if (now < e->next_deadline) return;
    e->next_deadline = UINT64_MAX;
    for (int kind = 0; kind < 4; kind++) {
        for (kvo_record *record = e->queued[kind].first, *next; record != NULL; record = next) {
            next = record->next;
            if (record->deadline <= now) kvo_finish(e, &e->queued[kind], record, -ETIMEDOUT);
            else if (record->deadline < e->next_deadline) e->next_deadline = record->deadline;
        }
    }
    for (kvo_record *record = e->running.first, *next; record != NULL; record = next) {
        next = record->next;
        if (record->deadline > now) {
            if (record->deadline < e->next_deadline) e->next_deadline = record->deadline;
        } else if (is_io(record)) {
            abandon(e, record);
        } else {
            end_late_copy(e, record);
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

static void sleep_until(kvo_engine *e, uint64_t until) {
    uint64_t now = e->more || until == UINT64_MAX ? 0 : kvo_now_us();
    uint64_t timeout_us = e->more ? 0 : until == UINT64_MAX ? UINT64_MAX : until > now ? until - now : 0;
    e->io->wait(e->io, timeout_us);
}

/* Lets what is in flight finish, for a while, and tells when that is over. */
static void drain(kvo_engine *e) {
    uint64_t end = kvo_later(kvo_now_us(), CLOSE_PATIENCE_US);
    while (e->reads + e->writes + e->growths + e->copies[0] + e->copies[1] > 0 && kvo_now_us() < end) {
        sleep_until(e, end);
        take_io(e);
        take_copies(e);
    }
    e->left_behind = e->reads + e->writes + e->growths > 0;
    pthread_mutex_lock(&e->shared.lock);
    e->shared.drained = true;
    pthread_cond_broadcast(&e->shared.completed);
    pthread_mutex_unlock(&e->shared.lock);
}

/* Opens file I/O here because a ring belongs to one thread. */
static bool open_io(kvo_engine *e) {
    uint32_t depth = e->options.io_depth;
    if (e->options.io_backend == KVO_IO_THREADS) snprintf(e->io_reason, sizeof e->io_reason, "as asked");
    else e->io = kvo_io_uring_open(depth, e->kick_fd, e->io_reason, sizeof e->io_reason);
    if (e->io == NULL && e->options.io_backend != KVO_IO_URING) e->io = kvo_io_threads_open(depth, e->kick_fd);
    pthread_mutex_lock(&e->shared.lock);
    e->shared.started = true;
    pthread_cond_broadcast(&e->shared.completed);
    pthread_mutex_unlock(&e->shared.lock);
    return e->io != NULL;
}

void *kvo_pump(void *engine) {
    kvo_engine *e = engine;
    pthread_setname_np(pthread_self(), "kvo-pump");
    if (!open_io(e)) return NULL;
    e->next_deadline = UINT64_MAX;
    for (;;) {
        take_io(e);
        take_copies(e);
        if (take_submissions(e)) break;
        expire(e);
        /* In this order: what a step gives back, the later ones can use. */
        kvo_start_copies_in(e);
        kvo_start_reads(e);
        kvo_start_copies_out(e);
        kvo_start_writes(e);
        publish(e);
        if (kvo_seal_ahead(e)) continue;
        sleep_until(e, e->next_deadline);
    }
    drain(e);
    return NULL;
}
