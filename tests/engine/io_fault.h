/* io_fault.h - which faults the drives and copies of a test have: a file that the test and its engines map. Mirrored by
 * faulty.py. */
#ifndef IO_FAULT_H
#define IO_FAULT_H

#include <stdint.h>

enum fault {
    FAULT_ERROR,      /* not carried out; fails with `error` */
    FAULT_AGAIN,      /* transfers are answered EAGAIN a few times */
    FAULT_SHORT,      /* transfers move a part, a multiple of 4096 bytes */
    FAULT_TORN,       /* of a write, the first n * 512 bytes land; it is acknowledged */
    FAULT_TORN_ERROR, /* the same, but it fails with `error` */
    FAULT_FLIP,       /* one bit is another, on the medium after a write, on the way in a read */
    FAULT_LOST,       /* a write is acknowledged and never made */
    FAULT_MISDIRECT,  /* goes to another slot of the file */
    FAULT_STALL,      /* is under way, but takes effect and ends when its time has come */
    FAULT_QUEUED,     /* the same for a copy that has not begun: it may be withdrawn */
    FAULTS
};

/* Requests of one kind. */
typedef struct {
    uint32_t chance[FAULTS];       /* of 65536: a request gets one fault or none, and may wait (STALL, QUEUED) beside that */
    uint32_t script, scripted;     /* the next `scripted` requests get the fault `script`, and nothing else */
    uint32_t error;                /* errno */
    uint32_t in_turn;              /* STALLs come one after the other, as on a slow drive: each takes `stall_us` of its time */
    uint64_t stall_us;             /* UINT64_MAX: until released */
    uint64_t free_at;              /* kept here: when what waits in turn is through */
    uint64_t seed;
    uint64_t requests, waiting;    /* counted here: since the file was made, and now */
    uint64_t injected[FAULTS];     /* counted here */
} fault_kind;

enum { FAULTY_READ, FAULTY_WRITE, FAULTY_GROW, FAULTY_COPY_IN, FAULTY_COPY_OUT, FAULTY_KINDS };

typedef struct {
    uint64_t device, inode; /* reads, writes and growth of other files have no faults; inode 0: every file has */
    uint64_t released;      /* a change lets go what is waiting then */
    uint64_t passed;        /* by a change pass the deadlines of what has a timeout of its own; seen while something waits */
    uint64_t turned;        /* noted here: the last change of `passed` after which the pump has had its turn */
    uint64_t overdue;       /* counted here: operations whose deadline the pump would sleep past; see overdue_in */
    fault_kind kinds[FAULTY_KINDS];
} fault_plan;
_Static_assert(sizeof(fault_plan) == 48 + 5 * 176, "FaultPlan in faulty.py mirrors this");

#endif
