/* module.c - kvoffload._rows: what tables of a million rows need done in C. kvoffload/_rows.pyi is the manual. */
#include <stdint.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "rows.h"

#define ROW_BYTES_MAX 65536 /* so that no product overflows */

typedef struct {
    Py_ssize_t row_bytes, begin, end; /* of a row, and what of it is summed */
    uint64_t seed;
} Sum;

static void sum_rows(const Sum *sum, const uint8_t *rows, uint8_t *sums, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        size_t summed = (size_t)(sum->end - sum->begin);
        uint64_t found = XXH3_64bits_withSeed(rows + i * sum->row_bytes + sum->begin, summed, sum->seed);
        memcpy(sums + (size_t)i * sizeof found, &found, sizeof found);
    }
}

static PyObject *rows_checksums(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *rows, *sums;
    Py_buffer row_view, sum_view;
    Sum sum = {0};
    unsigned long long seed;
    if (!PyArg_ParseTuple(arguments, "OnnnKO", &rows, &sum.row_bytes, &sum.begin, &sum.end, &seed, &sums)) return NULL;
    sum.seed = seed;
    if (get_buffers(rows, &row_view, sums, &sum_view, PyBUF_WRITABLE) != 0) return NULL;
    Py_ssize_t count = sum_view.len / (Py_ssize_t)sizeof(uint64_t);
    int is_range = 0 <= sum.begin && sum.begin <= sum.end && sum.end <= sum.row_bytes && sum.row_bytes <= ROW_BYTES_MAX;
    int fits = is_range && row_view.len == count * sum.row_bytes;
    if (fits) sum_rows(&sum, row_view.buf, sum_view.buf, count);
    else PyErr_SetString(PyExc_ValueError, "expected as many rows of row_bytes as sums, and begin and end in a row");
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

static int add_type(PyObject *module, PyType_Spec *spec) {
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL) return -1;
    int status = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return status;
}

PyMODINIT_FUNC PyInit__rows(void) {
    PyObject *made = PyModule_Create(&definition);
    if (made == NULL) return NULL;
    if (add_type(made, &kvo_keymap_spec) == 0 && add_type(made, &kvo_ages_spec) == 0) return made;
    Py_DECREF(made);
    return NULL;
}
