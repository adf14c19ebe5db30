#include "kv_cache.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

namespace outrider {

KVCache::KVCache(const StackSpec& spec, DType dtype, int panel, int slots, int64_t capacity, int64_t pages)
    : dtype_(dtype), capacity_(capacity), page_count_(pages), lengths_(slots, 0), fixed_(slots, 0), opened_(slots, 0),
      tables_(slots) {
  for (const LayerSpec& layer : spec.layers) {
    const BlockLayout layout(dtype, layer.head_dim, static_cast<int>(round_up(layer.head_dim, panel)));
    offsets_.push_back(page_bytes_);
    block_bytes_.push_back(layout.bytes);
    page_bytes_ += layout.bytes * layer.kv_heads;
  }
  memory_ = Region(page_bytes_ * pages);
}

void KVCache::set_open(int slot, bool open) {
  opened_.at(slot) = open;
  lengths_[slot] = fixed_[slot] = 0;
  tables_[slot].clear();
}

void KVCache::set_table(int slot, std::vector<int32_t> table, int64_t fixed) {
  for (int32_t page : table)
    if (page < 0 || page >= page_count_) throw std::invalid_argument("there is no page " + std::to_string(page));
  tables_.at(slot) = std::move(table);
  fixed_[slot] = fixed;
}

void KVCache::copy_page(int64_t from, int64_t to) {
  if (from < 0 || from >= page_count_ || to < 0 || to >= page_count_)
    throw std::invalid_argument("there is no page " + std::to_string(from) + " or " + std::to_string(to));
  std::memcpy(memory_.data() + to * page_bytes_, memory_.data() + from * page_bytes_, page_bytes_);
}

}  // namespace outrider
