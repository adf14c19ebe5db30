#include "markov.hpp"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "draft_row.hpp"
#include "pack.hpp"

namespace outrider {

namespace {

constexpr int64_t kRowsPerPart = 128;             // rows of a matrix that one thread takes at a time, at least
constexpr int64_t kParallelProducts = 64 * 1024;  // multiplications below which one thread alone is faster
constexpr int kInterpolations = 12;               // in the search for a shortlist's bound, before it bisects
constexpr int64_t kSampled = 8, kSampledAtOnce = 32;  // a sample has every eighth piece of so many logits

int64_t parts_of(int64_t count, int threads) {
  return std::max(piece_count(count), std::clamp<int64_t>(count / kRowsPerPart, 1, threads));
}

bool truncates(const Truncation* options, int64_t width) {
  return options && (options->top_k < width || options->top_p < 1.0 || options->min_p > 0.0);
}

}  // namespace

class MarkovHead::Team {
 public:
  Team() = default;  // a thread alone
  Team(ThreadPool& pool, int thread) : pool_(&pool), thread_(thread) {}

  // The parts that a shared list of `count` rows of a matrix is computed in.
  int64_t parts(int64_t count) const { return parts_of(count, pool_ ? pool_->threads() : 1); }
  bool first() const { return thread_ == 0; }  // whether this thread is the one that writes results
  // Calls item(i) for 0 <= i < count, each on one thread, and waits for all of them.
  template <class Item>
  void share(int64_t count, Item&& item) const {
    if (pool_) {
      pool_->parallel_for(thread_, count, item);
      pool_->barrier();
    } else {
      for (int64_t i = 0; i < count; i++) item(i);
    }
  }

 private:
  ThreadPool* pool_ = nullptr;
  int thread_ = 0;
};

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
  const Scratch<int32_t> tokens = scratch<int32_t>(count * spec_.shortlist);
  const Scratch<float> logits = scratch<float>(count * spec_.shortlist);
  std::vector<Shortlist> lists;
  for (int64_t i = 0; i < count; i++)
    lists.push_back({tokens.get() + i * spec_.shortlist, logits.get() + i * spec_.shortlist, 0});
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < block.rows; b++) sequences.push_back(new_sequence(pool->threads()));
  std::atomic<bool> valid{true};
  // A thread for each sequence where that keeps all threads busy; else all threads together, where that pays.
  const bool apart = block.rows % pool->threads() == 0 || block.rows >= 2 * pool->threads();
  const bool together = !apart && static_cast<int64_t>(spec_.shortlist) * w2_.inner >= kParallelProducts;
  pool->run([&](int thread) {
    const Scratch<int32_t> room = scratch<int32_t>(width);
    pool->parallel_for(thread, count, [&](int64_t i) {
      fill_shortlist(block.base + i * width, lists[i], room.get());
      if (block.temperatures[i / block.drafts] > 0)
        list_ids(lists[i], block.ids + i * spec_.shortlist, block.logits + i * spec_.shortlist);
      if (!lists[i].count) valid.store(false, std::memory_order_relaxed);
    });
    pool->barrier();
    if (!valid.load(std::memory_order_relaxed)) return;
    const auto draft_row = [&](const Team& team, int64_t b) {
      return draft_sequence(team, block, b, lists.data() + b * block.drafts, sequences[b]);
    };
    if (together) {
      const Team team(*pool, thread);
      for (int64_t b = 0; b < block.rows; b++)
        if (!draft_row(team, b)) return valid.store(false, std::memory_order_relaxed);
    } else {
      pool->parallel_for(thread, block.rows, [&](int64_t b) {
        if (!draft_row(Team(), b)) valid.store(false, std::memory_order_relaxed);
      });
    }
  });
  if (!valid)
    throw std::invalid_argument("logits must be numbers, got NaN or infinity; the weights or the input are damaged");
}

MarkovHead::Sequence MarkovHead::new_sequence(int threads) const {
  Sequence sequence;
  sequence.mixed.resize(mixed_width());
  for (Draft& draft : sequence.drafts) {
    draft.logits.resize(spec_.shortlist);
    draft.parts.resize(parts_of(spec_.shortlist, threads));
    draft.scored.resize(draft.parts.size());
  }
  return sequence;
}

