#include "markov.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "pack.hpp"
#include "sampler.hpp"

namespace outrider {

namespace {

constexpr int64_t kRowsAtOnce = 128;          // of a matrix, for one thread
constexpr int64_t kWorthSharing = 64 * 1024;  // products below which waking other threads costs more than it saves
constexpr int kSteps = 12;                     // of interpolation in the search for a bound
constexpr float kRounding = 2e-5f;            // relative slack of the bound
constexpr int64_t kLonger = 2;                // times the shortlist's length: what a greedy draft may look at
constexpr float kUp = 1.0f + 1e-6f;

// out[i] = row rows[i] of w times z.
void products(ThreadPool& pool, const Kernels& kernels, const RowMajor& w, const float* z,
              const std::vector<int32_t>& rows, float* out) {
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count * w.inner < kWorthSharing) return kernels.dot_rows(w, z, rows.data(), count, out);
  pool.run([&](int thread) {
    pool.deal(thread, (count + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t piece) {
      const int64_t first = piece * kRowsAtOnce;
      kernels.dot_rows(w, z, rows.data() + first, std::min(kRowsAtOnce, count - first), out + first);
    });
  });
}

float norm(const float* x, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(std::sqrt(sum)) * kUp;
}

}  // namespace

// ------------------------------------------------------------------------------------------------ loading

MarkovHead::MarkovHead(MarkovSpec spec, const float* w1, const float* w2, const float* mix, const int64_t* ids)
    : spec_(std::move(spec)), kernels_(find_kernels(spec_.isa)) {
  const int rank = spec_.rank;
  spec_.shortlist = std::clamp(spec_.shortlist, 1, spec_.drafted);
  w1_ = pack(w1, spec_.vocabulary, rank);
  w2_ = pack(w2, spec_.drafted, rank);
  if (mix) mix_ = pack(mix, mixed_width(), spec_.kind == MarkovKind::rnn ? 2 * rank : rank);
  if (ids) ids_.assign(ids, ids + spec_.drafted);
  mix_rows_.resize(mixed_width());
  std::iota(mix_rows_.begin(), mix_rows_.end(), 0);
  std::vector<float> row(w2_.inner);
  for (int64_t v = 0; v < spec_.drafted; v++) {
    unpack_row(w2_.dtype, w2_.data + v * w2_.row_bytes, w2_.inner, kernels_.panel, row.data());
    norms_.push_back(norm(row.data(), rank));
  }
  largest_norm_ = *std::max_element(norms_.begin(), norms_.end());
}

RowMajor MarkovHead::pack(const float* matrix, int64_t rows, int width) {
  RowMajor to;
  to.dtype = spec_.dtype;
  to.inner = static_cast<int>(round_up(width, kernels_.panel));
  to.row_bytes = static_cast<size_t>(to.inner) * (to.dtype == DType::f32 ? 4 : 2);
  char* data = arena_.take<char>(to.row_bytes * rows);
  for (int64_t r = 0; r < rows; r++)
    pack_row(to.dtype, matrix + r * width, width, to.inner, kernels_.panel, data + r * to.row_bytes);
  to.data = data;
  return to;
}

int MarkovHead::mixed_width() const {
  return spec_.kind == MarkovKind::vanilla ? 0 : spec_.kind == MarkovKind::gated ? spec_.rank : 3 * spec_.rank;
}

// ------------------------------------------------------------------------------------------------ a block

