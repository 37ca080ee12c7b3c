/* keymap.c - kvoffload._rows.KeyMap: which row holds which block key. kvoffload/_rows.pyi is the manual.
 *
 * A dict of keys takes a key object, a number object and 42 bytes for each block; here a block is its key in its row, and a
 * bucket of 8 bytes, of which there are 1.3 to 2.7 a row. Open addressing with linear probing, and with removals that leave
 * no tombstones: Knuth, The Art of Computer Programming 3, 2nd edition, 6.4, algorithms L and R. Hashes are seeded, so
 * that nobody who chooses prompts chooses buckets. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "rows.h"

#define KEY_BYTES_MAX 255
#define ROWS_MAX (UINT32_C(1) << 30) /* so that 32 bits of a hash choose among all buckets */
#define AHEAD 16                     /* keys whose buckets are fetched before their turn, when there are many */

typedef struct {
    uint32_t after; /* the row's number plus 1; 0: empty */
    uint32_t hash;
} Bucket;

typedef struct {
    PyObject_HEAD
    Bucket *buckets; /* MAP_FAILED if there is no memory */
    uint8_t *rows;   /* behind them, of row_bytes: the key's length, the key, zeros; length 0: empty */
    size_t row_bytes;
    uint32_t row_count, mask, count;
    uint64_t seed;
} KeyMap;

/* Where the key is, or else the empty bucket where it would be. At most three in four are full, so there is one. */
static Bucket *find(const KeyMap *self, const uint8_t *key, size_t length, uint32_t *hash) {
    *hash = (uint32_t)XXH3_64bits_withSeed(key, length, self->seed);
    for (uint32_t i = *hash & self->mask;; i = (i + 1) & self->mask) {
        Bucket *bucket = &self->buckets[i];
        if (bucket->after == 0) return bucket;
        if (bucket->hash != *hash) continue;
        const uint8_t *row = self->rows + (size_t)(bucket->after - 1) * self->row_bytes;
        if (row[0] == length && memcmp(row + 1, key, length) == 0) return bucket;
    }
}

/* Empties the bucket; those behind it move up, each no further than to where its hash would have put it. */
static void empty(KeyMap *self, Bucket *bucket) {
    uint32_t hole = (uint32_t)(bucket - self->buckets);
    for (uint32_t i = (hole + 1) & self->mask; self->buckets[i].after != 0; i = (i + 1) & self->mask) {
        uint32_t home = self->buckets[i].hash & self->mask;
        if (((i - home) & self->mask) < ((i - hole) & self->mask)) continue;
        self->buckets[hole] = self->buckets[i];
        hole = i;
    }
    self->buckets[hole].after = 0;
}

/* 0, or -1 with an exception. */
static int insert(KeyMap *self, const uint8_t *key, size_t length, size_t row) {
    if (length == 0 || length >= self->row_bytes) {
        PyErr_Format(PyExc_ValueError, "a key has 1 to %zu bytes, not %zu", self->row_bytes - 1, length);
        return -1;
    }
    if (row >= self->row_count) {
        PyErr_Format(PyExc_IndexError, "there is no row %zu of %u", row, (unsigned)self->row_count);
        return -1;
    }
    uint8_t *place = self->rows + row * self->row_bytes;
    uint32_t hash;
    Bucket *bucket = find(self, key, length, &hash);
    if (place[0] != 0 || bucket->after != 0) {
        PyErr_Format(PyExc_ValueError, place[0] != 0 ? "row %zu has a key" : "the key for row %zu is there already", row);
        return -1;
    }
    place[0] = (uint8_t)length;
    memcpy(place + 1, key, length);
    *bucket = (Bucket){.after = (uint32_t)row + 1, .hash = hash};
    self->count++;
    return 0;
}

static size_t mapped_bytes(const KeyMap *self) {
    return ((size_t)self->mask + 1) * sizeof(Bucket) + self->row_count * self->row_bytes;
}

