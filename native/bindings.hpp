// What the bind_*.cpp files share: array types as Python passes them, and checks of their shapes. Tensors cross by
// DLPack without a copy, shapes and types are checked before the core is called, and the GIL is released where a call is long.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace outrider {

namespace nb = nanobind;

template <class T, int dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

using IntVector = Array<const int64_t, 1>;
using FloatVector = Array<const float, 1>;
using DoubleVector = Array<const double, 1>;
using IntMatrix = Array<const int64_t, 2>;
using FloatMatrix = Array<const float, 2>;
using IntVectorOut = Array<int64_t, 1>;
using IntMatrixOut = Array<int64_t, 2>;
using FloatMatrixOut = Array<float, 2>;

inline void expect_shape(const char* name, int64_t rows, int64_t width, int64_t want_rows, int64_t want_width) {
  if (rows == want_rows && width == want_width) return;
  throw std::invalid_argument(std::string(name) + " has shape [" + std::to_string(rows) + ", " + std::to_string(width) +
                              "], expected [" + std::to_string(want_rows) + ", " + std::to_string(want_width) + "]");
}

template <class Matrix>
void expect_matrix(const char* name, const Matrix& array, int64_t want_rows, int64_t want_width) {
  expect_shape(name, array.shape(0), array.shape(1), want_rows, want_width);
}

template <class T>
auto* data_or_null(const std::optional<T>& array) {
  return array ? array->data() : nullptr;
}

void bind_stack(nb::module_& m);
void bind_drafters(nb::module_& m);
void bind_markov(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_scheduling(nb::module_& m);
void bind_diagnostics(nb::module_& m);

}  // namespace outrider
