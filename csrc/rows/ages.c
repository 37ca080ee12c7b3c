/* ages.c - kvoffload._rows.AgeHeaps: frames by level and within a level by when they were used last. kvoffload/_rows.pyi is
 * the manual.
 *
 * Binary heaps that know where each frame is (Cormen, Leiserson, Rivest, Stein, Introduction to Algorithms, 6.5), so that a
 * frame used again is moved and not entered once more. With Python's heapq what is stale stays until it is swept out, and of a
 * million frames that takes a second, in which no request is scheduled. */
#include <stdint.h>
#include <stdlib.h>

#include "rows.h"

#define LEVELS 256
#define FRAMES_MAX (UINT32_C(1) << 30)
#define ROOM_MIN 16

typedef struct {
    uint64_t used;
    uint32_t frame;
} Entry;

typedef struct {
    Entry *entries; /* the oldest first; NULL if there is no room */
    uint32_t count, room;
} Heap;

typedef struct {
    PyObject_HEAD
    uint32_t *places; /* by frame: its place in its level's heap, plus 1; 0: it is in none */
    uint8_t *levels;  /* by frame */
    uint32_t frame_count, count;
    int level_count; /* up to the highest that anything was ever put at */
    Heap heaps[LEVELS];
} AgeHeaps;

static int is_before(Entry one, Entry other) {
    return one.used != other.used ? one.used < other.used : one.frame < other.frame;
}

static void set(AgeHeaps *self, Heap *heap, uint32_t place, Entry entry) {
    heap->entries[place] = entry;
    self->places[entry.frame] = place + 1;
}

/* Puts the entry where it belongs, beginning at a place that is free. */
static void sift(AgeHeaps *self, Heap *heap, uint32_t place, Entry entry) {
    while (place > 0 && is_before(entry, heap->entries[(place - 1) / 2])) {
        set(self, heap, place, heap->entries[(place - 1) / 2]);
        place = (place - 1) / 2;
    }
    for (uint32_t child = 2 * place + 1; child < heap->count; child = 2 * place + 1) {
        if (child + 1 < heap->count && is_before(heap->entries[child + 1], heap->entries[child])) child++;
        if (is_before(entry, heap->entries[child])) break;
        set(self, heap, place, heap->entries[child]);
        place = child;
    }
    set(self, heap, place, entry);
}

/* Room for so many entries; 0, or -1 with an exception. */
static int make_room(Heap *heap, uint32_t room) {
    Entry *entries = realloc(heap->entries, room * sizeof *entries);
    if (entries == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    heap->entries = entries;
    heap->room = room;
    return 0;
}

static void take_out(AgeHeaps *self, uint32_t frame) {
    Heap *heap = &self->heaps[self->levels[frame]];
    uint32_t place = self->places[frame] - 1;
    self->places[frame] = 0;
    self->count--;
    Entry last = heap->entries[--heap->count];
    if (last.frame != frame) sift(self, heap, place, last);
    /* Blocks that are used more often wander through the levels, and would leave room for all of them in each. */
    if (heap->count < heap->room / 4 && heap->room > ROOM_MIN && make_room(heap, heap->room / 2) != 0) PyErr_Clear();
}

static int put(AgeHeaps *self, Entry entry, uint8_t level) {
    Heap *heap = &self->heaps[level];
    uint32_t place = self->places[entry.frame];
    if (place != 0 && self->levels[entry.frame] == level) {
        sift(self, heap, place - 1, entry);
        return 0;
    }
    if (heap->count == heap->room && make_room(heap, heap->room == 0 ? ROOM_MIN : 2 * heap->room) != 0) return -1;
    if (place != 0) take_out(self, entry.frame);
    self->levels[entry.frame] = level;
    if (level >= self->level_count) self->level_count = level + 1;
    self->count++;
    heap->count++;
    sift(self, heap, heap->count - 1, entry);
    return 0;
}

static PyObject *ages_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"frame_count", NULL};
    Py_ssize_t frame_count;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "n", names, &frame_count)) return NULL;
    if (frame_count < 0 || frame_count > FRAMES_MAX)
        return PyErr_Format(PyExc_ValueError, "at most %u frames, not %zd", FRAMES_MAX, frame_count);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    AgeHeaps *self = (AgeHeaps *)allocate(type, 0);
    if (self == NULL) return NULL;
    self->frame_count = (uint32_t)frame_count;
    self->places = calloc((size_t)frame_count + 1, sizeof *self->places); /* + 1: none of 0 bytes is asked for */
    self->levels = calloc((size_t)frame_count + 1, sizeof *self->levels);
    if (self->places != NULL && self->levels != NULL) return (PyObject *)self;
    Py_DECREF(self);
    return PyErr_NoMemory();
}

static void ages_dealloc(AgeHeaps *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    for (int level = 0; level < LEVELS; level++) free(self->heaps[level].entries);
    free(self->places);
    free(self->levels);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The frame that the number says; -1 with an exception if there is none. */
static int64_t frame_of(const AgeHeaps *self, PyObject *number) {
    unsigned long long frame = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred()) return -1;
    if (frame < self->frame_count) return (int64_t)frame;
    PyErr_Format(PyExc_IndexError, "there is no frame %llu of %u", frame, (unsigned)self->frame_count);
    return -1;
}

