/* fake_cuda_memory.c - fake_cuda.c and the functions that the benchmark calls but the engine does not: memory of the
 * device's own and copies that are waited for. */
#include "fake_cuda.c"

static range *find_range(range *ranges, const char *base) {
    for (int i = 0; i < RANGES_MAX; i++)
        if (ranges[i].base == base) return &ranges[i];
    return NULL;
}

static int allocate(range *ranges, void **at, size_t bytes) {
    range *free_one = find_range(ranges, NULL);
    if (free_one == NULL || posix_memalign(at, 4096, bytes) != 0) return OUT_OF_MEMORY;
    *free_one = (range){*at, bytes};
    return OK;
}

static int release(range *ranges, void *at) {
    range *found = find_range(ranges, at);
    if (found == NULL) return INVALID_VALUE;
    found->base = NULL;
    free(at);
    return OK;
}

int cuMemAlloc_v2(void **at, size_t bytes) {
    ENTER("cuMemAlloc_v2", true);
    return leave(allocate(device, at, bytes));
}

int cuMemFree_v2(void *at) {
    ENTER("cuMemFree_v2", true);
    return leave(release(device, at));
}

int cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
    ENTER("cuMemHostAlloc", true);
    return leave(flags == 1 ? allocate(pinned, at, bytes) : INVALID_VALUE);
}

int cuMemFreeHost(void *at) {
    ENTER("cuMemFreeHost", true);
    return leave(release(pinned, at));
}

int cuMemcpyHtoD_v2(char *to, const char *from, size_t bytes) {
    ENTER("cuMemcpyHtoD_v2", true);
    if (!is_within(device, to, bytes)) return leave(INVALID_VALUE);
    memcpy(to, from, bytes);
    return leave(OK);
}

int cuMemcpyDtoH_v2(char *to, const char *from, size_t bytes) {
    ENTER("cuMemcpyDtoH_v2", true);
    if (!is_within(device, from, bytes)) return leave(INVALID_VALUE);
    memcpy(to, from, bytes);
    return leave(OK);
}
