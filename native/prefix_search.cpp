#include "prefix_search.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace outrider {

namespace {

constexpr double kLeast = 1e-6;      // confidences are kept off 0 and 1; NaN becomes this
constexpr double kRise = 1 + 1e-12;  // tokens per second must rise by more than rounding

// The drafts of a step in descending survival; equal ones by position, then by row. The key of a draft is its survival's
// leading bits, upside down, and behind them its number, position * rows + row: they all differ.
class RankedDrafts {
 public:
  RankedDrafts(const double* survival, int64_t rows, int64_t drafts) : rows_(static_cast<uint32_t>(rows)) {
    const auto all = static_cast<uint64_t>(rows * drafts);
    number_bits_ = std::max(1, static_cast<int>(std::bit_width(all - 1)));
    // Survivals above a half have 2^52 different bits, those above a quarter as many, and so on. The keys are put into
    // buckets, an eighth as many as drafts in the first of these ranges, and a bucket is sorted when it is reached.
    shift_ = 52 - std::max(0, static_cast<int>(std::bit_width(all)) - 4);
    bounds_.assign((uint64_t{kRanges} << (52 - shift_)) + 2, 0);
    std::vector<uint64_t> unsorted;
    unsorted.reserve(all);
    const uint64_t one = std::bit_cast<uint64_t>(1.0), low = (uint64_t{1} << number_bits_) - 1;
    for (int64_t row = 0; row < rows; row++)
      for (int64_t j = 0; j < drafts; j++) {
        const double a = survival[row * drafts + j];
        if (!(a > 0)) break;  // and so are all behind it
        unsorted.push_back(((one - std::bit_cast<uint64_t>(a)) & ~low) | static_cast<uint64_t>(j * rows + row));
        bounds_[bucket(unsorted.back()) + 1]++;
      }
    for (size_t i = 1; i < bounds_.size(); i++) bounds_[i] += bounds_[i - 1];
    keys_.resize(unsorted.size());
    std::vector<uint32_t> next(bounds_.begin(), bounds_.end() - 1);
    for (const uint64_t key : unsorted) keys_[next[bucket(key)]++] = key;
  }

  int64_t size() const { return static_cast<int64_t>(keys_.size()); }

  struct Place {
    uint32_t row, position;
  };

  // Of the n-th draft. To be asked for in order.
  Place operator[](int64_t n) {
    while (sorted_ <= static_cast<size_t>(n)) {
      const uint32_t end = bounds_[++bucket_];
      std::sort(keys_.begin() + static_cast<ptrdiff_t>(sorted_), keys_.begin() + static_cast<ptrdiff_t>(end));
      sorted_ = end;
    }
    const auto number = static_cast<uint32_t>(keys_[static_cast<size_t>(n)] & ((uint64_t{1} << number_bits_) - 1));
    const uint32_t position = number / rows_;
    return {number - position * rows_, position};
  }

 private:
  static constexpr int kRanges = 8;  // what is less likely than 2^-8 is in one last bucket

  size_t bucket(uint64_t key) const { return std::min(static_cast<size_t>(key >> shift_), bounds_.size() - 2); }

  uint32_t rows_;
  int number_bits_ = 0, shift_ = 0;
  std::vector<uint32_t> bounds_;  // bucket b has the keys from bounds_[b] to bounds_[b + 1]
  std::vector<uint64_t> keys_;
  size_t bucket_ = 0, sorted_ = 0;
};

// How far to walk down the drafts: outrider.scheduling.prefix_search.best_count.
int64_t best_count(RankedDrafts& ranked, const double* survival, int64_t drafts, int64_t most, double batch,
                   const double* seconds, double spent, bool early) {
  std::vector<double> rates{batch / (seconds[0] + spent)};
  rates.reserve(static_cast<size_t>(most) + 1);
  double accepted = 0;
  for (int64_t n = 0; n < most; n++) {
    const auto [row, position] = ranked[n];
    accepted += survival[row * drafts + position];
    const double rate = (accepted + batch) / (seconds[n + 1] + spent);
    if (early && !(rate > rates.back() * kRise)) return n;
    rates.push_back(rate);
  }
  if (early) return most;
  const double best = *std::max_element(rates.begin(), rates.end());
  for (int64_t n = 0; n < most; n++)
    if (rates[static_cast<size_t>(n)] * kRise >= best) return n;  // the first maximum, rounding aside
  return best > 0 ? most : 0;                                     // costs are NaN: verify nothing
}

// Drafts to verify by survivals two steps old, of which today's only rank.
int64_t budget(const ScheduleTask& task, int64_t drafts) {
  if (!task.past) return std::min(task.batch, drafts);  // the first step: about one draft a row
  RankedDrafts then(task.past, task.past_rows, task.past_drafts);
  const int64_t count = best_count(then, task.past, task.past_drafts, std::min(then.size(), drafts),
                                   static_cast<double>(task.past_batch), task.seconds, task.spent, false);
  const double now = static_cast<double>(count * task.batch) / static_cast<double>(task.past_batch);
  return std::min(drafts, static_cast<int64_t>(std::nearbyint(now)));
}

}  // namespace

