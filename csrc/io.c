/* io.c - what both backends make of the outcome of a transfer. */
#include <errno.h>

#include "internal.h"
#include "io.h"

bool kvo_io_advance(kvo_io *io, int64_t outcome) {
    if (outcome == -EINTR || outcome == -EAGAIN) return false;
    io->result = outcome < 0 ? (int32_t)outcome : 0;
    if (outcome < 0) return true;
    io->done += (uint64_t)outcome;
    if (io->done >= io->bytes) return true;
    /* Direct I/O continues at aligned places only; less than that is the end of the file, or of the device. */
    if (outcome == 0 || (io->direct && outcome % KVO_ALIGNMENT != 0)) {
        io->result = io->kind == KVO_IO_READ ? -ENODATA : -EIO;
        return true;
    }
    return false;
}
