/* slots.c - DRAM slots over physical slots, so that memory the kernel still works on is never given to another. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

int kvo_slots_open(kvo_slots *slots, uint64_t slot_bytes, uint32_t dram_slots, uint32_t spare_slots) {
    uint32_t total = dram_slots + spare_slots;
    *slots = (kvo_slots){.slot_bytes = slot_bytes, .dram_slots = dram_slots, .spare_slots = spare_slots};
    slots->physical = calloc(total, sizeof *slots->physical);
    slots->of_dram = calloc(total, sizeof *slots->of_dram);
    slots->spares = calloc(total, sizeof *slots->spares);
    if (slots->physical == NULL || slots->of_dram == NULL || slots->spares == NULL) return -ENOMEM;
    for (uint32_t i = 0; i < total; i++) {
        slots->physical[i].owner = i < dram_slots ? i : KVO_NO_SLOT;
        if (i < dram_slots) slots->of_dram[i] = i;
        else slots->spares[slots->spare_count++] = i;
    }
    return kvo_arena_open(&slots->arena, total * slot_bytes);
}

void kvo_slots_close(kvo_slots *slots) {
    kvo_arena_close(&slots->arena);
    free(slots->physical);
    free(slots->of_dram);
    free(slots->spares);
}

uint32_t kvo_slots_fill(kvo_slots *slots, uint32_t dram) {
    uint32_t at = dram == KVO_NO_SLOT ? KVO_NO_SLOT : slots->of_dram[dram];
    if (at == KVO_NO_SLOT || slots->physical[at].users > 0) {
        if (slots->spare_count == 0) return KVO_NO_SLOT;
        at = slots->spares[--slots->spare_count];
    }
    slots->physical[at].users++;
    slots->physical[at].valid = false;
    return at;
}

void kvo_slots_filled(kvo_slots *slots, uint32_t physical, uint32_t dram, const kvo_block *block) {
    kvo_physical *now = &slots->physical[physical];
    now->block = *block;
    now->valid = true;
    if (dram == KVO_NO_SLOT || now->owner == dram) return;
    uint32_t old = slots->of_dram[dram];
    slots->of_dram[dram] = physical;
    now->owner = dram;
    slots->physical[old].owner = KVO_NO_SLOT;
    slots->physical[old].valid = false;
    if (slots->physical[old].users == 0) slots->spares[slots->spare_count++] = old;
}

uint32_t kvo_slots_use(kvo_slots *slots, uint32_t dram) {
    uint32_t at = slots->of_dram[dram];
    slots->physical[at].users++;
    return at;
}

void kvo_slots_release(kvo_slots *slots, uint32_t physical) {
    kvo_physical *slot = &slots->physical[physical];
    slot->users--;
    if (slot->users > 0 || slot->owner != KVO_NO_SLOT) return;
    slot->valid = false;
    slots->spares[slots->spare_count++] = physical;
}

bool kvo_slots_hold(const kvo_slots *slots, uint32_t physical, const kvo_block *block) {
    const kvo_physical *slot = &slots->physical[physical];
    return slot->valid && slot->block.generation == block->generation && slot->block.bytes == block->bytes &&
           slot->block.key_len == block->key_len && memcmp(slot->block.key, block->key, sizeof block->key) == 0;
}