int64_t schedule(const ScheduleTask& task) {
  int64_t rows = 0;
  for (int64_t b = 0; b < task.batch; b++) {
    const int64_t length = task.lengths[b];
    if (!length) continue;
    const int64_t slot = task.rows[b].slot;
    task.rows[rows] = {b, slot, length, std::max(task.rows[b].limit, length), 0, 0};
    double *logits = task.logits + rows * task.drafts, *adjusted = task.adjusted + rows * task.drafts;
    double* survival = task.survival + rows * task.drafts;
    double product = 1;
    for (int64_t j = 0; j < task.drafts; j++) {
      double z = 0, p = 0;
      if (j < length) {
        if (task.confidence) {
          const double c = std::min(std::max(kLeast, double{task.confidence[b * task.drafts + j]}), 1 - kLeast);
          z = std::log(c / (1 - c));
        }
        p = 1 / (1 + std::exp(-(z * task.slope[j] + task.shift[j] + task.row_shift[slot])));
      }
      logits[j] = z;
      adjusted[j] = p;
      survival[j] = product = product * p;
    }
    rows++;
  }
  if (!rows) return 0;
  RankedDrafts ranked(task.survival, rows, task.drafts);
  const int64_t count =
      task.search == Search::lagged
          ? budget(task, ranked.size())
          : best_count(ranked, task.survival, task.drafts, ranked.size(), static_cast<double>(task.batch), task.seconds,
                       task.spent, task.search == Search::early);
  for (int64_t n = 0; n < count; n++) task.rows[ranked[n].row].keep++;
  for (int64_t i = 0; i < rows; i++) {
    task.rows[i].keep = std::max(task.rows[i].keep, std::min(task.rows[i].length, task.at_least));
    task.keep[task.rows[i].row] = task.rows[i].keep;
  }
  return rows;
}

