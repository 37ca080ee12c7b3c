/* rows.h - what the files of kvoffload._rows share. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Two buffers of items that lie one behind the other, the second with these flags beside. Both or none, with an exception. */
static inline int get_buffers(PyObject *first, Py_buffer *first_view, PyObject *second, Py_buffer *second_view, int flags) {
    if (PyObject_GetBuffer(first, first_view, PyBUF_C_CONTIGUOUS) != 0) return -1;
    if (PyObject_GetBuffer(second, second_view, PyBUF_C_CONTIGUOUS | flags) == 0) return 0;
    PyBuffer_Release(first_view);
    return -1;
}

extern PyType_Spec kvo_keymap_spec, kvo_ages_spec;
