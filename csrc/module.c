/* module.c - kvoffload.engine._core: Python's arguments to kvo.h's and back, and errors as exceptions. The GIL is
 * released wherever time can pass. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <unistd.h>

#include "kvo.h"

typedef struct {
    PyObject_HEAD
    kvo_engine *engine; /* NULL when closed */
    pid_t owner;        /* the process that has the engine's threads */
    int busy;           /* calls that are inside the engine without the GIL */
} CoreEngine;

static PyObject *raise_os_error(int status, const char *sentence) {
    /* A path need not be UTF-8, and a long sentence may end within a character. */
    PyObject *arguments = Py_BuildValue("(iN)", -status, PyUnicode_DecodeFSDefault(sentence));
    if (arguments != NULL) {
        PyErr_SetObject(PyExc_OSError, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

/* Enters the engine, or raises. Every success is followed by leave(). */
static kvo_engine *enter(CoreEngine *self) {
    if (self->engine == NULL) PyErr_SetString(PyExc_ValueError, "the engine is closed");
    else if (self->owner != getpid())
        PyErr_SetString(PyExc_RuntimeError, "the engine belongs to the process that opened it");
    else {
        self->busy++;
        return self->engine;
    }
    return NULL;
}

static void leave(CoreEngine *self) { self->busy--; }

/* A buffer of whole items, or raises. */
static int get_items(PyObject *source, Py_buffer *view, int flags, size_t item_bytes, const char *what) {
    if (PyObject_GetBuffer(source, view, flags | PyBUF_C_CONTIGUOUS) != 0) return -1;
    if ((size_t)view->len % item_bytes == 0 && (size_t)view->len / item_bytes <= INT32_MAX) return 0;
    PyErr_Format(PyExc_ValueError, "%s: %zd bytes are no array of items of %zu bytes", what, view->len, item_bytes);
    PyBuffer_Release(view);
    return -1;
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    unsigned long long payload_bytes;
    kvo_options options = {0};
    static char *names[] = {"payload_bytes", "dram_slots", "spare_slots", "max_ops",
                            "io_depth",      "io_backend", "device",      NULL};
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "KIIIIii", names, &payload_bytes, &options.dram_slots,
                                     &options.spare_slots, &options.max_ops, &options.io_depth, &options.io_backend,
                                     &options.device))
        return NULL;
    options.payload_bytes = payload_bytes;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    CoreEngine *self = (CoreEngine *)allocate(type, 0);
    if (self == NULL) return NULL;
    char err[KVO_ERR_BYTES] = "";
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = kvo_open(&self->engine, &options, err);
    Py_END_ALLOW_THREADS
    if (status == 0) {
        self->owner = getpid();
        return (PyObject *)self;
    }
    Py_DECREF(self);
    if (status == -EINVAL) return PyErr_Format(PyExc_ValueError, "%s", err);
    return raise_os_error(status, err);
}

static PyObject *core_close(CoreEngine *self, PyObject *unused) {
    (void)unused;
    if (self->busy > 0) return PyErr_Format(PyExc_RuntimeError, "another thread is inside the engine");
    kvo_engine *engine = self->engine;
    self->engine = NULL;
    if (engine != NULL && self->owner == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        kvo_close(engine);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static void core_dealloc(CoreEngine *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->engine != NULL && self->owner == getpid()) kvo_close(self->engine);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *core_bind(CoreEngine *self, PyObject *arguments) {
    PyObject *regions, *first;
    if (!PyArg_ParseTuple(arguments, "OO", &regions, &first)) return NULL;
    Py_buffer region_view, first_view;
    if (get_items(regions, &region_view, PyBUF_SIMPLE, sizeof(kvo_region), "regions") != 0) return NULL;
    if (get_items(first, &first_view, PyBUF_SIMPLE, sizeof(uint32_t), "first") != 0) {
        PyBuffer_Release(&region_view);
        return NULL;
    }
    int status = -EINVAL;
    char err[KVO_ERR_BYTES] = "first: expected indexes that begin with 0 and end with the number of regions";
    const uint32_t *index = first_view.buf;
    size_t entries = (size_t)first_view.len / sizeof *index, count = (size_t)region_view.len / sizeof(kvo_region);
    kvo_engine *engine = enter(self);
    if (engine != NULL) {
        if (entries >= 2 && index[0] == 0 && index[entries - 1] == count)
            status = kvo_bind(engine, region_view.buf, index, (uint32_t)entries - 1, err);
        leave(self);
    }
    PyBuffer_Release(&first_view);
    PyBuffer_Release(&region_view);
    if (engine == NULL) return NULL;
    if (status != 0) return PyErr_Format(PyExc_ValueError, "%s", err);
    Py_RETURN_NONE;
}

static PyObject *core_attach(CoreEngine *self, PyObject *arguments) {
    PyObject *paths;
    unsigned own_directories, slot_count;
    const char *fingerprint;
    Py_ssize_t fingerprint_bytes;
    if (!PyArg_ParseTuple(arguments, "O!IIy#", &PyTuple_Type, &paths, &own_directories, &slot_count, &fingerprint,
                          &fingerprint_bytes))
        return NULL;
    if (fingerprint_bytes != KVO_FINGERPRINT_BYTES)
        return PyErr_Format(PyExc_ValueError, "a fingerprint of %zd bytes, expected %d", fingerprint_bytes,
                            KVO_FINGERPRINT_BYTES);
    Py_ssize_t count = PyTuple_Size(paths);
    const char **names = PyMem_Calloc((size_t)count + 1, sizeof *names);
    if (names == NULL) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        names[i] = PyBytes_AsString(PyTuple_GetItem(paths, i));
        if (names[i] == NULL) {
            PyMem_Free(names);
            return NULL;
        }
    }
    kvo_engine *engine = enter(self);
    int status = 0;
    char err[KVO_ERR_BYTES] = "";
    if (engine != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = kvo_attach(engine, names, (uint32_t)count, own_directories, slot_count, (const uint8_t *)fingerprint, err);
        Py_END_ALLOW_THREADS
        leave(self);
    }
    PyMem_Free(names);
    if (engine == NULL) return NULL;
    if (status != 0) return raise_os_error(status, err);
    Py_RETURN_NONE;
}

static PyObject *core_submit(CoreEngine *self, PyObject *arguments) {
    PyObject *ops;
    unsigned long long stream;
    if (!PyArg_ParseTuple(arguments, "OK", &ops, &stream)) return NULL;
    Py_buffer view;
    if (get_items(ops, &view, PyBUF_SIMPLE, sizeof(kvo_op), "ops") != 0) return NULL;
    kvo_engine *engine = enter(self);
    int taken = 0;
    if (engine != NULL) {
        Py_BEGIN_ALLOW_THREADS
        taken = kvo_submit(engine, view.buf, (uint32_t)((size_t)view.len / sizeof(kvo_op)), stream);
        Py_END_ALLOW_THREADS
        leave(self);
    }
    PyBuffer_Release(&view);
    if (engine == NULL) return NULL;
    if (taken < 0)
        return PyErr_Format(
            PyExc_ValueError,
            "malformed operation: kind, flags, link, slot, group or key out of range, or nothing bound");
    return PyLong_FromLong(taken);
}

static PyObject *core_poll(CoreEngine *self, PyObject *out) {
    Py_buffer view;
    if (get_items(out, &view, PyBUF_WRITABLE, sizeof(kvo_completion), "completions") != 0) return NULL;
    kvo_engine *engine = enter(self);
    int count = 0;
    if (engine != NULL) {
        count = kvo_poll(engine, view.buf, (uint32_t)((size_t)view.len / sizeof(kvo_completion)));
        leave(self);
    }
    PyBuffer_Release(&view);
    return engine == NULL ? NULL : PyLong_FromLong(count);
}

static PyObject *core_wait(CoreEngine *self, PyObject *argument) {
    unsigned long long timeout_us = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred()) return NULL;
    kvo_engine *engine = enter(self);
    if (engine == NULL) return NULL;
    int ready;
    Py_BEGIN_ALLOW_THREADS
    ready = kvo_wait(engine, timeout_us);
    Py_END_ALLOW_THREADS
    leave(self);
    return PyBool_FromLong(ready);
}

static PyObject *per_kind(const uint64_t counts[4]) {
    return Py_BuildValue("(KKKK)", (unsigned long long)counts[0], (unsigned long long)counts[1],
                         (unsigned long long)counts[2], (unsigned long long)counts[3]);
}

static PyObject *core_stats(CoreEngine *self, PyObject *unused) {
    (void)unused;
    kvo_engine *engine = enter(self);
    if (engine == NULL) return NULL;
    kvo_stats_t stats;
    kvo_stats(engine, &stats);
    leave(self);
    return Py_BuildValue("{sNsNsNsNsKsKsKsKsK}", "ops", per_kind(stats.ops), "failed", per_kind(stats.failed), "bytes",
                         per_kind(stats.bytes), "usec", per_kind(stats.usec), "queued",
                         (unsigned long long)stats.queued, "in_flight", (unsigned long long)stats.in_flight,
                         "abandoned", (unsigned long long)stats.abandoned, "arena_bytes",
                         (unsigned long long)stats.arena_bytes, "huge_bytes", (unsigned long long)stats.huge_bytes);
}

static PyObject *core_describe(CoreEngine *self, PyObject *unused) {
    (void)unused;
    kvo_engine *engine = enter(self);
    if (engine == NULL) return NULL;
    char text[16384];
    Py_BEGIN_ALLOW_THREADS
    kvo_describe(engine, text, sizeof text);
    Py_END_ALLOW_THREADS
    leave(self);
    return PyUnicode_DecodeFSDefault(text);
}

static PyMethodDef core_methods[] = {
    {"bind", (PyCFunction)core_bind, METH_VARARGS, NULL},
    {"attach", (PyCFunction)core_attach, METH_VARARGS, NULL},
    {"submit", (PyCFunction)core_submit, METH_VARARGS, NULL},
    {"poll", (PyCFunction)core_poll, METH_O, NULL},
    {"wait", (PyCFunction)core_wait, METH_O, NULL},
    {"stats", (PyCFunction)core_stats, METH_NOARGS, NULL},
    {"describe", (PyCFunction)core_describe, METH_NOARGS, NULL},
    {"close", (PyCFunction)core_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_new, (void *)core_new},
    {Py_tp_dealloc, (void *)core_dealloc},
    {Py_tp_methods, core_methods},
    {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "kvoffload.engine._core.CoreEngine",
    .basicsize = sizeof(CoreEngine),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_core", .m_size = -1};

PyMODINIT_FUNC PyInit__core(void) {
    PyObject *made = PyModule_Create(&module);
    if (made == NULL) return NULL;
    PyObject *type = PyType_FromSpec(&core_spec);
    if (type == NULL || PyModule_AddType(made, (PyTypeObject *)type) != 0 ||
        PyModule_AddIntConstant(made, "OP_BYTES", sizeof(kvo_op)) != 0 ||
        PyModule_AddIntConstant(made, "COMPLETION_BYTES", sizeof(kvo_completion)) != 0 ||
        PyModule_AddIntConstant(made, "FORMAT_VERSION", KVO_FORMAT_VERSION) != 0) {
        Py_XDECREF(type);
        Py_DECREF(made);
        return NULL;
    }
    Py_DECREF(type);
    return made;
}
