/* pump.h - what the pump's two files share: pump.c takes operations in and ends them, start.c starts them. All of it runs
 * on the pump thread, except a request's work (io.h). */
#ifndef KVO_PUMP_H
#define KVO_PUMP_H

#include <string.h>

#include "engine.h"

/* The block an operation is about. */
static inline kvo_block kvo_block_of(const kvo_engine *e, const kvo_op *op) {
    kvo_block block = {.generation = op->generation, .bytes = e->group_bytes[op->group], .key_len = op->key_len};
    memcpy(block.key, op->key, sizeof block.key);
    return block;
}

static inline kvo_store_file *kvo_file_of(kvo_engine *e, const kvo_record *record) {
    return &e->files[record->op.ssd_slot % e->file_count];
}

static inline uint32_t kvo_index_of(const kvo_engine *e, const kvo_record *record) { return record->op.ssd_slot / e->file_count; }

/* Counts an operation that begins (1) or ends (-1) to be in flight. */
static inline void kvo_count_io(kvo_engine *e, const kvo_record *record, int change) {
    kvo_store_file *files = kvo_file_of(e, record);
    *(record->op.kind == KVO_READ ? &e->reads : &e->writes) += (uint32_t)change;
    *(record->op.kind == KVO_READ ? &files->reads : &files->writes) += (uint32_t)change;
    if (record->op.kind == KVO_READ && record->op.dram_slot == KVO_NO_SLOT) files->staged += (uint32_t)change;
    if (record->op.kind == KVO_READ) files->read_at = kvo_now_us();
}

void kvo_list_move(kvo_list *from, kvo_list *to, kvo_record *record);
/* Ends an operation that is in `list` and that nothing works on any more. */
void kvo_finish(kvo_engine *e, kvo_list *list, kvo_record *record, int32_t status);

/* Start what may start of one kind. What a step gives back, the later ones can use: in this order. */
void kvo_start_copies_in(kvo_engine *e);
void kvo_start_reads(kvo_engine *e);
void kvo_start_copies_out(kvo_engine *e);
void kvo_start_writes(kvo_engine *e);
/* Seals a write that has to wait for its turn, after handing the drive what was started. False if there is none. */
bool kvo_seal_ahead(kvo_engine *e);

#endif
