// The Python module outrider._native.
#include "bindings.hpp"

namespace outrider {

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);
  bind_stack(m);
  bind_markov(m);
  bind_drafters(m);
  bind_sampling(m);
  bind_scheduling(m);
  bind_diagnostics(m);
}

}  // namespace outrider
