/* copy.h - the seam between KV cache and arena. copy_host.c serves a KV cache in host memory; a backend for device
 * memory implements the same three functions.
 *
 * The pump thread starts jobs and reaps them; the backend writes to the pump's eventfd when there is something to
 * reap. A job is the caller's memory and stays put until it is reaped. A job that was started always finishes. */
#ifndef KVO_COPY_H
#define KVO_COPY_H

#include "kvo.h"

#define KVO_COPY_DEPTH 8u /* jobs started at once: few, so that a load never waits behind many stores */

typedef struct {
    const kvo_region *regions;
    uint32_t region_count;
    uint32_t kv_block;
    int out;          /* 1: KV cache -> payload, 0: payload -> KV cache */
    uint8_t *payload; /* the regions' bytes of the block, one after the other */
    int32_t result;   /* when reaped: 0 or -errno */
    void *owner;
} kvo_copy_job;

typedef struct kvo_copy kvo_copy;

kvo_copy *kvo_copy_open(int kick_fd);
/* REQUIRES: fewer than KVO_COPY_DEPTH jobs are not yet reaped. */
void kvo_copy_start(kvo_copy *copy, kvo_copy_job *job);
/* A finished job, or NULL. */
kvo_copy_job *kvo_copy_reap(kvo_copy *copy);
/* Finishes what was started. */
void kvo_copy_close(kvo_copy *copy);

#endif
