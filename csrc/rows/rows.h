/* rows.h - what the files of kvoffload._rows share. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyType_Spec kvo_keymap_spec, kvo_ages_spec;
