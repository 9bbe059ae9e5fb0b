// What the files of kernels that put csrc/simt to the test share.
#pragma once

#include <pybind11/pybind11.h>

struct Cells {
  int cell[1024];
};

// Adds the functions of simt_grid_selftest.cpp to the module of simt_selftest.cpp.
void bind_simt_grid(pybind11::module_& m);