// Drafts one sequence, token by token. Every thread of a team calls this; they all come to the same drafts. False for
// logits that are no numbers.
bool MarkovHead::draft_sequence(const Team& team, const MarkovBlock& block, int64_t row, const Shortlist* lists,
                                Sequence& sequence) const {
  State state;
  state.previous = block.anchors[row];
  state.input.assign(mix_.inner + w1_.inner, 0.0f);  // unpacking an embedding also writes W1's padding
  state.latent.assign(w2_.inner, 0.0f);
  state.mixed.resize(mixed_width());
  const bool greedy = !(block.temperatures[row] > 0);
  const float temperature = greedy ? 0.0f : block.temperatures[row];
  const Truncation* truncation = block.truncations ? block.truncations + row : nullptr;
  for (int64_t k = 0; k < block.drafts; k++) {
    const int64_t i = row * block.drafts + k, entry = i * spec_.shortlist;
    const Shortlist& list = lists[k];
    Draft& draft = sequence.drafts[k % 2];
    int64_t* ids = block.ids ? block.ids + entry : nullptr;
    float* logits = block.logits ? block.logits + entry : nullptr;
    const int64_t key = block.keys ? block.keys[i] : 0, count = list.count;
    // Truncation, and the largest logit where the temperature is next to nothing, need the whole list.
    const bool alone = !greedy && (temperature < kCold || truncates(truncation, count));
    compute_latent(team, block.mixed + i * mixed_width(), sequence, state);
    const float* z = state.latent.data();
    const Largest best = correct(team, z, list, draft, key, alone ? 0.0f : temperature, ids, logits);
    int64_t drawn = best.index;
    if (alone) {
      team.share(1, [&](int64_t) {
        draft.drawn = draw_alone(draft, count, best.largest, key, temperature, truncation, ids, logits);
      });
      drawn = draft.drawn;
    } else if (!greedy) {
      drawn = winner(draft.scored.data(), team.parts(count), logits, 1.0f, key, ids);
    }
    if (drawn < 0) return false;
    state.previous = target_id(list.tokens[drawn]);
    if (!team.first()) continue;
    block.tokens[i] = state.previous;
    block.margins[i] = best.largest - best.second;
    if (greedy && ids) {  // one token with all the probability
      std::fill_n(ids, spec_.shortlist, static_cast<int64_t>(spec_.vocabulary));
      std::fill_n(logits, spec_.shortlist, kMaskedLogit);
      ids[0] = state.previous;
      logits[0] = 0.0f;
    }
  }
  return true;
}

// Takes the tokens with the largest base logits, between three quarters of the wanted length and all of it: that is
// cheaper than an exact top-k, because any bound will do that so many logits reach. A sample often has one. Where ties
// leave none, takes the lowest ids of those at the bound. Leaves the list empty for logits that are no numbers.
void MarkovHead::fill_shortlist(const float* base, Shortlist& list, int32_t* room) const {
  const int64_t width = spec_.drafted, most = spec_.shortlist, least = most - most / 4;
  int64_t count = width;
  if (most == width) {
    std::iota(room, room + width, 0);
  } else {
    const float guess = sampled_bound(base, (least + most) / 2);
    count = kernels_.collect(base, width, guess, room);
    if (count < least || count > most) {
      float peak;
      kernels_.find_max(base, width, &peak);
      if (!std::isfinite(peak)) return;
      const Reach found = find_reach(base, width, peak, guess, least, most);
      count = kernels_.collect(base, width, found.bound, room);
      if (count > most) {
        const auto below = [&](int32_t v) { return base[v] < found.above; };
        int64_t ties = most - count + std::count_if(room, room + count, below);
        count = std::remove_if(room, room + count, [&](int32_t v) { return below(v) && ties-- <= 0; }) - room;
      }
    }
  }
  bool finite = true;
  for (int64_t i = 0; i < count; i++) {
    list.tokens[i] = room[i];
    list.base[i] = base[room[i]];
    finite &= std::fabs(list.base[i]) <= FLT_MAX;
  }
  list.count = finite ? count : 0;
}

// A bound that some `wanted` of the row's logits reach, by a sample of them.
float MarkovHead::sampled_bound(const float* base, int64_t wanted) const {
  const Scratch<float> sample = scratch<float>(spec_.drafted / kSampled + kSampledAtOnce);
  int64_t count = 0;
  for (int64_t i = 0; i + kSampledAtOnce <= spec_.drafted; i += kSampled * kSampledAtOnce, count += kSampledAtOnce)
    std::copy_n(base + i, kSampledAtOnce, sample.get() + count);
  const int64_t middle = std::max<int64_t>(1, wanted * count / spec_.drafted);
  float peak = FLT_MAX;
  if (count) kernels_.find_max(sample.get(), count, &peak);
  if (!(std::fabs(peak) < FLT_MAX)) return FLT_MAX;
  return find_reach(sample.get(), count, peak, peak - 4.0f, middle - middle / 32, middle + middle / 32).bound;
}

// A bound that between `least` and `most` of x reach, beginning the search with `first`. Where ties leave none, one that
// more reach, and `above` fewer than `least`.
MarkovHead::Reach MarkovHead::find_reach(const float* x, int64_t n, float peak, float first, int64_t least,
                                         int64_t most) const {
  float above = std::nextafter(peak, FLT_MAX), bound = first;
  int64_t fewer = 1, count = kernels_.count_from(x, n, bound);  // reach `above` (or 1), and `bound`
  for (float span = std::max(2.0f * (peak - bound), 1.0f); count < least && bound > -FLT_MAX; span *= 2.0f) {
    above = std::min(above, bound);
    fewer = std::max<int64_t>(1, count);
    bound = std::max(peak - span, -FLT_MAX);
    count = kernels_.count_from(x, n, bound);
  }
  for (int tries = 0; count > most; tries++) {
    // The count often grows exponentially as the bound falls, so a few interpolations are enough; else bisect.
    const double ratio = std::log(0.5 * (least + most) / fewer) / std::log(static_cast<double>(count) / fewer);
    const float fraction = tries < kInterpolations ? static_cast<float>(std::clamp(ratio, 0.02, 0.98)) : 0.5f;
    const float middle = above + (bound - above) * fraction;
    if (!(middle > bound && middle < above)) break;
    const int64_t reach = kernels_.count_from(x, n, middle);
    if (reach < least) {
      above = middle;
      fewer = std::max<int64_t>(1, reach);
    } else {
      bound = middle;
      count = reach;
    }
  }
  return {bound, above};
}