void MarkovHead::draft(const MarkovBlock& block) {
  const int64_t count = block.rows * block.drafts, width = spec_.drafted;
  for (int64_t b = 0; b < block.rows; b++)
    if (block.anchors[b] < 0 || block.anchors[b] >= spec_.vocabulary)
      throw std::invalid_argument("token id " + std::to_string(block.anchors[b]) + " is outside 0 .. " +
                                  std::to_string(spec_.vocabulary - 1));
  const auto pool = shared_pool();
  std::vector<List> lists(count);
  pool->run([&](int thread) {
    pool->deal(thread, count, [&](int64_t i) { choose(block.base + i * width, lists[i]); });
  });
  for (const List& list : lists)
    if (list.places.empty())
      throw std::invalid_argument("logits must be numbers, got NaN or infinity; the weights or the input are damaged");
  for (int64_t b = 0; b < block.rows; b++) {
    Row row;
    row.previous = block.anchors[b];
    row.input.assign(mix_.inner + w1_.inner, 0.0f);  // room for W1's padding
    row.latent.assign(w2_.inner, 0.0f);
    row.mixed.resize(mixed_width());
    const bool greedy = !(block.temperatures[b] > 0);
    for (int64_t i = b * block.drafts; i < (b + 1) * block.drafts; i++) {
      const float* base = block.base + i * width;
      List& list = lists[i];
      advance(*pool, block.mixed + i * mixed_width(), row);
      correct(*pool, base, list, row);
      if (greedy) complete(*pool, base, list, row);
      const int64_t place = i * spec_.shortlist;
      block.tokens[i] = row.previous =
          draw(list, row, block.keys[i], greedy ? 0.0f : block.temperatures[b], block.ids ? block.ids + place : nullptr,
               block.logits ? block.logits + place : nullptr);
      block.margins[i] = row.largest - row.second;
    }
  }
}

// The tokens of at least three quarters of the shortlist's length whose base logits are largest: a bound is searched
// that so many reach. Where equal logits leave no such bound, the lowest ids of those at the bound are taken.
void MarkovHead::choose(const float* base, List& list) const {
  const int64_t width = spec_.drafted, most = spec_.shortlist, least = most - most / 4;
  if (most == width) {
    list.cut = kNothing;
    list.places.resize(width);
    std::iota(list.places.begin(), list.places.end(), 0);
    return;
  }
  float peak;
  kernels_.find_max(base, width, &peak);
  if (!std::isfinite(peak)) return;
  float above = std::nextafter(peak, FLT_MAX), bound = peak - 4.0f;
  int64_t fewer = 1, reach = kernels_.count_from(base, width, bound);  // how many reach `above` (or 1), and `bound`
  for (float span = 8.0f; reach < least && bound > -FLT_MAX; span *= 2.0f) {
    above = bound;
    fewer = std::max<int64_t>(1, reach);
    bound = std::max(peak - span, -FLT_MAX);
    reach = kernels_.count_from(base, width, bound);
  }
  for (int tries = 0; reach > most; tries++) {
    // The tail of many laws is nearly exponential: a few steps do. Halving finds ties and odd shapes.
    const double ratio = std::log(0.5 * (least + most) / fewer) / std::log(static_cast<double>(reach) / fewer);
    const float share = tries < kSteps ? static_cast<float>(std::clamp(ratio, 0.02, 0.98)) : 0.5f;
    const float middle = above + (bound - above) * share;
    if (!(middle > bound && middle < above)) break;
    const int64_t here = kernels_.count_from(base, width, middle);
    if (here < least) {
      above = middle;
      fewer = std::max<int64_t>(1, here);
    } else {
      bound = middle;
      reach = here;
    }
  }
  list.places.resize(reach);
  list.cut = bound;
  kernels_.collect(base, nullptr, 0.0f, width, bound, list.places.data());
  if (reach <= most) return;
  list.cut = above;
  const int64_t higher = std::count_if(list.places.begin(), list.places.end(), [&](int32_t v) { return base[v] >= above; });
  int64_t equals = std::max<int64_t>(0, most - higher);
  std::erase_if(list.places, [&](int32_t v) { return base[v] < above && equals-- <= 0; });
}

