/* engine.c - the face: opening and closing, and the calls that hand operations to the pump and completions back. */
#include "engine.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

_Static_assert(sizeof(kvo_op) == 88, "OP_DTYPE in kvoffload/types.py mirrors this");
_Static_assert(sizeof(kvo_completion) == 16, "COMPLETION_DTYPE in kvoffload/types.py mirrors this");

__attribute__((format(printf, 3, 4))) static int fail(char err[KVO_ERR_BYTES], int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(err, KVO_ERR_BYTES, format, arguments);
    va_end(arguments);
    return -error;
}

/* ---- opening ---- */

static int check_options(const kvo_options *options, char err[KVO_ERR_BYTES]) {
    if (options->payload_bytes == 0 || options->payload_bytes > (1ull << 40))
        return fail(err, EINVAL, "payload_bytes is %llu, expected 1 .. 2^40",
                    (unsigned long long)options->payload_bytes);
    if (options->spare_slots == 0) return fail(err, EINVAL, "spare_slots is 0, expected at least 1");
    if ((uint64_t)options->dram_slots + options->spare_slots >= KVO_NO_SLOT)
        return fail(err, EINVAL, "dram_slots and spare_slots add up to more than 2^32 - 2");
    if (options->max_ops < 2 || options->max_ops > (1u << 24))
        return fail(err, EINVAL, "max_ops is %u, expected 2 .. 2^24", options->max_ops);
    if (options->io_depth == 0 || options->io_depth > 4096)
        return fail(err, EINVAL, "io_depth is %u, expected 1 .. 4096", options->io_depth);
    if (options->io_backend < KVO_IO_AUTO || options->io_backend > KVO_IO_THREADS)
        return fail(err, EINVAL, "io_backend is %d, expected 0 .. 2", options->io_backend);
    if (options->device < KVO_NO_DEVICE)
        return fail(err, EINVAL, "device is %d, expected a CUDA device's number or -1", options->device);
    return 0;
}

static int open_shared(kvo_shared *shared, uint32_t max_ops) {
    shared->submissions = calloc(max_ops, sizeof *shared->submissions);
    shared->completions = calloc(max_ops, sizeof *shared->completions);
    shared->submitted.capacity = shared->done.capacity = max_ops;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&shared->completed, &clock);
    pthread_condattr_destroy(&clock);
    pthread_mutex_init(&shared->lock, NULL);
    return shared->submissions == NULL || shared->completions == NULL ? -ENOMEM : 0;
}

/* Abandoned operations keep their records, so there are more than operations: for all reads, writes and COPY_OUTs that
 * can be in flight. */
static int open_records(kvo_engine *e) {
    uint32_t count = e->options.max_ops + e->options.io_depth + e->copier->depth;
    e->records = calloc(count, sizeof *e->records);
    e->finished = calloc(e->options.max_ops, sizeof *e->finished);
    if (e->records == NULL || e->finished == NULL) return -ENOMEM;
    for (uint32_t i = 0; i < count; i++) {
        e->records[i].previous = i > 0 ? &e->records[i - 1] : NULL;
        e->records[i].next = i + 1 < count ? &e->records[i + 1] : NULL;
    }
    e->unused = (kvo_list){.first = &e->records[0], .last = &e->records[count - 1], .count = count};
    return 0;
}

static int open_copier(kvo_engine *e, char err[KVO_ERR_BYTES]) {
    if (e->options.device != KVO_NO_DEVICE) {
        kvo_copy_memory memory = {e->slots.arena.base, e->slots.arena.bytes, e->slots.slot_bytes};
        return kvo_copy_cuda_open(&e->copier, e->options.device, &memory, e->kick_fd, err);
    }
    e->copier = kvo_copy_host_open(e->kick_fd);
    return e->copier == NULL ? fail(err, EAGAIN, "the copy thread could not be started") : 0;
}

