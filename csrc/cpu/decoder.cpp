// Decoders as handles: made from a description, kept while a step runs, deleted.

#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "ops.h"

namespace dynskip {

namespace {

using torch::stable::Tensor;

// Takes the numbers of a description one after the other.
class Reader {
 public:
  Reader(const std::vector<int64_t>& integers, const std::vector<double>& floats, size_t num_tensors)
      : integers_(integers), floats_(floats), num_tensors_(num_tensors) {}

  int64_t integer() {
    DYNSKIP_CHECK(next_integer_ < integers_.size(), "new_decoder: too few integers.");
    return integers_[next_integer_++];
  }

  bool flag() {
    return integer() != 0;
  }

  float number() {
    DYNSKIP_CHECK(next_float_ < floats_.size(), "new_decoder: too few floats.");
    return static_cast<float>(floats_[next_float_++]);
  }

  int64_t place() {
    const int64_t place = integer();
    DYNSKIP_CHECK(
        place >= -1 && place < static_cast<int64_t>(num_tensors_), "new_decoder: there is no tensor ", place, ".");
    return place;
  }

  NormSpec norm() {
    NormSpec norm;
    norm.exists = flag();
    norm.weight = place();
    norm.bias = place();
    norm.rms = flag();
    norm.eps = number();
    return norm;
  }

  MatrixSpec matrix() {
    MatrixSpec matrix;
    matrix.num_outputs = integer();
    matrix.num_inputs = integer();
    matrix.panel_outputs = integer();
    matrix.address = matrix.panel_outputs > 0 ? integer() : place();
    matrix.bias = place();
    return matrix;
  }

  bool is_at_end() const {
    return next_integer_ == integers_.size() && next_float_ == floats_.size();
  }

 private:
  const std::vector<int64_t>& integers_;
  const std::vector<double>& floats_;
  size_t num_tensors_;
  size_t next_integer_ = 0;
  size_t next_float_ = 0;
};

// The decoders that there are. A step holds its own, so that one which is deleted meanwhile lives until it ends.
struct Decoders {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Decoder>> by_handle;
  int64_t last_handle = 0;

  static Decoders& all() {
    static auto* decoders = new Decoders; // never destroyed: threads may outlive it at the end of the process
    return *decoders;
  }
};

} // namespace

std::shared_ptr<Decoder> decoder_at(int64_t handle) {
  Decoders& all = Decoders::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_handle.find(handle);
  DYNSKIP_CHECK(
      found != all.by_handle.end(), "decode_step: handle must be what new_decoder returned, got ", handle, ".");
  return found->second;
}

int64_t new_decoder(std::vector<Tensor> tensors, std::vector<int64_t> integers, std::vector<double> floats) {
  auto decoder = std::make_shared<Decoder>();
  Reader reader(integers, floats, tensors.size());
  const int64_t num_layers = reader.integer();
  for (int64_t* size :
       {&decoder->hidden_size, &decoder->num_heads, &decoder->num_kv_heads, &decoder->head_size, &decoder->embedding_size,
        &decoder->ffn_size, &decoder->vocab_size, &decoder->position_offset}) {
    *size = reader.integer();
  }
  for (bool* flag : {&decoder->norm_first, &decoder->parallel, &decoder->shared_norm, &decoder->gated}) {
    *flag = reader.flag();
  }
  decoder->activation = static_cast<Activation>(reader.integer());
  for (int64_t* place : {&decoder->embed_tokens, &decoder->embed_positions, &decoder->cos_sin, &decoder->slopes}) {
    *place = reader.place();
  }
  decoder->embed_norm = reader.norm();
  decoder->final_norm = reader.norm();
  decoder->project_in = reader.matrix();
  decoder->project_out = reader.matrix();
  decoder->lm_head = reader.matrix();
  for (int64_t index = 0; index < num_layers; ++index) {
    LayerSpec layer;
    for (NormSpec* norm : {&layer.attention_norm, &layer.ffn_norm, &layer.q_norm, &layer.k_norm}) {
      *norm = reader.norm();
    }
    for (MatrixSpec* matrix : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.out_proj, &layer.fc1, &layer.fc2}) {
      *matrix = reader.matrix();
    }
    layer.scale = reader.number();
    layer.window = reader.integer();
    decoder->layers.push_back(layer);
  }
  DYNSKIP_CHECK(reader.is_at_end() && decoder->embed_tokens >= 0, "new_decoder: the description must fit its layers.");
  decoder->tensors = std::move(tensors);
  Decoders& all = Decoders::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_handle[++all.last_handle] = std::move(decoder);
  return all.last_handle;
}

void delete_decoder(int64_t handle) {
  const std::shared_ptr<Decoder> last = decoder_at(handle); // its threads end outside of the lock
  Decoders& all = Decoders::all();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_handle.erase(handle);
}

void make_team(Decoder& decoder) {
  const int64_t num_threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  if (decoder.team == nullptr || decoder.team->size() != num_threads) {
    decoder.team.reset(new Team(num_threads));
    decoder.scratch.resize(num_threads);
    decoder.choice_scratch.resize(num_threads);
  }
}

std::vector<int64_t> decoder_times(int64_t handle) {
  const std::shared_ptr<Decoder> decoder = decoder_at(handle);
  return {decoder->times_ns[0], decoder->times_ns[1], decoder->times_ns[2]};
}

Memory zeroed_memory(int64_t num_bytes) {
  constexpr int64_t kLine = 64;
  constexpr int64_t kHugePage = int64_t{1} << 21;
  const int64_t alignment = num_bytes >= kHugePage ? kHugePage : kLine;
  const int64_t size = (num_bytes + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<char*>(std::aligned_alloc(alignment, size)), std::free);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
#if defined(__linux__)
  if (alignment == kHugePage) {
    madvise(memory.get(), size, MADV_HUGEPAGE); // a wish: small pages do as well, more slowly
  }
#endif
  std::memset(memory.get(), 0, size);
  return memory;
}

} // namespace dynskip
