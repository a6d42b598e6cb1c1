#include <cstring>

#include "dispatch.h"
#include "ops.h"
#include "rows.h"

namespace dynskip {

using torch::stable::Tensor;

void kv_store(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping) {
  DYNSKIP_CHECK(k_cache.dim() == 3, "kv_store: k_cache must be [num_slots, H, D], got ", shape_of(k_cache), ".");
  const int64_t num_slots = k_cache.size(0);
  const int64_t num_heads = k_cache.size(1);
  const int64_t head_size = k_cache.size(2);
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    DYNSKIP_CHECK(
        cache->dim() == 3 && cache->size(0) == num_slots && cache->size(1) == num_heads && cache->size(2) == head_size &&
            cache->is_contiguous() && cache->scalar_type() == k.scalar_type(),
        "kv_store: k_cache and v_cache must be contiguous [num_slots, H, D] of one shape and of k's dtype, got ",
        shape_of(*cache), ".");
  }
  const int64_t num_rows = slot_mapping.numel();
  for (const Tensor* rows : {&k, &v}) {
    DYNSKIP_CHECK(
        rows->dim() == 3 && rows->size(0) == num_rows && rows->size(1) == num_heads && rows->size(2) == head_size &&
            (head_size == 1 || rows->stride(2) == 1) && (num_heads == 1 || rows->stride(1) == head_size) &&
            rows->scalar_type() == k.scalar_type(),
        "kv_store: k and v must be [", num_rows, ", ", num_heads, ", ", head_size,
        "] of one dtype with contiguous rows, got ", shape_of(*rows), ".");
  }
  DYNSKIP_CHECK(is_int32_contiguous(slot_mapping), "kv_store: slot_mapping must be contiguous [R] int32.");
  const auto* slots = static_cast<const int32_t*>(slot_mapping.data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    DYNSKIP_CHECK(
        slots[row] >= -1 && slots[row] < num_slots,
        "kv_store: slot_mapping must hold slots 0..", num_slots - 1, " or -1, got ", slots[row], " in row ", row, ".");
  }

  const int64_t size = num_heads * head_size;
  for_element_type(k.scalar_type(), "kv_store", [&](auto element) {
    using Element = decltype(element);
    const auto* keys = static_cast<const Element*>(k.data_ptr());
    const auto* values = static_cast<const Element*>(v.data_ptr());
    auto* key_slots = static_cast<Element*>(k_cache.data_ptr());
    auto* value_slots = static_cast<Element*>(v_cache.data_ptr());
    const int64_t key_stride = k.stride(0);
    const int64_t value_stride = v.stride(0);
    const size_t num_bytes = size * sizeof(Element);
    for_each_row(num_rows, size, [&](int64_t row) {
      if (slots[row] >= 0) {
        const int64_t offset = slots[row] * size;
        std::memcpy(static_cast<void*>(key_slots + offset), keys + row * key_stride, num_bytes);
        std::memcpy(static_cast<void*>(value_slots + offset), values + row * value_stride, num_bytes);
      }
    });
  });
}

} // namespace dynskip