static int open_parts(kvo_engine *e, char err[KVO_ERR_BYTES]) {
    const kvo_options *options = &e->options;
    uint64_t slot_bytes = kvo_round_up(KVO_HEADER_BYTES + options->payload_bytes, KVO_ALIGNMENT);
    uint64_t slots = (uint64_t)options->dram_slots + options->spare_slots;
    if (slots > (UINT64_MAX >> 2) / slot_bytes) return fail(err, ENOMEM, "the arena would exceed the address space");
    e->kick_fd = eventfd(0, EFD_CLOEXEC);
    if (e->kick_fd < 0) return fail(err, errno, "eventfd: %s", strerror(errno));
    int status = kvo_slots_open(&e->slots, slot_bytes, options->dram_slots, options->spare_slots);
    if (status != 0)
        return fail(err, -status, "an arena of %llu slots of %llu bytes cannot be mapped: %s",
                    (unsigned long long)slots, (unsigned long long)slot_bytes, strerror(-status));
    e->stats.arena_bytes = e->slots.arena.bytes;
    e->shared.stats = e->stats;
    status = open_copier(e, err);
    if (status != 0) return status;
    if (open_records(e) != 0) return fail(err, ENOMEM, "no memory for %u operations", options->max_ops);
    return 0;
}

/* Frees what was opened, from the last to the first. The pump does not run. */
static void close_parts(kvo_engine *e) {
    bool device_is_done = e->copier == NULL || e->copier->close(e->copier);
    if (e->left_behind) return; /* the kernel, or a thread in it, still uses the rest */
    if (e->io != NULL) e->io->close(e->io);
    if (e->buffered != NULL) e->buffered->close(e->buffered);
    if (e->growers != NULL) e->growers->close(e->growers);
    for (uint32_t i = 0; i < e->file_count; i++) kvo_file_close(&e->files[i].file);
    if (!device_is_done) return;
    kvo_slots_close(&e->slots);
    if (e->kick_fd >= 0) close(e->kick_fd);
    pthread_cond_destroy(&e->shared.completed);
    pthread_mutex_destroy(&e->shared.lock);
    free(e->shared.submissions);
    free(e->shared.completions);
    free(e->records);
    free(e->finished);
    free(e->regions);
    free(e->first_region);
    free(e->group_bytes);
    free(e);
}

static int start_pump(kvo_engine *e, char err[KVO_ERR_BYTES]) {
    int error = pthread_create(&e->pump, NULL, kvo_pump, e);
    if (error != 0) return fail(err, error, "the engine's thread could not be started: %s", strerror(error));
    pthread_mutex_lock(&e->shared.lock);
    while (!e->shared.started) pthread_cond_wait(&e->shared.completed, &e->shared.lock);
    pthread_mutex_unlock(&e->shared.lock);
    if (e->io != NULL) return 0;
    pthread_join(e->pump, NULL);
    if (e->options.io_backend == KVO_IO_URING)
        return fail(err, ENOTSUP, "io_uring cannot be used (%s); io_backend \"auto\" or \"threads\" can", e->io_reason);
    return fail(err, EAGAIN, "the threads for file I/O could not be started");
}

int kvo_open(kvo_engine **engine, const kvo_options *options, char err[KVO_ERR_BYTES]) {
    *engine = NULL;
    int status = check_options(options, err);
    if (status != 0) return status;
    kvo_engine *e = calloc(1, sizeof *e);
    if (e == NULL) return fail(err, ENOMEM, "no memory for an engine");
    e->options = *options;
    e->kick_fd = -1;
    status = open_shared(&e->shared, options->max_ops) != 0
                 ? fail(err, ENOMEM, "no memory for %u operations", options->max_ops)
                 : open_parts(e, err);
    if (status == 0) status = start_pump(e, err);
    if (status != 0) {
        close_parts(e);
        return status;
    }
    *engine = e;
    return 0;
}

