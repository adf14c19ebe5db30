// Keys and values of every layer in pages of kBlock positions. A slot's table names the page of each of its blocks, so
// pages may be shared; who holds which page is decided by the caller (see outrider/kv_cache/block_cache.py).
// Appending raises a slot's length; rewinding lowers it.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.hpp"
#include "stack_spec.hpp"

namespace outrider {

class KVCache {
 public:
  // pages: how many there are; each is touched, and takes memory, when it is first written.
  KVCache(const StackSpec& spec, DType dtype, int panel, int slots, int64_t capacity, int64_t pages);

  int slots() const { return static_cast<int>(lengths_.size()); }
  int64_t capacity() const { return capacity_; }  // most tokens of a slot
  int64_t page_count() const { return page_count_; }
  size_t page_bytes() const { return page_bytes_; }
  DType dtype() const { return dtype_; }
  std::vector<int64_t>& lengths() { return lengths_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }
  bool is_open(int64_t slot) const { return opened_[slot]; }
  void set_open(int slot, bool open);

  // The pages of a slot's blocks; positions below `fixed` may not be written, because their pages are shared.
  void set_table(int slot, std::vector<int32_t> table, int64_t fixed);
  const std::vector<int32_t>& table(int slot) const { return tables_[slot]; }
  int64_t fixed(int64_t slot) const { return fixed_[slot]; }
  int64_t room(int64_t slot) const { return static_cast<int64_t>(tables_[slot].size()) * kBlock; }
  void copy_page(int64_t from, int64_t to);

  // A layer's head: its part of page 0, and of the page that holds a position of a slot.
  char* pages(int layer, int kv_head) const { return memory_.data() + offsets_[layer] + kv_head * block_bytes_[layer]; }
  char* block(int layer, int slot, int kv_head, int64_t position) const {
    return pages(layer, kv_head) + static_cast<size_t>(tables_[slot][position / kBlock]) * page_bytes_;
  }

 private:
  DType dtype_;
  int64_t capacity_, page_count_;
  size_t page_bytes_ = 0;
  std::vector<size_t> offsets_, block_bytes_;  // by layer, within a page
  std::vector<int64_t> lengths_, fixed_;
  std::vector<char> opened_;
  std::vector<std::vector<int32_t>> tables_;
  Region memory_;
};

}  // namespace outrider
