/* kvo.h - the engine: moves KV blocks between the KV cache, a DRAM arena and slot files.
 *
 * The engine knows blocks, slots and files. It knows nothing of requests, prefixes or policy: the caller decides
 * what goes where and keeps the index. An array of operations goes in, an array of completions comes out.
 *
 * Promises
 *  - Every accepted operation completes exactly once, with a status, before its timeout plus KVO_GRACE_US. But a COPY_IN
 *    that has begun is waited for, however long it takes: a KV block belongs to the caller again when it completes, and
 *    the engine could not keep the copy from writing to it then.
 *  - A READ or COPY_IN that completes with 0 delivered exactly the bytes stored under that key and generation.
 *  - An operation that timed out can not touch memory that was since given to another: the engine keeps the
 *    memory aside until the kernel, or the device, is done with it. A COPY_OUT may still read its KV block, to no effect.
 *  - Nothing is allocated after kvo_open, kvo_bind and kvo_attach; every queue is bounded; an idle engine sleeps.
 *
 * Threads: kvo_submit, kvo_poll, kvo_wait and kvo_stats may be called from any thread, one at a time each.
 * kvo_open, kvo_bind, kvo_attach and kvo_close must not run beside any other call.
 */
#ifndef KVO_H
#define KVO_H

#include <stddef.h>
#include <stdint.h>

#define KVO_FORMAT_VERSION 1
#define KVO_ALIGNMENT 4096u
#define KVO_HEADER_BYTES 4096u
#define KVO_SUPERBLOCK_BYTES 4096u
#define KVO_KEY_BYTES 40
#define KVO_FINGERPRINT_BYTES 16
#define KVO_NO_SLOT UINT32_MAX
#define KVO_NO_DEVICE (-1)
#define KVO_GRACE_US 100000u
#define KVO_ERR_BYTES 256

enum kvo_kind { KVO_COPY_OUT = 0, KVO_COPY_IN = 1, KVO_WRITE = 2, KVO_READ = 3 };
enum kvo_flag { KVO_LINK = 1 };
enum kvo_io_backend { KVO_IO_AUTO = 0, KVO_IO_URING = 1, KVO_IO_THREADS = 2 };

/* Where one layer's bytes of block b lie in the KV cache: [base + b * stride, + bytes). Addresses of the device's memory
 * if the engine was opened for one. */
typedef struct {
    uint64_t base;
    uint64_t stride;
    uint64_t bytes;
} kvo_region;

/* One operation; 88 bytes, mirrored by OP_DTYPE in kvoffload/types.py.
 *
 * COPY_OUT  KV block kv_block of `group` -> DRAM slot, and notes key and generation in the slot's header.
 * COPY_IN   DRAM slot -> KV block. Fails with -EBADMSG if the slot does not hold this key and generation.
 * WRITE     DRAM slot -> SSD slot, checksummed. Fails with -EBADMSG if the slot does not hold this key and generation.
 * READ      SSD slot -> DRAM slot. Fails with -EBADMSG unless every field of the header and the checksum are right.
 *
 * KVO_LINK: the next operation of the same batch starts only if this one succeeded, else it completes with
 * -ECANCELED. Only READ may be linked, and only to a COPY_IN. In such a pair dram_slot may be KVO_NO_SLOT in both:
 * the block then passes through staging memory of the engine's own. Of the two timeouts the earlier ends the READ.
 * A READ alone may have KVO_NO_SLOT, too: it verifies the block, and tells how long that takes.
 *
 * A COPY_OUT or READ that fails leaves its DRAM slot with what it held before or with nothing, never with a part.
 * Operations of different chains run in any order, loads (READ, COPY_IN) before COPY_OUT before WRITE.
 * REQUIRES: the caller does not name a DRAM slot or an SSD slot as a target while an operation on it is not complete.
 */
typedef struct {
    uint64_t id;         /* the caller's; returned in the completion */
    uint64_t generation; /* of the block's content; never reused for other content of the same slot */
    uint64_t timeout_us; /* from submission; 0 means KVO_TIMEOUT_DEFAULT_US */
    uint32_t kv_block;
    uint32_t dram_slot;
    uint32_t ssd_slot;
    uint16_t group;
    uint8_t kind;
    uint8_t flags;
    uint8_t key_len; /* 1 .. KVO_KEY_BYTES */
    uint8_t reserved[7];
    uint8_t key[KVO_KEY_BYTES]; /* zero beyond key_len */
} kvo_op;

#define KVO_TIMEOUT_DEFAULT_US 30000000u