namespace {

constexpr int64_t kStanding = 64;  // rows that stand for all
constexpr double kCaught = 0.995;  // an early stop that gives less of what a budget does is caught in a dip

// The best length for some rows, each sample being a step as it could be.
Plan search(const PlanTask& task, std::vector<bool> chosen) {
  const auto many = static_cast<int64_t>(std::count(chosen.begin(), chosen.end(), true));
  std::vector<int64_t> some;
  const int64_t every = (many + kStanding - 1) / kStanding;
  for (int64_t row = 0, n = 0; row < task.rows; row++)
    if (chosen[static_cast<size_t>(row)] && n++ % every == 0) some.push_back(row);
  const double share = static_cast<double>(many) / static_cast<double>(some.size());
  const auto batch = static_cast<double>(task.batch);
  Plan best{.chosen = std::move(chosen)};
  struct Draft {
    double survival;
    int64_t position;
  };
  std::vector<Draft> walks;  // of each sample, all drafts in descending survival
  walks.reserve(static_cast<size_t>(task.samples * task.drafts) * some.size());
  std::vector<size_t> starts{0};
  for (int64_t s = 0; s < task.samples; s++) {
    for (const int64_t row : some)
      for (int64_t j = 0; j < task.drafts; j++) {
        const double a = task.survival[(row * task.samples + s) * task.drafts + j];
        if (!(a > 0)) break;  // and so are all behind it
        walks.push_back({a, j});
      }
    std::sort(walks.begin() + static_cast<ptrdiff_t>(starts.back()), walks.end(),
              [](const Draft& a, const Draft& b) { return a.survival > b.survival; });
    starts.push_back(walks.size());
  }
  std::vector<double> tokens, costs;
  for (const int64_t length : task.lengths) {
    const double spent = task.draft(many, length);
    const auto most = static_cast<int64_t>(some.size()) * length;
    tokens.resize(static_cast<size_t>(task.samples * (most + 1)));
    costs.resize(static_cast<size_t>(most + 1));
    for (int64_t n = 0; n <= most; n++) {
      const double at = static_cast<double>(n) * share;
      const int64_t whole = std::min(static_cast<int64_t>(at), task.many - 2);
      const double *seconds = task.seconds + whole;
      costs[static_cast<size_t>(n)] =
          seconds[0] + (at - static_cast<double>(whole)) * (seconds[1] - seconds[0]) + spent;
    }
    std::vector<int64_t> early, best_of_all, ends;
    for (int64_t s = 0; s < task.samples; s++) {
      double* gives = tokens.data() + s * (most + 1);
      double sum = 0, before = batch / costs[0], highest = before;
      gives[0] = batch;
      int64_t stop = -1, top = 0, end = 0;
      for (size_t i = starts[static_cast<size_t>(s)]; i < starts[static_cast<size_t>(s) + 1]; i++) {
        if (walks[i].position >= length) continue;
        sum += walks[i].survival * share;
        gives[++end] = batch + sum;
        const double rate = gives[end] / costs[static_cast<size_t>(end)];
        if (stop < 0 && !(rate > before * kRise)) stop = end - 1;
        if (rate > highest) highest = rate, top = end;
        before = rate;
      }
      early.push_back(stop < 0 ? end : stop), best_of_all.push_back(top), ends.push_back(end);
    }
    const auto value = [&](auto&& where) {
      double gained = 0, took = 0;
      for (int64_t s = 0; s < task.samples; s++) {
        const int64_t n = where(static_cast<size_t>(s));
        gained += tokens[static_cast<size_t>(s * (most + 1) + n)], took += costs[static_cast<size_t>(n)];
      }
      return gained / took;
    };
    double rate = task.early ? value([&](size_t s) { return early[s]; }) : 0;
    bool budget = false;
    if (task.all) rate = value([&](size_t s) { return best_of_all[s]; });
    if (task.budget) {  // what was best for another step
      const double found = value([&](size_t s) { return std::min(ends[s], best_of_all[(s ? s : ends.size()) - 1]); });
      if (rate < kCaught * found) rate = found, budget = true;
    }
    if (rate > best.rate) best.length = length, best.rate = rate, best.budget = budget;
    double gained = 0, took = 0;
    for (size_t s = 0; s < ends.size(); s++) {
      const int64_t n = static_cast<int64_t>(s) * (most + 1) + ends[s];
      gained += tokens[static_cast<size_t>(n)], took += costs[static_cast<size_t>(ends[s])] - task.spared;
    }
    if (gained / took > best.whole_rate) best.whole_length = length, best.whole_rate = gained / took;
  }
  return best;
}

}  // namespace

Plan best_plan(const PlanTask& task) {
  Plan best = search(task, std::vector<bool>(static_cast<size_t>(task.rows), true));
  if (task.rows < 2) return best;
  // Rows one by one: what drafting for a row gives beyond what verifying it costs, against its share of drafting. Both
  // depend on how far is drafted.
  const auto rows = static_cast<double>(task.rows), all = static_cast<double>(task.rows * task.drafts);
  const double token = task.plain * (task.seconds[task.many - 1] - task.seconds[0]) / all;
  const int64_t half = task.rows / 2, first = best.length;
  for (const int64_t length : {first, task.drafts}) {
    const double share =
        (task.draft(task.rows, length) - task.draft(half, length)) / (rows - static_cast<double>(half));
    std::vector<bool> chosen(static_cast<size_t>(task.rows));
    for (int64_t row = 0; row < task.rows; row++) {
      double worth = 0;
      for (int64_t s = 0; s < task.samples; s++) {
        double sum = 0;
        for (int64_t j = 0; j < length; j++)
          sum += std::max(task.survival[(row * task.samples + s) * task.drafts + j] - token, 0.0);
        worth += sum;
      }
      chosen[static_cast<size_t>(row)] = worth / static_cast<double>(task.samples) > task.plain * std::max(share, 0.0);
    }
    if (std::count(chosen.begin(), chosen.end(), true) && chosen != best.chosen) {
      Plan found = search(task, std::move(chosen));
      found.whole_length = best.whole_length, found.whole_rate = best.whole_rate;
      if (found.rate > best.rate) best = std::move(found);
    }
    if (first == task.drafts) break;
  }
  return best;
}

}  // namespace outrider
