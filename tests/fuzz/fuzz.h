/* fuzz.h - what the fuzz targets of the engine share: the entry points that libFuzzer and replay.c call, and checks. */
#ifndef KVO_FUZZ_H
#define KVO_FUZZ_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

int LLVMFuzzerInitialize(int *argc, char ***argv); /* a target may have it */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the process if a promise is broken; with NDEBUG too. */
#define MUST(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
            abort(); \
        } \
    } while (0)

/* Takes numbers from the front of an input; zeros when it has ended. */
typedef struct {
    const uint8_t *at, *end;
} input;

static inline void take_bytes(input *in, void *out, size_t bytes) {
    size_t left = (size_t)(in->end - in->at), taken = bytes < left ? bytes : left;
    memset(out, 0, bytes);
    if (taken > 0) memcpy(out, in->at, taken);
    in->at += taken;
}

static inline uint8_t take_u8(input *in) {
    uint8_t number;
    take_bytes(in, &number, sizeof number);
    return number;
}

static inline uint16_t take_u16(input *in) {
    uint16_t number;
    take_bytes(in, &number, sizeof number);
    return number;
}

static inline uint32_t take_u32(input *in) {
    uint32_t number;
    take_bytes(in, &number, sizeof number);
    return number;
}

#define PATH_BYTES 512

/* An empty file below TMPDIR; `path` gets its name. libFuzzer ends without atexit, so run.py removes the folder. */
static inline int make_file(char path[PATH_BYTES]) {
    const char *folder = getenv("TMPDIR");
    snprintf(path, PATH_BYTES, "%s/kvoffload-fuzz-XXXXXX", folder != NULL ? folder : "/tmp");
    int fd = mkstemp(path);
    MUST(fd >= 0);
    return fd;
}

#endif