/* status: 0, or -errno. The ones with a meaning of their own:
 *   -EBADMSG    verification failed: torn, stale, foreign or damaged slot
 *   -ETIMEDOUT  the timeout passed
 *   -ECANCELED  the operation it was linked to failed
 *   -ENXIO      no slot files attached
 *   -EREMOTEIO  the device failed, which says nothing about the block. A device that is lost fails all copies from then
 *               on, at once. What it may still read or write in the arena stays aside for good; in the KV cache the
 *               engine has no such means.
 * usec: from submission to completion. */
typedef struct {
    uint64_t id;
    int32_t status;
    uint32_t usec;
} kvo_completion;

typedef struct {
    uint64_t payload_bytes; /* of the largest group; all slots have this size plus header, rounded up to 4096 */
    uint32_t dram_slots;
    uint32_t spare_slots; /* at least 1 */
    uint32_t max_ops;     /* operations accepted and not yet polled */
    uint32_t io_depth;    /* reads and writes in the drives at once; on each of n slot files io_depth / n, at least 1 */
    int io_backend;       /* enum kvo_io_backend */
    int32_t device;       /* CUDA device (ordinal) whose memory holds the KV cache; KVO_NO_DEVICE: host memory */
} kvo_options;

typedef struct {
    uint64_t ops[4], failed[4], bytes[4], usec[4]; /* per kind; bytes and times of those that succeeded */
    uint64_t queued, in_flight;                    /* now */
    uint64_t abandoned;                            /* timed out while kernel or device still work on them, now */
    uint64_t arena_bytes, huge_bytes;              /* mapped; of these on huge pages when kvo_describe last looked */
} kvo_stats_t;

typedef struct kvo_engine kvo_engine;

/* Opens an engine: maps the arena, starts its threads, probes io_uring. 0 or -errno with one sentence in err. With a
 * device it opens CUDA's driver, uses the device's primary context and pins the arena, which takes about 0.1 s a GB:
 * -ENODEV if there is no such device or driver, -ENOMEM if the memory cannot be pinned. */
int kvo_open(kvo_engine **engine, const kvo_options *options, char err[KVO_ERR_BYTES]);

/* Tells where the KV cache lies. regions of group g: regions[first[g] .. first[g + 1]). Once, before the first submit.
 * The sum of a group's region bytes must not exceed payload_bytes. 0 or -EINVAL with a sentence in err. */
int kvo_bind(kvo_engine *engine, const kvo_region *regions, const uint32_t *first, uint32_t groups,
             char err[KVO_ERR_BYTES]);

/* Opens this rank's slot files (made by the store, superblock in place); slot s is slot s / count of file s % count.
 * The file and the last own_directories of its path must be no symlinks and this process's user's, and the file must have no
 * second name; the directory before these may be root's instead.
 * Probes O_DIRECT on each by doing. Files grow by fallocate as slots are first written, by whole slots, never beyond
 * slot_count slots, and on the medium never beyond their bytes and 0.5 %. A WRITE that needs growth completes with -ENOSPC
 * where the file system would have less than 2 % of its size free, or less than 10 GiB where that is less. Each file is
 * locked (flock, shared) until close, or until the kernel is done with it: who resizes it locks it exclusively first.
 * Once. 0 or -errno with a sentence in err; the engine then still serves DRAM. */
int kvo_attach(kvo_engine *engine, const char *const *paths, uint32_t count, uint32_t own_directories,
               uint32_t slot_count, const uint8_t fingerprint[KVO_FINGERPRINT_BYTES], char err[KVO_ERR_BYTES]);

/* Takes operations from the front of ops, as many whole chains as there is room for, and returns how many operations
 * that is. With a device, COPY_OUT and COPY_IN start after the work now in `stream`, a CUDA stream of the device's primary
 * context; 0 is CUDA's legacy default stream, which is torch's too, not the lack of one. They complete with -EREMOTEIO if that
 * order cannot be had (a broken stream, one that is being captured). Without a device `stream` is ignored.
 * -EINVAL, with nothing taken: an operation is malformed (kind, flags, slot, group or key out of range). */
int kvo_submit(kvo_engine *engine, const kvo_op *ops, uint32_t count, uint64_t stream);

/* Moves up to `max` completions to out, oldest first; returns how many. Never blocks. */
int kvo_poll(kvo_engine *engine, kvo_completion *out, uint32_t max);

/* Sleeps until a completion can be polled (1) or timeout_us passed (0). */
int kvo_wait(kvo_engine *engine, uint64_t timeout_us);

void kvo_stats(kvo_engine *engine, kvo_stats_t *out);

/* What was found by probing, one finding a line ("io: io_uring", "file a.slots: O_DIRECT"). */
void kvo_describe(kvo_engine *engine, char *out, size_t bytes);

/* Stops the threads, completes nothing more, frees everything that kernel or device are not still working on. Waits for
 * drives and device for 2 s at most; unpinning the arena takes the driver a while of its own. */
void kvo_close(kvo_engine *engine);

#endif
