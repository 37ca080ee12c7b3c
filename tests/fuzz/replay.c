/* replay.c - runs files through a fuzz target once each, without a fuzzer: `<target> <file>...`. */
#include "fuzz.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));

int main(int argc, char **argv) {
    if (LLVMFuzzerInitialize != NULL) LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        MUST(file != NULL && fseek(file, 0, SEEK_END) == 0);
        long bytes = ftell(file);
        MUST(bytes >= 0);
        rewind(file);
        uint8_t *data = malloc(bytes > 0 ? (size_t)bytes : 1);
        MUST(data != NULL && fread(data, 1, (size_t)bytes, file) == (size_t)bytes);
        fclose(file);
        fprintf(stderr, "%s\n", argv[i]); /* the last one named is the one that failed */
        MUST(LLVMFuzzerTestOneInput(data, (size_t)bytes) == 0);
        free(data);
    }
    return 0;
}
