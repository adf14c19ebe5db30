// Large allocations: zeroed, 64-byte aligned, in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace outrider {

// One mapped region. Pages are zeroed on first use; pages that are never used take no memory.
class Region {
 public:
  Region() = default;
  explicit Region(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
#if defined(__linux__)
    // One huge page more than needed, so that the data can start at a huge-page boundary.
    mapped_ = mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) {
      mapped_ = nullptr;
      throw std::bad_alloc();
    }
    const size_t misaligned = reinterpret_cast<size_t>(mapped_) % kPage;
    data_ = static_cast<char*>(mapped_) + (misaligned ? kPage - misaligned : 0);
    madvise(data_, bytes_, MADV_HUGEPAGE);
#else
    mapped_ = std::calloc(bytes_ + kPage, 1);
    if (!mapped_) throw std::bad_alloc();
    data_ = static_cast<char*>(mapped_) + (kPage - reinterpret_cast<size_t>(mapped_) % kPage);
#endif
  }
  Region(Region&& other) noexcept { swap(other); }
  Region& operator=(Region&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Region() {
    if (!mapped_) return;
#if defined(__linux__)
    munmap(mapped_, bytes_ + kPage);
#else
    std::free(mapped_);
#endif
  }
  char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  void swap(Region& other) {
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* mapped_ = nullptr;
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Hands out pieces of regions; all are freed together with the arena.
class Arena {
 public:
  template <class T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (regions_.empty() || used_.back() + bytes > regions_.back().size()) {
      regions_.emplace_back(bytes > kRegion ? bytes : kRegion);
      used_.push_back(0);
    }
    char* piece = regions_.back().data() + used_.back();
    used_.back() += bytes;
    taken_ += bytes;
    return reinterpret_cast<T*>(piece);
  }
  size_t bytes() const { return taken_; }
  size_t regions() const { return regions_.size(); }
  // The used part of a region. Arenas that hand out the same sizes in the same order have the same layout.
  char* data(size_t region) const { return regions_[region].data(); }
  size_t used(size_t region) const { return used_[region]; }

 private:
  static constexpr size_t kRegion = size_t{32} << 20;
  std::vector<Region> regions_;
  std::vector<size_t> used_;
  size_t taken_ = 0;
};

}  // namespace outrider
