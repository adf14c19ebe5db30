#include "kv_cache.hpp"

namespace outrider {

KVCache::KVCache(const StackSpec& spec, DType dtype, int panel, int slots, int64_t capacity)
    : dtype_(dtype), slots_(slots), capacity_(capacity), padded_(round_up(capacity, kBlock)), lengths_(slots, 0),
      opened_(slots, 0) {
  const size_t element = dtype == DType::f32 ? 4 : 2;
  size_t total = 0;
  for (const LayerSpec& layer : spec.layers) {
    const size_t head_pad = round_up(layer.head_dim, panel);
    key_bytes_.push_back(element * padded_ * layer.head_dim);
    head_bytes_.push_back(key_bytes_.back() + element * padded_ * head_pad);
    kv_heads_.push_back(layer.kv_heads);
    offsets_.push_back(total);
    total += head_bytes_.back() * layer.kv_heads * slots;
  }
  memory_ = Region(total);
}

char* KVCache::keys(int layer, int slot, int kv_head) const {
  const size_t head = static_cast<size_t>(slot) * kv_heads_[layer] + kv_head;
  return memory_.data() + offsets_[layer] + head * head_bytes_[layer];
}

}  // namespace outrider
