/* engine_slot.c - any change of a sealed slot: what verifies has exactly the bytes that were sealed. Sums that were made again
 * over changed bytes, which no accident does, prove that every field is compared and not only summed. */
#include "fuzz.h"

#define PAYLOAD_BYTES_MAX 6000u
#define USED_BYTES 128u /* of the header */
#define PAYLOAD_SUM_AT 96u
#define ZERO_AT 104u
#define HEADER_SUM_AT 120u

enum { SUM_HEADER_AGAIN = 1, SUM_PAYLOAD_AGAIN = 2 };

static const uint8_t fingerprint[KVO_FINGERPRINT_BYTES] = "fingerprint 16 b";

static void put_sum(uint8_t *at, const uint8_t *data, uint64_t bytes) {
    uint64_t sum = kvo_checksum(data, bytes);
    memcpy(at, &sum, sizeof sum);
}

/* Exclusive-ors bytes of the slot with those of the input, which tells the places too. */
static void edit(uint8_t *slot, uint64_t slot_bytes, input *in) {
    while (in->at < in->end) {
        uint64_t at = take_u16(in) % slot_bytes;
        slot[at] ^= take_u8(in);
    }
}

/* Whether two slots are equal in [from, to). */
static bool same(const uint8_t *a, const uint8_t *b, uint64_t from, uint64_t to) {
    return memcmp(a + from, b + from, to - from) == 0;
}

static void check_foreign(const uint8_t *sealed, const kvo_block *block, uint32_t ssd_slot) {
    kvo_block other = *block;
    other.generation++;
    MUST(!kvo_slot_verify(sealed, &other, ssd_slot, fingerprint));
    other = *block;
    other.bytes--;
    MUST(!kvo_slot_verify(sealed, &other, ssd_slot, fingerprint));
    other = *block;
    other.key[other.key_len - 1] ^= 1;
    MUST(!kvo_slot_verify(sealed, &other, ssd_slot, fingerprint));
    other = *block;
    other.key_len--;
    MUST(!kvo_slot_verify(sealed, &other, ssd_slot, fingerprint));
    uint8_t stranger[KVO_FINGERPRINT_BYTES];
    memcpy(stranger, fingerprint, sizeof stranger);
    stranger[ssd_slot % sizeof stranger] ^= 1;
    MUST(!kvo_slot_verify(sealed, block, ssd_slot, stranger));
    MUST(!kvo_slot_verify(sealed, block, ssd_slot + 1, fingerprint));
}

/* A slot as large as this block's needs to be, so that a sanitiser sees a byte too many, with a payload and not sealed. */
static uint8_t *make_slot(const kvo_block *block, uint64_t slot_bytes) {
    uint8_t *slot = malloc(slot_bytes);
    MUST(slot != NULL);
    for (uint64_t i = 0; i < slot_bytes; i++) slot[i] = (uint8_t)(i * 7 + block->bytes);
    return slot;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = {data, data + size};
    uint8_t flags = take_u8(&in) & (SUM_HEADER_AGAIN | SUM_PAYLOAD_AGAIN);
    kvo_block block = {.generation = take_u16(&in), .bytes = 1 + take_u16(&in) % PAYLOAD_BYTES_MAX};
    block.key_len = (uint8_t)(1 + take_u8(&in) % KVO_KEY_BYTES);
    memset(block.key, 'k', block.key_len);
    uint32_t ssd_slot = take_u8(&in);
    uint64_t end = KVO_HEADER_BYTES + block.bytes, slot_bytes = kvo_round_up(end, KVO_ALIGNMENT);

    uint8_t *sealed = make_slot(&block, slot_bytes), *edited = make_slot(&block, slot_bytes);
    kvo_slot_seal(sealed, &block, ssd_slot, fingerprint);
    MUST(same(sealed, edited, KVO_HEADER_BYTES, end)); /* the payload is not touched */
    MUST(kvo_slot_verify(sealed, &block, ssd_slot, fingerprint));
    check_foreign(sealed, &block, ssd_slot);

    memcpy(edited, sealed, slot_bytes);
    edit(edited, slot_bytes, &in);
    if (flags & SUM_PAYLOAD_AGAIN) put_sum(edited + PAYLOAD_SUM_AT, edited + KVO_HEADER_BYTES, block.bytes);
    if (flags & SUM_HEADER_AGAIN) put_sum(edited + HEADER_SUM_AT, edited, HEADER_SUM_AT);
    bool right = same(edited, sealed, 0, USED_BYTES) && same(edited, sealed, KVO_HEADER_BYTES, end);
    bool forged = flags == (SUM_HEADER_AGAIN | SUM_PAYLOAD_AGAIN) && same(edited, sealed, 0, PAYLOAD_SUM_AT) &&
                  same(edited, sealed, ZERO_AT, HEADER_SUM_AT);
    MUST(kvo_slot_verify(edited, &block, ssd_slot, fingerprint) == (right || forged));
    free(edited);
    free(sealed);
    return 0;
}
