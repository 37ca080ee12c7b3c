/* engine.h - what engine.c (the face), pump.c (the pump thread) and slots.c (DRAM slots) share. */
#ifndef KVO_ENGINE_H
#define KVO_ENGINE_H

#include <pthread.h>

#include "copy.h"
#include "internal.h"
#include "io.h"
#include "ring.h"

/* A piece of the arena. A logical DRAM slot is held by one physical slot at a time, the others are spares. */
typedef struct {
    kvo_block block; /* what it holds, if valid; the authority: header bytes in the arena are written only by WRITE */
    uint32_t users;  /* operations that read or fill it, abandoned ones included */
    uint32_t owner;  /* the DRAM slot it is, or KVO_NO_SLOT */
    bool valid;
    bool sealing; /* a WRITE has its header made for one SSD slot; a second WRITE waits */
} kvo_physical;

typedef struct {
    kvo_arena arena;
    uint64_t slot_bytes;
    kvo_physical *physical;
    uint32_t *of_dram; /* DRAM slot -> physical slot */
    uint32_t *spares;  /* quiet physical slots that are no DRAM slot */
    uint32_t spare_count, dram_slots, spare_slots;
} kvo_slots;

int kvo_slots_open(kvo_slots *slots, uint64_t slot_bytes, uint32_t dram_slots, uint32_t spare_slots);
void kvo_slots_close(kvo_slots *slots);

static inline uint8_t *kvo_slots_memory(const kvo_slots *slots, uint32_t physical) {
    return slots->arena.base + physical * slots->slot_bytes;
}
/* Becomes a user of a physical slot to fill it with what is to be in DRAM slot `dram` (or in none): in place if no one
 * uses it, else in a spare. KVO_NO_SLOT if there is no spare now. Until kvo_slots_filled it holds nothing. */
uint32_t kvo_slots_fill(kvo_slots *slots, uint32_t dram);
/* The fill succeeded: the physical slot holds the block and is DRAM slot `dram` from now on. */
void kvo_slots_filled(kvo_slots *slots, uint32_t physical, uint32_t dram, const kvo_block *block);
/* Becomes a user of DRAM slot `dram` to read it. */
uint32_t kvo_slots_use(kvo_slots *slots, uint32_t dram);
/* Stops being a user. */
void kvo_slots_release(kvo_slots *slots, uint32_t physical);
/* Whether the physical slot holds this block. */
bool kvo_slots_hold(const kvo_slots *slots, uint32_t physical, const kvo_block *block);

/* An operation on its way. */
typedef struct kvo_record {
    struct kvo_engine *engine;
    kvo_op op;
    uint64_t submitted, deadline; /* monotonic, us */
    uint64_t fence;               /* of a copy; see copy.h */
    struct kvo_record *previous, *next;
    struct kvo_record *linked; /* the COPY_IN that waits for this READ */
    uint32_t physical;         /* the physical slot it uses, or KVO_NO_SLOT */
    bool sealed;               /* a WRITE: ahead of its turn */
    bool abandoned;            /* completed by its timeout, but kernel or device are not done */
    union {
        kvo_io io;
        kvo_copy_job copy;
    };
} kvo_record;

typedef struct {
    kvo_record *first, *last;
    uint32_t count;
} kvo_list;

typedef struct {
    kvo_op op;
    uint64_t submitted, fence;
} kvo_submission;

/* A slot file, what is in flight on it and its growth. */
typedef struct {
    kvo_file file;
    kvo_drives *drives;     /* that serve it */
    uint32_t depth;         /* reads and writes in flight on it, so that a stuck drive leaves places for others */
    uint32_t reads, writes; /* in flight, abandoned ones included */
    uint32_t staged;        /* of the reads, those to memory of the engine's own */
    uint64_t read_at;       /* when a read last began or ended; monotonic, us */
    kvo_io growth;
    uint32_t needed, wanted; /* slots it shall have room for, at least and at best; 0 while it does not grow */
    uint32_t reached;        /* by the last growth */
} kvo_store_file;

/* What pump and callers share, under one lock that is held for copying only. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t completed; /* or started, or drained */
    kvo_submission *submissions;
    kvo_completion *completions;
    kvo_ring submitted, done;
    uint32_t outstanding; /* operations accepted and not yet polled */
    uint32_t slot_count;  /* SSD slots; 0 until files are attached */
    kvo_stats_t stats;
    uint64_t huge_bytes;
    bool started; /* the pump has opened file I/O, or failed to */
    bool stop;    /* asks the pump to end */
    bool drained; /* the pump did, and uses nothing of the engine any more */
} kvo_shared;

struct kvo_engine {
    kvo_options options;
    kvo_shared shared;
    int kick_fd; /* eventfd: there is something to do */
    pthread_t pump;

    /* Set by kvo_bind and kvo_attach before any operation that needs them. */
    kvo_region *regions;
    uint32_t *first_region;
    uint64_t *group_bytes;
    uint32_t groups;
    kvo_store_file files[KVO_FILES_MAX];
    uint32_t file_count;
    kvo_drives *growers;  /* a thread for each file */
    kvo_drives *buffered; /* serve files without direct I/O where io_uring serves the others; else NULL */
    uint8_t fingerprint[KVO_FINGERPRINT_BYTES];

    /* The pump's own. */
    kvo_drives *io; /* by which it waits, too */
    kvo_copier *copier;
    kvo_slots slots;
    kvo_record *records;
    kvo_list unused, queued[4], running, abandoned;
    kvo_completion *finished; /* not yet handed to the callers */
    uint32_t finished_count;
    uint32_t reads, writes, copies[2]; /* in flight, abandoned ones included; copies by kind */
    uint32_t growths;
    uint32_t slot_count;    /* of kvo_shared */
    uint64_t next_deadline; /* none is earlier */
    kvo_stats_t stats;
    bool more;        /* there may be more to reap */
    bool left_behind; /* the kernel did not finish before close; its memory must stay */

    char io_reason[128];
};

/* The pump thread. The argument is the engine. */
void *kvo_pump(void *engine);

#endif