static PyObject *ages_put(AgeHeaps *self, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "put takes a frame, a time and a level");
    int64_t frame = frame_of(self, arguments[0]);
    if (frame < 0) return NULL;
    unsigned long long used = PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    unsigned long long level = PyLong_AsUnsignedLongLong(arguments[2]);
    if (PyErr_Occurred()) return NULL;
    if (level >= LEVELS) return PyErr_Format(PyExc_IndexError, "there is no level %llu of %d", level, LEVELS);
    if (put(self, (Entry){.used = used, .frame = (uint32_t)frame}, (uint8_t)level) != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *ages_drop(AgeHeaps *self, PyObject *number) {
    int64_t frame = frame_of(self, number);
    if (frame < 0) return NULL;
    if (self->places[frame] != 0) take_out(self, (uint32_t)frame);
    Py_RETURN_NONE;
}

static const Entry *least(const AgeHeaps *self, const double *worths, double half_life) {
    const Entry *found = NULL;
    double least = 0;
    for (int level = 0; level < self->level_count; level++) {
        const Heap *heap = &self->heaps[level];
        if (heap->count == 0) continue;
        double worth = worths[level] + (double)heap->entries[0].used / half_life;
        if (found == NULL || worth < least) {
            found = &heap->entries[0];
            least = worth;
        }
    }
    return found;
}

static PyObject *ages_least(AgeHeaps *self, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "least takes the worths of levels and a half-life");
    double half_life = PyFloat_AsDouble(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    Py_buffer worths;
    if (PyObject_GetBuffer(arguments[0], &worths, PyBUF_C_CONTIGUOUS) != 0) return NULL;
    if (worths.len != LEVELS * (Py_ssize_t)sizeof(double) || (uintptr_t)worths.buf % sizeof(double) != 0) {
        PyBuffer_Release(&worths);
        return PyErr_Format(PyExc_ValueError, "the worths of %d levels are as many aligned doubles", LEVELS);
    }
    const Entry *found = least(self, worths.buf, half_life);
    PyBuffer_Release(&worths);
    if (found == NULL) Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(found->frame);
}

static int fill(AgeHeaps *self, const Py_buffer *frames, const Py_buffer *used) {
    size_t count = (size_t)frames->len / sizeof(int64_t);
    if (frames->len != used->len || (size_t)frames->len % sizeof(int64_t) != 0 || self->count != 0 || count > self->frame_count) {
        PyErr_SetString(PyExc_ValueError, "expected empty heaps, and a time for each of at most all frames");
        return -1;
    }
    if (count == 0) return 0;
    if (((uintptr_t)frames->buf | (uintptr_t)used->buf) % sizeof(int64_t) != 0) {
        PyErr_SetString(PyExc_ValueError, "expected aligned numbers");
        return -1;
    }
    if (make_room(&self->heaps[0], (uint32_t)count) != 0) return -1;
    if (self->level_count == 0) self->level_count = 1;
    const int64_t *frame = frames->buf, *time = used->buf;
    for (size_t i = 0; i < count; i++) {
        if (frame[i] < 0 || frame[i] >= self->frame_count || self->places[frame[i]] != 0 || time[i] < 0) {
            PyErr_Format(PyExc_ValueError, "frame %lld at time %lld is no frame, twice there or in no time", frame[i], time[i]);
            return -1;
        }
        self->levels[frame[i]] = 0; /* it may have had another before */
        self->count++;
        self->heaps[0].count++;
        sift(self, &self->heaps[0], (uint32_t)i, (Entry){.used = (uint64_t)time[i], .frame = (uint32_t)frame[i]});
    }
    return 0;
}

static PyObject *ages_fill(AgeHeaps *self, PyObject *arguments) {
    PyObject *frames, *used;
    Py_buffer frame_view, used_view;
    if (!PyArg_ParseTuple(arguments, "OO", &frames, &used)) return NULL;
    if (get_buffers(frames, &frame_view, used, &used_view, 0) != 0) return NULL;
    int status = fill(self, &frame_view, &used_view);
    PyBuffer_Release(&used_view);
    PyBuffer_Release(&frame_view);
    if (status != 0) return NULL;
    Py_RETURN_NONE;
}

static int ages_contains(AgeHeaps *self, PyObject *number) {
    int64_t frame = frame_of(self, number);
    return frame < 0 ? -1 : self->places[frame] != 0;
}

static Py_ssize_t ages_length(AgeHeaps *self) { return self->count; }

static PyMethodDef ages_methods[] = {
    {"put", (PyCFunction)(void (*)(void))ages_put, METH_FASTCALL, NULL},
    {"drop", (PyCFunction)ages_drop, METH_O, NULL},
    {"least", (PyCFunction)(void (*)(void))ages_least, METH_FASTCALL, NULL},
    {"fill", (PyCFunction)ages_fill, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ages_slots[] = {
    {Py_tp_new, (void *)ages_new},
    {Py_tp_dealloc, (void *)ages_dealloc},
    {Py_tp_methods, ages_methods},
    {Py_sq_contains, (void *)ages_contains},
    {Py_sq_length, (void *)ages_length},
    {0, NULL},
};

PyType_Spec kvo_ages_spec = {
    .name = "kvoffload._rows.AgeHeaps",
    .basicsize = sizeof(AgeHeaps),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ages_slots,
};
