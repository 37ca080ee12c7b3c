/* module.c - kvoffload._rows: what tables of a million rows need done in C. kvoffload/_rows.pyi is the manual. */
#include <stdint.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "rows.h"

static void sum_rows(const uint8_t *row, size_t row_bytes, size_t summed_bytes, uint64_t *sums, size_t count) {
    for (size_t i = 0; i < count; i++, row += row_bytes) sums[i] = XXH3_64bits(row, summed_bytes);
}

static PyObject *rows_checksums(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *rows, *sums;
    Py_buffer row_view, sum_view;
    unsigned int row_bytes, summed_bytes;
    if (!PyArg_ParseTuple(arguments, "OIIO", &rows, &row_bytes, &summed_bytes, &sums)) return NULL;
    if (PyObject_GetBuffer(rows, &row_view, PyBUF_C_CONTIGUOUS) != 0) return NULL;
    if (PyObject_GetBuffer(sums, &sum_view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) != 0) {
        PyBuffer_Release(&row_view);
        return NULL;
    }
    size_t count = (size_t)sum_view.len / sizeof(uint64_t);
    int fits = summed_bytes <= row_bytes && (size_t)row_view.len == count * row_bytes;
    if (fits) sum_rows(row_view.buf, row_bytes, summed_bytes, sum_view.buf, count);
    else PyErr_SetString(PyExc_ValueError, "expected as many rows of row_bytes as sums, and not more summed of each");
    PyBuffer_Release(&sum_view);
    PyBuffer_Release(&row_view);
    if (!fits) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"checksums", rows_checksums, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_rows", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__rows(void) {
    PyObject *made = PyModule_Create(&definition);
    if (made == NULL) return NULL;
    PyObject *type = PyType_FromSpec(&kvo_keymap_spec);
    if (type == NULL || PyModule_AddType(made, (PyTypeObject *)type) != 0) {
        Py_XDECREF(type);
        Py_DECREF(made);
        return NULL;
    }
    Py_DECREF(type);
    return made;
}
