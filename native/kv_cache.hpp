// Keys and values of every layer, contiguous per slot. Appending raises a slot's length; rewinding lowers it.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.hpp"
#include "stack_spec.hpp"

namespace outrider {

class KVCache {
 public:
  KVCache(const StackSpec& spec, DType dtype, int panel, int slots, int64_t capacity);

  int slots() const { return slots_; }
  int64_t capacity() const { return capacity_; }  // tokens per slot
  DType dtype() const { return dtype_; }
  std::vector<int64_t>& lengths() { return lengths_; }
  std::vector<char>& opened() { return opened_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }
  const std::vector<char>& opened() const { return opened_; }

  char* keys(int layer, int slot, int kv_head) const;
  char* values(int layer, int slot, int kv_head) const { return keys(layer, slot, kv_head) + key_bytes_[layer]; }
  int64_t padded_capacity() const { return padded_; }

 private:
  DType dtype_;
  int slots_;
  int64_t capacity_, padded_;
  std::vector<size_t> key_bytes_, head_bytes_, offsets_;
  std::vector<int> kv_heads_;
  std::vector<int64_t> lengths_;
  std::vector<char> opened_;
  Region memory_;
};

}  // namespace outrider
