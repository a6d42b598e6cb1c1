// The ops of the extension; dynskip/ops/reference.py, row_reference.py and choice_reference.py specify them.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace dynskip {

torch::stable::Tensor gather_layer_norm(
    const torch::stable::Tensor& x,
    const std::optional<torch::stable::Tensor>& row_ids,
    const std::optional<torch::stable::Tensor>& weight,
    const std::optional<torch::stable::Tensor>& bias,
    double eps,
    bool rms);

void scatter_add(
    const torch::stable::Tensor& x,
    const std::optional<torch::stable::Tensor>& row_ids,
    const torch::stable::Tensor& y);

void kv_store(
    const torch::stable::Tensor& k,
    const torch::stable::Tensor& v,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const torch::stable::Tensor& slot_mapping);

torch::stable::Tensor decode_attention(
    const torch::stable::Tensor& q,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const torch::stable::Tensor& slot_table,
    const torch::stable::Tensor& seq_ids,
    const torch::stable::Tensor& context_lens,
    double scale,
    const std::optional<torch::stable::Tensor>& slopes,
    int64_t window,
    const std::optional<torch::stable::Tensor>& position_ids,
    const std::optional<torch::stable::Tensor>& slot_positions);

void rotate(
    const torch::stable::Tensor& x,
    const torch::stable::Tensor& position_ids,
    const torch::stable::Tensor& cos_sin,
    const std::optional<torch::stable::Tensor>& weight,
    double eps);

// activation: a number of `Activation`.
torch::stable::Tensor activate(const torch::stable::Tensor& x, int64_t activation, bool gated);

// The first token of the largest logit of each row of logits [R, V], or -1 where that is not finite.
torch::stable::Tensor most_likely(const torch::stable::Tensor& logits);

// As `Choice` says for each row; all are [R], float64 or int64. On the threads of a decoder; 0: on the calling thread.
torch::stable::Tensor choose_tokens(
    const torch::stable::Tensor& logits,
    const torch::stable::Tensor& temperature,
    const torch::stable::Tensor& top_k,
    const torch::stable::Tensor& top_p,
    const torch::stable::Tensor& min_p,
    const torch::stable::Tensor& seed,
    const torch::stable::Tensor& output,
    const torch::stable::Tensor& position,
    int64_t decoder);

// [R, V], float32: the rows of logits [N, V] that rows [R], int64, name. On the threads of a decoder, as choose_tokens.
torch::stable::Tensor float_rows(const torch::stable::Tensor& logits, const torch::stable::Tensor& rows, int64_t decoder);

// Whether the extension was built with its CUDA sources: the CUDA part of plan_rows, and replay.
bool has_cuda();

// Launches captured graphs (cudaGraphExec_t as integers) one after another on torch's current stream of the device.
void replay(std::vector<int64_t> graph_execs, int64_t device_index);

// The outputs of a panel where the packed_bytes at packed_data hold weight [out, in] in a layout that packed_linear reads
// on this machine; else 0.
int64_t packed_panel_outputs(const torch::stable::Tensor& weight, int64_t packed_data, int64_t packed_bytes);

// x [R, in] times the packed matrix [num_outputs, in] at packed_data, plus bias [num_outputs], through the activation of
// that number in `Activation`.
torch::stable::Tensor packed_linear(
    const torch::stable::Tensor& x,
    int64_t packed_data,
    int64_t panel_outputs,
    int64_t num_outputs,
    const std::optional<torch::stable::Tensor>& bias,
    int64_t activation);

// A decoder for decode_step and guess_tokens, from the description that dynskip/execution/native_steps.py makes; it holds
// the tensors.
int64_t new_decoder(
    std::vector<torch::stable::Tensor> tensors, std::vector<int64_t> integers, std::vector<double> floats);
void delete_decoder(int64_t decoder);

// Nanoseconds in products, in attention and in the rest, of all steps that were timed.
std::vector<int64_t> decoder_times(int64_t decoder);

// A whole decode step; see dynskip.ops.native.decode_step.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> decode_step(
    int64_t decoder,
    const torch::stable::Tensor& token_ids,
    const torch::stable::Tensor& position_ids,
    const torch::stable::Tensor& cache_ids,
    const torch::stable::Tensor& active,
    int64_t kv_policy,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const std::optional<torch::stable::Tensor>& slot_positions,
    const torch::stable::Tensor& context_lens,
    const torch::stable::Tensor& slot_tables,
    const torch::stable::Tensor& free_slots,
    const torch::stable::Tensor& slot_cursor,
    const torch::stable::Tensor& counts,
    const std::optional<torch::stable::Tensor>& gate_weight,
    const std::optional<torch::stable::Tensor>& gate_bias,
    const std::optional<torch::stable::Tensor>& gate_asks,
    bool with_head,
    const std::optional<torch::stable::Tensor>& head_rows,
    bool is_prompt,
    bool is_timed,
    const std::optional<torch::stable::Tensor>& begun_rows,
    const std::optional<torch::stable::Tensor>& begun_states,
    std::vector<torch::stable::Tensor> choices);

// Some decode steps, one after the other; see dynskip.ops.native.guess_tokens.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> guess_tokens(
    int64_t decoder,
    const torch::stable::Tensor& token_ids,
    const torch::stable::Tensor& position_ids,
    const torch::stable::Tensor& cache_ids,
    const torch::stable::Tensor& active,
    const torch::stable::Tensor& num_guesses,
    std::vector<torch::stable::Tensor> choices,
    const std::optional<torch::stable::Tensor>& num_common,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const std::optional<torch::stable::Tensor>& slot_positions,
    const torch::stable::Tensor& context_lens,
    const torch::stable::Tensor& slot_tables,
    const torch::stable::Tensor& free_slots,
    const torch::stable::Tensor& slot_cursor,
    const torch::stable::Tensor& counts,
    bool is_timed);

// num_threads: how many threads share the work, 0 for the device's own choice; the result is the same. On a GPU that can,
// the kernel overlaps with the one before it; carveout: the percentage of L1 that it asks for as shared memory, or -1.
void plan_rows(
    const torch::stable::Tensor& active,
    int64_t first_layer,
    int64_t kv_policy,
    const torch::stable::Tensor& cache_ids,
    const torch::stable::Tensor& context_lens,
    const torch::stable::Tensor& slot_tables,
    const torch::stable::Tensor& free_slots,
    const torch::stable::Tensor& slot_cursor,
    const torch::stable::Tensor& row_slots,
    const torch::stable::Tensor& run_ids,
    const torch::stable::Tensor& num_run,
    const torch::stable::Tensor& kv_ids,
    const torch::stable::Tensor& num_kv,
    const torch::stable::Tensor& slots,
    const torch::stable::Tensor& key_limits,
    int64_t num_threads,
    bool overlaps,
    int64_t carveout);

// Whether many rows by bfloat16 panels of so many outputs take no longer on this machine than oneDNN's product.
bool multiplies_many_rows(int64_t panel_outputs);

// The name of the instruction set in use.
std::string instruction_set();

// Makes all following calls use the named set, or with "best" the best of this machine.
void use_instruction_set(std::string name);

} // namespace dynskip