static PyObject *keymap_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"row_count", "key_bytes", NULL};
    Py_ssize_t row_count, key_bytes;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "nn", names, &row_count, &key_bytes)) return NULL;
    if (row_count < 0 || row_count > ROWS_MAX)
        return PyErr_Format(PyExc_ValueError, "at most %u rows, not %zd", ROWS_MAX, row_count);
    if (key_bytes < 1 || key_bytes > KEY_BYTES_MAX)
        return PyErr_Format(PyExc_ValueError, "keys of 1 to %d bytes, not %zd", KEY_BYTES_MAX, key_bytes);
    size_t buckets = 8;
    while (buckets * 3 < (size_t)row_count * 4) buckets *= 2;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    KeyMap *self = (KeyMap *)allocate(type, 0);
    if (self == NULL) return NULL;
    self->row_count = (uint32_t)row_count;
    self->row_bytes = 1 + (size_t)key_bytes;
    self->mask = (uint32_t)(buckets - 1);
    self->buckets = mmap(NULL, mapped_bytes(self), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (self->buckets == MAP_FAILED) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    if (getentropy(&self->seed, sizeof self->seed) != 0) {
        Py_DECREF(self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    /* With small pages a look-up of a cold key among a million takes a fifth longer, for its TLB misses. A kernel without
     * huge pages does without. */
    (void)madvise(self->buckets, mapped_bytes(self), MADV_HUGEPAGE);
    self->rows = (uint8_t *)(self->buckets + buckets);
    return (PyObject *)self;
}

static void keymap_dealloc(KeyMap *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->buckets != MAP_FAILED) (void)munmap(self->buckets, mapped_bytes(self));
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The key's bucket, empty if it is not there; NULL with an exception if that is no key. */
static Bucket *bucket_of(const KeyMap *self, PyObject *key) {
    char *bytes;
    Py_ssize_t length;
    uint32_t hash;
    if (PyBytes_AsStringAndSize(key, &bytes, &length) != 0) return NULL;
    return find(self, (const uint8_t *)bytes, (size_t)length, &hash);
}

static PyObject *keymap_get(KeyMap *self, PyObject *key) {
    const Bucket *bucket = bucket_of(self, key);
    if (bucket == NULL) return NULL;
    if (bucket->after == 0) Py_RETURN_NONE;
    return PyLong_FromUnsignedLong(bucket->after - 1);
}

static int keymap_contains(KeyMap *self, PyObject *key) {
    const Bucket *bucket = bucket_of(self, key);
    return bucket == NULL ? -1 : bucket->after != 0;
}

static PyObject *keymap_put(KeyMap *self, PyObject *arguments) {
    const char *key;
    Py_ssize_t length;
    PyObject *number;
    if (!PyArg_ParseTuple(arguments, "y#O", &key, &length, &number)) return NULL;
    unsigned long long row = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred()) return NULL;
    if (insert(self, (const uint8_t *)key, (size_t)length, row) != 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *keymap_pop(KeyMap *self, PyObject *key) {
    Bucket *bucket = bucket_of(self, key);
    if (bucket == NULL) return NULL;
    if (bucket->after == 0) Py_RETURN_NONE;
    uint32_t row = bucket->after - 1;
    memset(self->rows + row * self->row_bytes, 0, self->row_bytes);
    empty(self, bucket);
    self->count--;
    return PyLong_FromUnsignedLong(row);
}

static PyObject *keymap_key(KeyMap *self, PyObject *number) {
    unsigned long long row = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred()) return NULL;
    if (row >= self->row_count)
        return PyErr_Format(PyExc_IndexError, "there is no row %llu of %u", row, (unsigned)self->row_count);
    const uint8_t *place = self->rows + row * self->row_bytes;
    return PyBytes_FromStringAndSize((const char *)place + 1, place[0]);
}

static int fill(KeyMap *self, const Py_buffer *keys, const Py_buffer *rows) {
    size_t count = (size_t)rows->len / sizeof(uint32_t);
    if ((size_t)keys->len != count * self->row_bytes || (size_t)rows->len % sizeof(uint32_t) != 0) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of keys are not %zu for each of %zu rows", keys->len, self->row_bytes,
                     count);
        return -1;
    }
    const uint8_t *key = keys->buf, *number = rows->buf;
    for (size_t i = 0; i < count; i++, key += self->row_bytes, number += sizeof(uint32_t)) {
        const uint8_t *next = key + AHEAD * self->row_bytes;
        if (i + AHEAD < count && next[0] < self->row_bytes) {
            uint64_t hash = XXH3_64bits_withSeed(next + 1, next[0], self->seed);
            __builtin_prefetch(&self->buckets[hash & self->mask], 1);
        }
        uint32_t row;
        memcpy(&row, number, sizeof row);
        if (insert(self, key + 1, key[0], row) != 0) return -1;
    }
    return 0;
}

static PyObject *keymap_fill(KeyMap *self, PyObject *arguments) {
    PyObject *keys, *rows;
    Py_buffer key_view, row_view;
    if (!PyArg_ParseTuple(arguments, "OO", &keys, &rows)) return NULL;
    if (get_buffers(keys, &key_view, rows, &row_view, 0) != 0) return NULL;
    int status = fill(self, &key_view, &row_view);
    PyBuffer_Release(&row_view);
    PyBuffer_Release(&key_view);
    if (status != 0) return NULL;
    Py_RETURN_NONE;
}

static Py_ssize_t keymap_length(KeyMap *self) { return self->count; }

static PyMethodDef keymap_methods[] = {
    {"get", (PyCFunction)keymap_get, METH_O, NULL},
    {"put", (PyCFunction)keymap_put, METH_VARARGS, NULL},
    {"pop", (PyCFunction)keymap_pop, METH_O, NULL},
    {"key", (PyCFunction)keymap_key, METH_O, NULL},
    {"fill", (PyCFunction)keymap_fill, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot keymap_slots[] = {
    {Py_tp_new, (void *)keymap_new},
    {Py_tp_dealloc, (void *)keymap_dealloc},
    {Py_tp_methods, keymap_methods},
    {Py_sq_contains, (void *)keymap_contains},
    {Py_sq_length, (void *)keymap_length},
    {0, NULL},
};

PyType_Spec kvo_keymap_spec = {
    .name = "kvoffload._rows.KeyMap",
    .basicsize = sizeof(KeyMap),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = keymap_slots,
};
