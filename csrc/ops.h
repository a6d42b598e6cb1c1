// The ops of the extension; dynskip/reference.py specifies each.

#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>

namespace dynskip {

torch::stable::Tensor decode_attention(
    const torch::stable::Tensor& q,
    const torch::stable::Tensor& k_cache,
    const torch::stable::Tensor& v_cache,
    const torch::stable::Tensor& slot_table,
    const torch::stable::Tensor& seq_ids,
    const torch::stable::Tensor& context_lens,
    double scale);

// The name of the instruction set in use.
std::string instruction_set();

// Makes all following calls use the named set, or with "best" the best of this machine.
void use_instruction_set(std::string name);

} // namespace dynskip