// z of the next draft, from the token before it. Gated: sigmoid(m) * e. Recurrent: a gated unit whose state starts
// from zero in every block.
void MarkovHead::advance(ThreadPool& pool, const float* mixed, Row& row) const {
  const int rank = spec_.rank;
  const char* embedding = w1_.data + row.previous * w1_.row_bytes;
  float* z = row.latent.data();
  if (spec_.kind == MarkovKind::vanilla) {
    unpack_row(w1_.dtype, embedding, w1_.inner, kernels_.panel, z);
  } else {
    float* state = row.input.data();
    float* token = spec_.kind == MarkovKind::rnn ? state + rank : state;
    unpack_row(w1_.dtype, embedding, w1_.inner, kernels_.panel, token);
    const int width = mixed_width();
    std::vector<float>& m = row.mixed;
    products(pool, kernels_, mix_, row.input.data(), mix_rows_, m.data());
    for (int i = 0; i < width; i++) m[i] = (m[i] + mixed[i]) * (i < rank ? 0.5f : 1.0f);
    kernels_.softcap(m.data(), width, 1.0f);  // tanh; sigmoid(x) = (1 + tanh(x / 2)) / 2
    for (int i = 0; i < rank; i++) {
      const float gate = 0.5f + 0.5f * m[i];
      if (spec_.kind == MarkovKind::gated) {
        z[i] = gate * token[i];
      } else {
        state[i] = gate * state[i] + (1.0f - gate) * m[rank + i];
        z[i] = m[2 * rank + i];
      }
    }
  }
  // What is multiplied is rounded to W2's format first.
  row.size = norm(z, rank) * (spec_.dtype == DType::f32 ? 1.0f : 1.0f + 0x1p-8f);
}

void MarkovHead::correct(ThreadPool& pool, const float* base, const List& list, Row& row) const {
  row.logits.resize(list.places.size());
  products(pool, kernels_, w2_, row.latent.data(), list.places, row.logits.data());
  for (size_t i = 0; i < list.places.size(); i++) row.logits[i] += base[list.places[i]];
  const int64_t count = static_cast<int64_t>(row.logits.size());
  row.best = kernels_.find_max(row.logits.data(), count, &row.largest);
  row.logits[row.best] = kNothing;
  kernels_.find_max(row.logits.data(), count, &row.second);
  row.logits[row.best] = row.largest;
}

// Makes the list hold the largest corrected logit of the whole vocabulary, unless too many tokens might be it.
void MarkovHead::complete(ThreadPool& pool, const float* base, List& list, Row& row) const {
  const float most = largest_norm_ * row.size;
  const float bound = row.largest - kRounding * (1.0f + std::fabs(row.largest) + most);
  if (list.cut + most < bound) return;
  List longer;
  longer.places.resize(spec_.drafted);
  longer.places.resize(kernels_.collect(base, norms_.data(), row.size, spec_.drafted, bound, longer.places.data()));
  if (static_cast<int64_t>(longer.places.size()) > kLonger * spec_.shortlist) return;
  list.places = std::move(longer.places);
  correct(pool, base, list, row);
}

// The next draft, as a target id.
int64_t MarkovHead::draw(const List& list, const Row& row, int64_t key, float temperature, int64_t* ids,
                         float* logits) const {
  const int64_t count = static_cast<int64_t>(list.places.size());
  if (ids) {
    std::fill(ids, ids + spec_.shortlist, static_cast<int64_t>(spec_.vocabulary));
    std::fill(logits, logits + spec_.shortlist, kNothing);
  }
  if (temperature <= 0.0f) {
    const int64_t token = target_id(list.places[row.best]);
    if (ids) {
      ids[0] = token;
      logits[0] = 0.0f;
    }
    return token;
  }
  const float shift = temperature < 1e-3f ? row.largest : 0.0f;  // keeps the quotients finite
  for (int64_t i = 0; i < count; i++) {
    ids[i] = target_id(list.places[i]);
    logits[i] = (row.logits[i] - shift) / temperature;
  }
  int64_t column;
  gumbel_argmax(logits, 1, count, &key, nullptr, ids, &column);
  return ids[column];
}

}  // namespace outrider