void kvo_close(kvo_engine *e) {
    kvo_shared *shared = &e->shared;
    pthread_mutex_lock(&shared->lock);
    shared->stop = true;
    eventfd_write(e->kick_fd, 1);
    while (!shared->drained) pthread_cond_wait(&shared->completed, &shared->lock);
    pthread_mutex_unlock(&shared->lock);
    /* The kernel ends a thread only after the last I/O that io_uring does in its name: with a drive that does not
     * answer, a join would not return. */
    if (e->left_behind) pthread_detach(e->pump);
    else pthread_join(e->pump, NULL);
    close_parts(e);
}

/* ---- telling where the KV cache and the files are ---- */

static int check_regions(const kvo_engine *e, const kvo_region *regions, const uint32_t *first, uint32_t groups,
                         char err[KVO_ERR_BYTES]) {
    if (e->groups != 0) return fail(err, EINVAL, "the KV cache is bound already");
    if (groups == 0 || groups > UINT16_MAX) return fail(err, EINVAL, "%u groups, expected 1 .. 65535", groups);
    for (uint32_t g = 0; g < groups; g++) /* all of them first: only if they ascend, all lie below the last */
        if (first[g + 1] <= first[g]) return fail(err, EINVAL, "group %u has no regions", g);
    for (uint32_t g = 0; g < groups; g++) {
        uint64_t sum = 0;
        for (uint32_t i = first[g]; i < first[g + 1]; i++) {
            const kvo_region *region = &regions[i];
            if (region->base == 0 || region->bytes == 0 || region->bytes > e->options.payload_bytes)
                return fail(err, EINVAL, "region %u of group %u is empty or larger than a slot's payload", i - first[g],
                            g);
            sum += region->bytes;
            if (sum > e->options.payload_bytes)
                return fail(err, EINVAL, "group %u has more than %llu bytes a block, the payload of a slot", g,
                            (unsigned long long)e->options.payload_bytes);
        }
    }
    return 0;
}

int kvo_bind(kvo_engine *e, const kvo_region *regions, const uint32_t *first, uint32_t groups,
             char err[KVO_ERR_BYTES]) {
    int status = check_regions(e, regions, first, groups, err);
    if (status != 0) return status;
    uint32_t count = first[groups] - first[0];
    e->regions = calloc(count, sizeof *e->regions);
    e->first_region = calloc(groups + 1, sizeof *e->first_region);
    e->group_bytes = calloc(groups, sizeof *e->group_bytes);
    if (e->regions == NULL || e->first_region == NULL || e->group_bytes == NULL)
        return fail(err, ENOMEM, "no memory for %u regions", count);
    memcpy(e->regions, regions + first[0], count * sizeof *regions);
    for (uint32_t g = 0; g < groups; g++) {
        for (uint32_t i = first[g]; i < first[g + 1]; i++) e->group_bytes[g] += regions[i].bytes;
        e->first_region[g + 1] = first[g + 1] - first[0];
    }
    e->groups = groups;
    return 0;
}

static void close_files(kvo_engine *e, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) kvo_file_close(&e->files[i].file);
}

/* Opens the threads that files need, and gives each file the drives that serve it. Buffered I/O is copying, which
 * io_uring would do on the pump's thread; a pool shares it among processors. */
static bool open_drives(kvo_engine *e, uint32_t count) {
    bool direct = true;
    for (uint32_t i = 0; i < count; i++) direct = direct && e->files[i].file.direct;
    e->growers = kvo_io_threads_open(count, e->kick_fd);
    if (!direct && !e->io->threaded) e->buffered = kvo_io_threads_open(e->options.io_depth, e->kick_fd);
    if (e->growers == NULL || (!direct && !e->io->threaded && e->buffered == NULL)) return false;
    for (uint32_t i = 0; i < count; i++) {
        kvo_store_file *files = &e->files[i];
        files->drives = files->file.direct || e->io->threaded ? e->io : e->buffered;
        files->depth = files->drives->depth > count ? files->drives->depth / count : 1;
    }
    return true;
}

