/* io_fault.c - faulty drives and copies: stands between the pump and the backends of io.h and copy.h, in a build of the
 * engine for tests. The linker puts it there (--wrap; see faulty.py). The file named by KVO_FAULTS says what goes wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io_fault.h"
#include "pump.h"

#define SECTOR 512u
#define SLICE_US 1000u       /* how often it is looked after what waits */
#define LONG_SLICE_US 10000u /* the same if that waits for long: each look takes time from what a benchmark measures */
#define LONG_US 1000000u

kvo_drives *__real_kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes);
kvo_drives *__real_kvo_io_threads_open(uint32_t depth, int kick_fd);
bool __real_kvo_io_advance(kvo_io *io, int64_t outcome);
kvo_copier *__real_kvo_copy_host_open(int kick_fd);
void *__real_kvo_pump(void *engine);

/* ---- the plan ---- */

static fault_plan no_faults;

static fault_plan *open_plan(void) {
    const char *path = getenv("KVO_FAULTS");
    if (path == NULL) return &no_faults;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    fault_plan *plan = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (plan == MAP_FAILED) {
        fprintf(stderr, "KVO_FAULTS=%s: %s\n", path, strerror(errno));
        abort();
    }
    close(fd);
    return plan;
}

static void close_plan(fault_plan *plan) {
    if (plan != &no_faults) munmap(plan, sizeof *plan);
}

static void count(uint64_t *counter, int64_t change) { __atomic_add_fetch(counter, (uint64_t)change, __ATOMIC_SEQ_CST); }

static bool is_concerned(const fault_plan *plan, int fd) {
    struct stat file;
    if (plan->inode == 0 || fd < 0) return true;
    return fstat(fd, &file) == 0 && file.st_ino == plan->inode && file.st_dev == plan->device;
}

/* ---- requests ---- */

/* What was decided about a request, and where it is. */
typedef struct request {
    struct request *next;
    fault_kind *kind;
    enum fault fault; /* FAULTS: none */
    bool waits, queued;
    bool answered;         /* ended without the backend */
    uint64_t due, unlike;  /* it waits until then, or until plan->released is not this */
    uint64_t random;       /* for what else there is to choose */
} request;

static uint64_t scramble(uint64_t number) {
    number += 0x9e3779b97f4a7c15u;
    number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9u;
    number = (number ^ (number >> 27)) * 0x94d049bb133111ebu;
    return number ^ (number >> 31);
}

static uint64_t draw(request *it, uint64_t below) {
    it->random = scramble(it->random);
    return it->random % below;
}

/* One of the faults first .. end - 1, or FAULTS. */
static enum fault draw_fault(request *it, unsigned first, unsigned end) {
    uint64_t number = draw(it, 65536);
    for (unsigned fault = first; fault < end; fault++) {
        if (number < it->kind->chance[fault]) return fault;
        number -= it->kind->chance[fault];
    }
    return FAULTS;
}

