// Choosing tokens from rows of logits, with all threads of the pool where the rows are large.
#pragma once

#include <cstdint>

namespace outrider {

// Where each row's largest entry first stands. [rows, width] -> [rows]
void argmax(const float* logits, int64_t rows, int64_t width, int64_t* out);

// log(sum(exp(row))), summed in one order whatever the number of rows or threads. [rows, width] -> [rows]
void logsumexp(const float* logits, int64_t rows, int64_t width, double* out);

// The column of each row's largest logit / divisor + Gumbel value, as outrider.noise defines it: float64 decides, the
// lowest column on ties. ids [rows, width]: the token of each column, null where column v is token v. divisors: null
// for 1. Throws std::invalid_argument for NaN or +inf.
void gumbel_argmax(const float* logits, int64_t rows, int64_t width, const int64_t* keys, const float* divisors,
                   const int64_t* ids, int64_t* out);

}  // namespace outrider