int kvo_attach(kvo_engine *e, const char *const *paths, uint32_t count, uint32_t own_directories, uint32_t slot_count,
               const uint8_t fingerprint[KVO_FINGERPRINT_BYTES], char err[KVO_ERR_BYTES]) {
    if (e->file_count != 0) return fail(err, EINVAL, "slot files are attached already");
    if (count == 0 || count > KVO_FILES_MAX)
        return fail(err, EINVAL, "%u slot files, expected 1 .. %u", count, KVO_FILES_MAX);
    if (slot_count < count || slot_count == KVO_NO_SLOT)
        return fail(err, EINVAL, "%u slots on %u files, expected at least one a file", slot_count, count);
    memcpy(e->fingerprint, fingerprint, KVO_FINGERPRINT_BYTES);
    for (uint32_t i = 0; i < count; i++) {
        kvo_expected expected = {e->options.payload_bytes, i, count, e->fingerprint, own_directories};
        uint32_t slots = slot_count / count + (i < slot_count % count);
        int status = kvo_file_open(&e->files[i].file, paths[i], &expected, slots, err);
        if (status != 0) {
            close_files(e, i);
            return status;
        }
    }
    if (!open_drives(e, count)) {
        close_files(e, count);
        return fail(err, EAGAIN, "the threads for slot files could not be started");
    }
    e->file_count = count;
    pthread_mutex_lock(&e->shared.lock);
    e->shared.slot_count = slot_count;
    pthread_mutex_unlock(&e->shared.lock);
    return 0;
}

/* ---- operations and completions ---- */

static bool is_pair(const kvo_op *read, const kvo_op *copy) {
    return read->kind == KVO_READ && copy->kind == KVO_COPY_IN && copy->flags == 0 &&
           read->dram_slot == copy->dram_slot;
}

/* `after`: the operation before it, if that is linked to it. */
static bool is_well_formed(const kvo_engine *e, const kvo_op *op, const kvo_op *after) {
    if (op->kind > KVO_READ || (op->flags & ~KVO_LINK) != 0 || op->group >= e->groups) return false;
    if (op->key_len == 0 || op->key_len > KVO_KEY_BYTES) return false;
    for (uint32_t i = op->key_len; i < KVO_KEY_BYTES; i++)
        if (op->key[i] != 0) return false;
    if (after != NULL && !is_pair(after, op)) return false;
    bool in_pair = after != NULL || op->flags == KVO_LINK;
    if (op->flags == KVO_LINK && op->kind != KVO_READ) return false;
    bool may_stage = in_pair || op->kind == KVO_READ;
    if (op->dram_slot >= e->options.dram_slots && !(may_stage && op->dram_slot == KVO_NO_SLOT)) return false;
    bool on_ssd = op->kind == KVO_READ || op->kind == KVO_WRITE;
    return !on_ssd || e->shared.slot_count == 0 || op->ssd_slot < e->shared.slot_count;
}

int kvo_submit(kvo_engine *e, const kvo_op *ops, uint32_t count, uint64_t stream) {
    bool copies = false;
    for (uint32_t i = 0; i < count; i++) {
        if (!is_well_formed(e, &ops[i], i > 0 && ops[i - 1].flags == KVO_LINK ? &ops[i - 1] : NULL)) return -EINVAL;
        copies |= ops[i].kind == KVO_COPY_OUT || ops[i].kind == KVO_COPY_IN;
    }
    if (count > 0 && ops[count - 1].flags == KVO_LINK) return -EINVAL;
    uint64_t fence = copies ? e->copier->fence(e->copier, stream) : 0;

    kvo_shared *shared = &e->shared;
    uint64_t now = kvo_now_us();
    pthread_mutex_lock(&shared->lock);
    uint32_t room = e->options.max_ops - shared->outstanding;
    uint32_t taken = count < room ? count : room;
    if (taken > 0 && ops[taken - 1].flags == KVO_LINK) taken--; /* whole chains */
    for (uint32_t i = 0; i < taken; i++)
        shared->submissions[kvo_ring_push(&shared->submitted)] = (kvo_submission){ops[i], now, fence};
    shared->outstanding += taken;
    pthread_mutex_unlock(&shared->lock);
    if (taken > 0) eventfd_write(e->kick_fd, 1);
    return (int)taken;
}

