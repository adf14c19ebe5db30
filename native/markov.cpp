#include "markov.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "draft_row.hpp"
#include "pack.hpp"

namespace outrider {

namespace {

constexpr int64_t kRowsPerItem = 128;              // rows of a matrix that one thread takes at a time
constexpr int64_t kParallelProducts = 64 * 1024;  // multiplications below which one thread alone is faster
constexpr int kInterpolations = 12;               // in the search for a shortlist's bound, before it bisects
constexpr float kRounding = 2e-5f;                // relative slack of the bound for rounding errors
constexpr int64_t kMaxExtension = 2;              // a greedy draft's list is extended to so many shortlists at most
constexpr float kRoundUp = 1.0f + 1e-6f;

// out[i] = row rows[i] of w times z.
void products(ThreadPool& pool, const Kernels& kernels, const RowMajor& w, const float* z,
              const std::vector<int32_t>& rows, float* out) {
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count * w.inner < kParallelProducts) return kernels.dot_rows(w, z, rows.data(), count, out);
  pool.run([&](int thread) {
    pool.parallel_for(thread, (count + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t piece) {
      const int64_t first = piece * kRowsPerItem;
      kernels.dot_rows(w, z, rows.data() + first, std::min(kRowsPerItem, count - first), out + first);
    });
  });
}

float norm(const float* x, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(std::sqrt(sum)) * kRoundUp;
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

void MarkovHead::embed(int64_t token, float* out) const {
  unpack_row(w1_.dtype, w1_.data + token * w1_.row_bytes, w1_.inner, kernels_.panel, out);
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
  std::vector<Shortlist> lists(count);
  pool->run([&](int thread) {
    pool->parallel_for(thread, count, [&](int64_t i) { fill_shortlist(block.base + i * width, lists[i]); });
  });
  for (const Shortlist& list : lists)
    if (list.tokens.empty())
      throw std::invalid_argument("logits must be numbers, got NaN or infinity; the weights or the input are damaged");
  for (int64_t b = 0; b < block.rows; b++) {
    Row row;
    row.previous = block.anchors[b];
    row.input.assign(mix_.inner + w1_.inner, 0.0f);  // unpacking an embedding also writes W1's padding
    row.latent.assign(w2_.inner, 0.0f);
    row.mixed.resize(mixed_width());
    const bool greedy = !(block.temperatures[b] > 0);
    for (int64_t i = b * block.drafts; i < (b + 1) * block.drafts; i++) {
      const float* base = block.base + i * width;
      Shortlist& list = lists[i];
      compute_latent(*pool, block.mixed + i * mixed_width(), row);
      correct(*pool, base, list, row);
      if (greedy) extend(*pool, base, list, row);
      const int64_t entry = i * spec_.shortlist;
      block.tokens[i] = row.previous =
          draw(list, row, block.keys ? block.keys[i] : 0, greedy ? 0.0f : block.temperatures[b],
               block.truncations ? block.truncations + b : nullptr, block.ids ? block.ids + entry : nullptr,
               block.logits ? block.logits + entry : nullptr);
      block.margins[i] = row.largest - row.second;
    }
  }
}

// Takes the tokens with the largest base logits, between three quarters of the wanted length and all of it: that is
// cheaper than an exact top-k, because any bound will do that so many logits reach. Where ties leave no such bound,
// takes the lowest ids of those at the bound.
void MarkovHead::fill_shortlist(const float* base, Shortlist& list) const {
  const int64_t width = spec_.drafted, most = spec_.shortlist, least = most - most / 4;
  if (most == width) {
    list.bound = kMaskedLogit;
    list.tokens.resize(width);
    std::iota(list.tokens.begin(), list.tokens.end(), 0);
    return;
  }
  float peak;
  kernels_.find_max(base, width, &peak);
  if (!std::isfinite(peak)) return;
  float above = std::nextafter(peak, FLT_MAX), bound = peak - 4.0f;
  int64_t fewer = 1, reach = kernels_.count_from(base, width, bound);  // reach `above` (or 1), and `bound`
  for (float span = 8.0f; reach < least && bound > -FLT_MAX; span *= 2.0f) {
    above = bound;
    fewer = std::max<int64_t>(1, reach);
    bound = std::max(peak - span, -FLT_MAX);
    reach = kernels_.count_from(base, width, bound);
  }
  for (int tries = 0; reach > most; tries++) {
    // The count often grows exponentially as the bound falls, so a few interpolations are enough; else bisect.
    const double ratio = std::log(0.5 * (least + most) / fewer) / std::log(static_cast<double>(reach) / fewer);
    const float fraction = tries < kInterpolations ? static_cast<float>(std::clamp(ratio, 0.02, 0.98)) : 0.5f;
    const float middle = above + (bound - above) * fraction;
    if (!(middle > bound && middle < above)) break;
    const int64_t count = kernels_.count_from(base, width, middle);
    if (count < least) {
      above = middle;
      fewer = std::max<int64_t>(1, count);
    } else {
      bound = middle;
      reach = count;
    }
  }
  list.tokens.resize(reach);
  list.bound = bound;
  kernels_.collect(base, nullptr, 0.0f, width, bound, list.tokens.data());
  if (reach <= most) return;
  list.bound = above;
  const int64_t higher = std::count_if(list.tokens.begin(), list.tokens.end(), [&](int32_t v) { return base[v] >= above; });
  int64_t ties = std::max<int64_t>(0, most - higher);
  std::erase_if(list.tokens, [&](int32_t v) { return base[v] < above && ties-- <= 0; });
}

// z of the next draft from the token before it, with embedding e and mixing output m. Vanilla: e. Gated: sigmoid(m) *
// e. rnn: a gated recurrent unit whose state starts from zero in every block.
void MarkovHead::compute_latent(ThreadPool& pool, const float* mixed, Row& row) const {
  const int rank = spec_.rank;
  float* z = row.latent.data();
  if (spec_.kind == MarkovKind::vanilla) {
    embed(row.previous, z);
  } else {
    float* state = row.input.data();
    float* token = spec_.kind == MarkovKind::rnn ? state + rank : state;
    embed(row.previous, token);
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
  // z is rounded to W2's format before it is multiplied, which may raise its norm.
  row.latent_norm = norm(z, rank) * (spec_.dtype == DType::f32 ? 1.0f : 1.0f + 0x1p-8f);
}

void MarkovHead::correct(ThreadPool& pool, const float* base, const Shortlist& list, Row& row) const {
  row.logits.resize(list.tokens.size());
  products(pool, kernels_, w2_, row.latent.data(), list.tokens, row.logits.data());
  for (size_t i = 0; i < list.tokens.size(); i++) row.logits[i] += base[list.tokens[i]];
  const int64_t count = static_cast<int64_t>(row.logits.size());
  row.best = kernels_.find_max(row.logits.data(), count, &row.largest);
  row.logits[row.best] = kMaskedLogit;
  kernels_.find_max(row.logits.data(), count, &row.second);
  row.logits[row.best] = row.largest;
}

// Adds the tokens outside the list that could have the largest corrected logit, unless there are too many of them.
void MarkovHead::extend(ThreadPool& pool, const float* base, Shortlist& list, Row& row) const {
  const float most = largest_norm_ * row.latent_norm;
  const float bound = row.largest - kRounding * (1.0f + std::fabs(row.largest) + most);
  if (list.bound + most < bound) return;
  Shortlist longer;
  longer.tokens.resize(spec_.drafted);
  longer.tokens.resize(kernels_.collect(base, norms_.data(), row.latent_norm, spec_.drafted, bound, longer.tokens.data()));
  if (static_cast<int64_t>(longer.tokens.size()) > kMaxExtension * spec_.shortlist) return;
  list.tokens = std::move(longer.tokens);
  correct(pool, base, list, row);
}

// Draws the next draft and writes the distribution it came from. Returns a target id.
int64_t MarkovHead::draw(const Shortlist& list, const Row& row, int64_t key, float temperature,
                         const Truncation* truncation, int64_t* ids, float* logits) const {
  const int64_t count = static_cast<int64_t>(list.tokens.size());
  if (ids) {
    std::fill(ids, ids + spec_.shortlist, static_cast<int64_t>(spec_.vocabulary));
    std::fill(logits, logits + spec_.shortlist, kMaskedLogit);
  }
  if (temperature <= 0.0f) {
    const int64_t token = target_id(list.tokens[row.best]);
    if (ids) {
      ids[0] = token;
      logits[0] = 0.0f;
    }
    return token;
  }
  const float shift = temperature < 1e-3f ? row.largest : 0.0f;  // keeps logits / temperature finite
  for (int64_t i = 0; i < count; i++) {
    ids[i] = target_id(list.tokens[i]);
    logits[i] = (row.logits[i] - shift) / temperature;
  }
  if (truncation) mask_truncated(kernels_, logits, count, *truncation);
  int64_t column;
  gumbel_argmax(logits, 1, count, &key, nullptr, ids, &column);
  return ids[column];
}

}  // namespace outrider