// The tokens of a sampled draft's distribution, and no probability behind them.
void MarkovHead::list_ids(const Shortlist& list, int64_t* ids, float* logits) const {
  const int64_t count = list.count;
  for (int64_t i = 0; i < count; i++) ids[i] = target_id(list.tokens[i]);
  std::fill(ids + count, ids + spec_.shortlist, static_cast<int64_t>(spec_.vocabulary));
  std::fill(logits + count, logits + spec_.shortlist, kMaskedLogit);
}

// z of the next draft from the token before it, with embedding e and mixing output m. Vanilla: e. Gated: sigmoid(m) *
// e. rnn: a gated recurrent unit whose state starts from zero in every block.
void MarkovHead::compute_latent(const Team& team, const float* mixed, Sequence& sequence, State& state) const {
  const int rank = spec_.rank;
  float* z = state.latent.data();
  if (spec_.kind == MarkovKind::vanilla) return embed(state.previous, z);
  float* const before = state.input.data();
  float* const token = spec_.kind == MarkovKind::rnn ? before + rank : before;
  embed(state.previous, token);
  const int width = mixed_width();
  const int64_t parts = team.parts(width);
  team.share(parts, [&](int64_t part) {
    const int64_t first = width * part / parts, last = width * (part + 1) / parts;
    kernels_.dot_rows(mix_, state.input.data(), mix_rows_.data() + first, last - first, sequence.mixed.data() + first);
  });
  std::vector<float>& m = state.mixed;
  for (int i = 0; i < width; i++) m[i] = (sequence.mixed[i] + mixed[i]) * (i < rank ? 0.5f : 1.0f);
  kernels_.softcap(m.data(), width, 1.0f);  // tanh; sigmoid(x) = (1 + tanh(x / 2)) / 2
  for (int i = 0; i < rank; i++) {
    const float gate = 0.5f + 0.5f * m[i];
    if (spec_.kind == MarkovKind::gated) {
      z[i] = gate * token[i];
    } else {
      before[i] = gate * before[i] + (1.0f - gate) * m[rank + i];
      z[i] = m[2 * rank + i];
    }
  }
}

// Corrects the logits of a shortlist, and scores them for sampling where there is a temperature.
MarkovHead::Largest MarkovHead::correct(const Team& team, const float* latent, const Shortlist& list, Draft& draft,
                                        int64_t key, float temperature, const int64_t* ids, float* logits) const {
  const int64_t length = list.count, parts = team.parts(length);
  team.share(parts, [&](int64_t part) {
    const int64_t first = length * part / parts, count = length * (part + 1) / parts - first;
    float* x = draft.logits.data() + first;
    kernels_.dot_rows(w2_, latent, list.tokens + first, count, x);
    for (int64_t i = 0; i < count; i++) x[i] += list.base[first + i];
    Largest& of = draft.parts[part];
    const int64_t best = kernels_.find_max(x, count, &of.largest);
    x[best] = kMaskedLogit;
    kernels_.find_max(x, count, &of.second);
    x[best] = of.largest;
    of.index = first + best;
    if (temperature <= 0) return;
    for (int64_t i = 0; i < count; i++) logits[first + i] = x[i] / temperature;
    draft.scored[part].score(kernels_, logits, first, count, 1.0f, key, ids);
  });
  Largest best = draft.parts[0];
  for (int64_t part = 1; part < parts; part++) {
    const Largest& of = draft.parts[part];
    best.second = std::max({best.second, of.second, std::min(best.largest, of.largest)});
    if (of.largest > best.largest) {
      best.largest = of.largest;
      best.index = of.index;
    }
  }
  return best;
}

// Draws from a whole shortlist and writes its distribution. -1 for logits that are no numbers.
int64_t MarkovHead::draw_alone(const Draft& draft, int64_t count, float largest, int64_t key, float temperature,
                               const Truncation* truncation, const int64_t* ids, float* logits) const {
  const float shift = temperature < kCold ? largest : 0.0f;  // keeps logits / temperature finite
  for (int64_t i = 0; i < count; i++) logits[i] = (draft.logits[i] - shift) / temperature;
  if (truncation) mask_truncated(kernels_, logits, count, *truncation);
  int64_t column;
  return try_gumbel_argmax(logits, 1, count, &key, nullptr, ids, &column, false) ? column : -1;
}

}  // namespace outrider