int kvo_poll(kvo_engine *e, kvo_completion *out, uint32_t max) {
    kvo_shared *shared = &e->shared;
    pthread_mutex_lock(&shared->lock);
    uint32_t count = shared->done.count < max ? shared->done.count : max;
    for (uint32_t i = 0; i < count; i++) out[i] = shared->completions[kvo_ring_pop(&shared->done)];
    shared->outstanding -= count;
    pthread_mutex_unlock(&shared->lock);
    return (int)count;
}

int kvo_wait(kvo_engine *e, uint64_t timeout_us) {
    kvo_shared *shared = &e->shared;
    uint64_t most = (uint64_t)1 << 50; /* decades: keeps the sum in range */
    uint64_t end = kvo_now_us() + (timeout_us < most ? timeout_us : most);
    struct timespec until = {.tv_sec = (time_t)(end / 1000000u), .tv_nsec = (long)(end % 1000000u) * 1000};
    int error = 0;
    pthread_mutex_lock(&shared->lock);
    while (shared->done.count == 0 && error == 0)
        error = pthread_cond_timedwait(&shared->completed, &shared->lock, &until);
    int ready = shared->done.count > 0;
    pthread_mutex_unlock(&shared->lock);
    return ready;
}

/* ---- what can be seen from outside ---- */

void kvo_stats(kvo_engine *e, kvo_stats_t *out) {
    pthread_mutex_lock(&e->shared.lock);
    *out = e->shared.stats;
    out->queued += e->shared.submitted.count;
    out->huge_bytes = e->shared.huge_bytes;
    pthread_mutex_unlock(&e->shared.lock);
}

__attribute__((format(printf, 3, 4))) static size_t add_line(char *out, size_t bytes, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(out, bytes, format, arguments);
    va_end(arguments);
    return length < 0 ? 0 : (size_t)length < bytes ? (size_t)length : bytes - 1;
}

void kvo_describe(kvo_engine *e, char *out, size_t bytes) {
    const kvo_arena *arena = &e->slots.arena;
    char copier[512];
    e->copier->describe(e->copier, copier, sizeof copier);
    size_t at =
        add_line(out, bytes, "io: %s (%s), depth %u\ncopy: %s\n", e->io->name, e->io_reason, e->io->depth, copier);
    uint64_t huge = kvo_arena_huge_bytes(arena);
    pthread_mutex_lock(&e->shared.lock);
    e->shared.huge_bytes = huge;
    pthread_mutex_unlock(&e->shared.lock);
    unsigned long long mib = arena->bytes >> 20, huge_mib = huge >> 20;
    if (arena->hugetlb) at += add_line(out + at, bytes - at, "arena: %llu MiB of reserved huge pages\n", mib);
    else if (arena->advice_error != 0)
        at += add_line(out + at, bytes - at, "arena: %llu MiB of small pages, huge ones refused (%s)\n", mib,
                       strerror(arena->advice_error));
    else
        at += add_line(out + at, bytes - at, "arena: %llu MiB, transparent huge pages (%llu MiB so far)\n", mib,
                       huge_mib);
    for (uint32_t i = 0; i < e->file_count; i++) {
        const kvo_file *file = &e->files[i].file;
        if (file->direct)
            at += add_line(out + at, bytes - at, "file %s: O_DIRECT\n", file->path);
        else
            at += add_line(out + at, bytes - at, "file %s: buffered by threads, O_DIRECT refused (%s)\n",
                           file->path, strerror(file->direct_error));
    }
}