static bool is_scripted(fault_kind *kind) {
    uint32_t left = __atomic_load_n(&kind->scripted, __ATOMIC_SEQ_CST);
    while (left > 0)
        if (__atomic_compare_exchange_n(&kind->scripted, &left, left - 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return true;
    return false;
}

static uint64_t due(fault_kind *kind) {
    uint64_t now = kvo_now_us(), begin, end, free_at = __atomic_load_n(&kind->free_at, __ATOMIC_SEQ_CST);
    if (!kind->in_turn) return kvo_later(now, kind->stall_us);
    do {
        begin = free_at > now ? free_at : now;
        end = kvo_later(begin, kind->stall_us);
    } while (!__atomic_compare_exchange_n(&kind->free_at, &free_at, end, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return end;
}

static void decide(request *it, fault_plan *plan, int number, int fd) {
    fault_kind *kind = it->kind = &plan->kinds[number];
    it->fault = FAULTS;
    it->unlike = __atomic_load_n(&plan->released, __ATOMIC_SEQ_CST); /* before the chances: who heals sets those first */
    it->random = scramble(kind->seed) + __atomic_fetch_add(&kind->requests, 1, __ATOMIC_SEQ_CST);
    if (!is_concerned(plan, fd)) return;
    enum fault wait = FAULTS;
    if (!is_scripted(kind)) {
        it->fault = draw_fault(it, 0, FAULT_STALL);
        wait = draw_fault(it, FAULT_STALL, FAULTS);
    } else if (kind->script >= FAULT_STALL) {
        wait = kind->script;
    } else {
        it->fault = kind->script;
    }
    if (it->fault != FAULTS) count(&kind->injected[it->fault], 1);
    if (wait == FAULTS) return;
    it->waits = true;
    it->queued = wait == FAULT_QUEUED;
    it->due = due(kind);
    count(&kind->injected[wait], 1);
    count(&kind->waiting, 1);
}

static void put(request **list, request *it) {
    it->next = *list;
    *list = it;
}

static request *take(request **list) {
    request *it = *list;
    if (it != NULL) *list = it->next;
    return it;
}

static void end_wait(request **at) {
    request *it = take(at);
    it->waits = false;
    count(&it->kind->waiting, -1);
}

/* A request that waited long enough, or NULL. */
static request *take_due(request **waiting, const fault_plan *plan) {
    if (*waiting == NULL) return NULL;
    uint64_t now = kvo_now_us(), released = __atomic_load_n(&plan->released, __ATOMIC_SEQ_CST);
    for (request **at = waiting; *at != NULL; at = &(*at)->next) {
        request *it = *at;
        if (it->due > now && it->unlike == released) continue;
        end_wait(at);
        return it;
    }
    return NULL;
}

/* ---- deadlines ---- */

static __thread kvo_engine *pumped; /* by this thread; what follows looks at what is the pump's own */

void *__wrap_kvo_pump(void *engine) {
    pumped = engine;
    return __real_kvo_pump(engine);
}

static void have_pass(kvo_list *list) {
    for (kvo_record *record = list->first; record != NULL; record = record->next)
        if (record->op.timeout_us != 0 && record->op.timeout_us != UINT64_MAX) record->deadline = 0;
}

static void have_deadlines_pass(void) {
    for (int kind = 0; kind < 4; kind++) have_pass(&pumped->queued[kind]);
    have_pass(&pumped->running);
    pumped->next_deadline = 0;
}

/* Operations whose deadline had come when the pump last awoke, or is nearer than it is about to sleep.
 * Of COPY_INs that have begun the end is waited for. */
static uint64_t overdue_in(const kvo_list *list, uint64_t awoke, uint64_t timeout_us) {
    uint64_t found = 0;
    for (const kvo_record *record = list->first; record != NULL; record = record->next) {
        bool is_awaited = list == &pumped->running && record->op.kind == KVO_COPY_IN;
        if (!is_awaited && record->deadline < kvo_later(awoke, timeout_us)) found++;
    }
    return found;
}

static uint64_t count_overdue(uint64_t awoke, uint64_t timeout_us) {
    pthread_mutex_lock(&pumped->shared.lock);
    bool stop = pumped->shared.stop;
    pthread_mutex_unlock(&pumped->shared.lock);
    if (stop) return 0; /* nobody is told of what ends any more */
    uint64_t found = overdue_in(&pumped->running, awoke, timeout_us);
    for (int kind = 0; kind < 4; kind++) found += overdue_in(&pumped->queued[kind], awoke, timeout_us);
    return found;
}

/* ---- drives ---- */

typedef struct {
    kvo_drives face;
    kvo_drives *drives;
    fault_plan *plan;
    int kick_fd;
    request *waiting, *answered;
    uint64_t passed, awoke; /* of the plan, as last seen; when the pump's last sleep ended */
} faulty_drives;

typedef struct {
    request request; /* first */
    kvo_io inner;    /* what the backend works on instead of `outer` */
    kvo_io *outer;
    uint8_t *bent; /* what is written instead of the slot */
    bool worked;
    uint32_t again;
} faulty_io;

static const kvo_file *file_of(const kvo_io *io) {
    if (io->kind == KVO_IO_CALL) return &((kvo_store_file *)io->owner)->file;
    kvo_record *record = io->owner;
    return &kvo_file_of(record->engine, record)->file;
}

/* Half of the flips hit what a header says, which is a small part of a slot. */
static void flip(faulty_io *it, uint8_t *slot) {
    uint64_t bytes = draw(&it->request, 2) ? it->inner.bytes : 128;
    slot[draw(&it->request, bytes)] ^= (uint8_t)(1u << draw(&it->request, 8));
}

/* The slot as a fault writes it, in memory of its own: the DRAM slot is right and stays so. */
static void bend(faulty_io *it) {
    kvo_io *io = &it->inner;
    bool torn = it->request.fault == FAULT_TORN || it->request.fault == FAULT_TORN_ERROR;
    if (!torn && it->request.fault != FAULT_FLIP) return;
    uint64_t right = torn ? SECTOR * draw(&it->request, io->bytes / SECTOR) : io->bytes;
    it->bent = aligned_alloc(KVO_ALIGNMENT, io->bytes);
    if (it->bent == NULL) abort();
    if (right < io->bytes && pread(io->fd, it->bent, io->bytes, (off_t)io->offset) < 0) memset(it->bent, 0, io->bytes);
    memcpy(it->bent, io->buffer, right);
    if (it->request.fault == FAULT_FLIP) flip(it, it->bent);
    io->buffer = it->bent;
}

static int32_t faulty_work(void *owner) {
    faulty_io *it = owner;
    kvo_io *io = it->outer;
    if (io->kind == KVO_IO_READ && it->request.fault == FAULT_FLIP) flip(it, io->buffer);
    if (io->kind != KVO_IO_WRITE) return io->work(io->owner);
    if (it->worked) return 0; /* a first transfer that was answered EAGAIN is made anew */
    it->worked = true;
    if (io->work != NULL) io->work(io->owner);
    bend(it);
    return 0;
}

/* How far the next transfer goes: AGAIN moves nothing, SHORT leaves something out. */
static void limit(faulty_io *it) {
    uint64_t done = it->inner.done, pages = (it->outer->bytes - done - 1) / KVO_ALIGNMENT;
    it->inner.bytes = it->outer->bytes;
    if (it->request.fault == FAULT_AGAIN && it->again < 3) it->inner.bytes = done;
    if (it->request.fault == FAULT_SHORT && pages > 0)
        it->inner.bytes = done + KVO_ALIGNMENT * (1 + draw(&it->request, pages));
}

bool __wrap_kvo_io_advance(kvo_io *io, int64_t outcome) {
    if (io->work != faulty_work) return __real_kvo_io_advance(io, outcome);
    faulty_io *it = io->owner;
    if (io->bytes == io->done && outcome == 0) {
        it->again++;
        outcome = -EAGAIN;
    }
    io->bytes = it->outer->bytes;
    bool finished = __real_kvo_io_advance(io, outcome);
    if (!finished) limit(it);
    return finished;
}

static void misdirect(faulty_io *it) {
    const kvo_file *file = file_of(it->outer);
    if (file->allocated < 2) return;
    uint32_t right = (uint32_t)((it->inner.offset - KVO_SUPERBLOCK_BYTES) / file->slot_bytes);
    uint64_t step = 1 + draw(&it->request, file->allocated - 1);
    it->inner.offset = kvo_file_offset(file, (uint32_t)((right + step) % file->allocated));
}

static void begin_io(faulty_drives *self, faulty_io *it) {
    request *request = &it->request;
    if (request->fault != FAULT_ERROR && request->fault != FAULT_LOST) {
        self->drives->start(self->drives, &it->inner);
        return;
    }
    it->inner.result = request->fault == FAULT_ERROR ? -(int32_t)request->kind->error : 0;
    request->answered = true;
    put(&self->answered, request);
    eventfd_write(self->kick_fd, 1);
}

static void drives_start(kvo_drives *face, kvo_io *io) {
    static const int numbers[] = {[KVO_IO_READ] = FAULTY_READ, [KVO_IO_WRITE] = FAULTY_WRITE, [KVO_IO_CALL] = FAULTY_GROW};
    faulty_drives *self = (faulty_drives *)face;
    faulty_io *it = calloc(1, sizeof *it);
    if (it == NULL) abort();
    decide(&it->request, self->plan, numbers[io->kind], file_of(io)->fd);
    it->outer = io;
    it->inner = *io;
    it->inner.owner = it;
    it->inner.work = faulty_work;
    if (it->request.fault == FAULT_MISDIRECT) misdirect(it);
    if (io->kind != KVO_IO_CALL) limit(it);
    if (it->request.waits) put(&self->waiting, &it->request);
    else begin_io(self, it);
}

static kvo_io *drives_reap(kvo_drives *face) {
    faulty_drives *self = (faulty_drives *)face;
    uint64_t passed = __atomic_load_n(&self->plan->passed, __ATOMIC_SEQ_CST);
    if (face == pumped->io) { /* else a pool's beside it */
        if (passed != self->passed) have_deadlines_pass();
        self->passed = passed;
    }
    for (request *due; (due = take_due(&self->waiting, self->plan)) != NULL;) begin_io(self, (faulty_io *)due);
    faulty_io *it = (faulty_io *)take(&self->answered);
    if (it == NULL) {
        kvo_io *inner = self->drives->reap(self->drives);
        if (inner == NULL) return NULL;
        it = inner->owner;
    }
    kvo_io *io = it->outer;
    io->result = it->inner.result;
    if (it->request.fault == FAULT_TORN_ERROR && io->result == 0) io->result = -(int32_t)it->request.kind->error;
    free(it->bent);
    free(it);
    return io;
}

/* The pump waits for all drives and copies by this one's. */
static void drives_wait(kvo_drives *face, uint64_t timeout_us) {
    faulty_drives *self = (faulty_drives *)face;
    uint64_t slice_us = timeout_us;
    __atomic_store_n(&self->plan->turned, self->passed, __ATOMIC_SEQ_CST);
    count(&self->plan->overdue, (int64_t)count_overdue(self->awoke, timeout_us));
    for (int i = 0; i < FAULTY_KINDS; i++) {
        const fault_kind *kind = &self->plan->kinds[i];
        uint64_t most_us = kind->stall_us < LONG_US ? SLICE_US : LONG_SLICE_US;
        if (__atomic_load_n(&kind->waiting, __ATOMIC_SEQ_CST) > 0 && most_us < slice_us) slice_us = most_us;
    }
    self->drives->wait(self->drives, slice_us);
    self->awoke = kvo_now_us();
}

static void drives_close(kvo_drives *face) {
    faulty_drives *self = (faulty_drives *)face;
    self->drives->close(self->drives);
    close_plan(self->plan);
    free(self);
}

static kvo_drives *faulty(kvo_drives *drives, int kick_fd) {
    if (drives == NULL) return NULL;
    faulty_drives *self = calloc(1, sizeof *self);
    if (self == NULL) abort();
    self->face = (kvo_drives){.name = drives->name,
                              .depth = drives->depth,
                              .threaded = drives->threaded,
                              .start = drives_start,
                              .reap = drives_reap,
                              .wait = drives_wait,
                              .close = drives_close};
    self->drives = drives;
    self->plan = open_plan();
    self->passed = self->plan->passed;
    self->kick_fd = kick_fd;
    return &self->face;
}

kvo_drives *__wrap_kvo_io_uring_open(uint32_t depth, int kick_fd, char *reason, uint32_t reason_bytes) {
    return faulty(__real_kvo_io_uring_open(depth, kick_fd, reason, reason_bytes), kick_fd);
}

kvo_drives *__wrap_kvo_io_threads_open(uint32_t depth, int kick_fd) {
    return faulty(__real_kvo_io_threads_open(depth, kick_fd), kick_fd);
}

/* ---- copies ---- */

typedef struct {
    kvo_copier face;
    kvo_copier *copier;
    fault_plan *plan;
    int kick_fd;
    request *waiting, *answered;
} faulty_copier;

typedef struct {
    request request; /* first */
    kvo_copy_job inner, *outer;
} faulty_copy;

static void begin_copy(faulty_copier *self, faulty_copy *it) {
    if (it->request.fault != FAULT_ERROR) {
        self->copier->start(self->copier, &it->inner);
        return;
    }
    if (it->inner.out) memset(it->inner.payload, 0xa5, it->inner.regions[0].bytes / 2); /* it failed half-way */
    it->inner.result = -(int32_t)it->request.kind->error;
    it->request.answered = true;
    put(&self->answered, &it->request);
    eventfd_write(self->kick_fd, 1);
}

static void copier_start(kvo_copier *face, kvo_copy_job *job) {
    faulty_copier *self = (faulty_copier *)face;
    faulty_copy *it = calloc(1, sizeof *it);
    if (it == NULL) abort();
    decide(&it->request, self->plan, job->out ? FAULTY_COPY_OUT : FAULTY_COPY_IN, -1);
    it->outer = job;
    it->inner = *job;
    it->inner.owner = it;
    job->next = &it->inner; /* the backend's, which this is */
    if (it->request.waits) put(&self->waiting, &it->request);
    else begin_copy(self, it);
}

static bool copier_withdraw(kvo_copier *face, kvo_copy_job *job) {
    faulty_copier *self = (faulty_copier *)face;
    faulty_copy *it = job->next->owner;
    if (it->request.answered || (it->request.waits && !it->request.queued)) return false;
    if (it->request.waits) {
        request **at = &self->waiting;
        while (*at != &it->request) at = &(*at)->next;
        end_wait(at);
    } else if (!self->copier->withdraw(self->copier, &it->inner)) {
        return false;
    }
    free(it);
    return true;
}

static kvo_copy_job *copier_reap(kvo_copier *face) {
    faulty_copier *self = (faulty_copier *)face;
    for (request *due; (due = take_due(&self->waiting, self->plan)) != NULL;) begin_copy(self, (faulty_copy *)due);
    faulty_copy *it = (faulty_copy *)take(&self->answered);
    if (it == NULL) {
        kvo_copy_job *inner = self->copier->reap(self->copier);
        if (inner == NULL) return NULL;
        it = inner->owner;
    }
    kvo_copy_job *job = it->outer;
    job->result = it->inner.result;
    job->unsettled = it->inner.unsettled;
    free(it);
    return job;
}

static uint64_t copier_fence(kvo_copier *face, uint64_t stream) {
    faulty_copier *self = (faulty_copier *)face;
    return self->copier->fence(self->copier, stream);
}

static void copier_describe(kvo_copier *face, char *out, size_t bytes) {
    faulty_copier *self = (faulty_copier *)face;
    self->copier->describe(self->copier, out, bytes);
}

static bool copier_close(kvo_copier *face) {
    faulty_copier *self = (faulty_copier *)face;
    if (self->waiting != NULL || !self->copier->close(self->copier)) return false;
    close_plan(self->plan);
    free(self);
    return true;
}

kvo_copier *__wrap_kvo_copy_host_open(int kick_fd) {
    kvo_copier *copier = __real_kvo_copy_host_open(kick_fd);
    if (copier == NULL) return NULL;
    faulty_copier *self = calloc(1, sizeof *self);
    if (self == NULL) abort();
    self->face = (kvo_copier){.depth = copier->depth,
                              .fence = copier_fence,
                              .start = copier_start,
                              .withdraw = copier_withdraw,
                              .reap = copier_reap,
                              .describe = copier_describe,
                              .close = copier_close};
    self->copier = copier;
    self->plan = open_plan();
    self->kick_fd = kick_fd;
    return &self->face;
}
