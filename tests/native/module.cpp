// The native test module: what pytest sees of csrc/core and csrc/simt. Never shipped.
#include <pybind11/pybind11.h>

void bind_core(pybind11::module_& m);
void bind_simt(pybind11::module_& m);

PYBIND11_MODULE(fastsel_native, m) {
  bind_core(m);
  bind_simt(m);
}
