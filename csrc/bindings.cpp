#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(dynskip_native, m) {
  m.def("gather_layer_norm(Tensor x, Tensor? row_ids, Tensor? weight, Tensor? bias, float eps, bool rms=False) -> Tensor");
  m.def("scatter_add(Tensor(a!) x, Tensor? row_ids, Tensor y) -> ()");
  m.def("kv_store(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot_table, Tensor seq_ids, "
      "Tensor context_lens, float scale, Tensor? slopes=None, int window=0, Tensor? position_ids=None, "
      "Tensor? slot_positions=None) -> Tensor");
  m.def("rotate(Tensor(a!) x, Tensor position_ids, Tensor cos_sin, Tensor? weight=None, float eps=0.0) -> ()");
  m.def("activate(Tensor x, int activation, bool gated=False) -> Tensor");
  m.def("most_likely(Tensor logits) -> Tensor");
  m.def(
      "choose_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
      "Tensor output, Tensor position, int decoder=0) -> Tensor");
  m.def("float_rows(Tensor logits, Tensor rows, int decoder=0) -> Tensor");
  m.def(
      "plan_rows(Tensor active, int first_layer, int kv_policy, Tensor cache_ids, Tensor(a!) context_lens, "
      "Tensor(b!) slot_tables, Tensor free_slots, Tensor(c!) slot_cursor, Tensor(d!) row_slots, Tensor(e!) run_ids, "
      "Tensor(f!) num_run, Tensor(g!) kv_ids, Tensor(h!) num_kv, Tensor(i!) slots, Tensor(j!) key_limits, int num_threads=0, "
      "bool overlaps=True, int carveout=-1) -> ()");
  m.def("packed_panel_outputs(Tensor weight, int packed_data, int packed_bytes) -> int");
  m.def("packed_linear(Tensor x, int packed_data, int panel_outputs, int num_outputs, Tensor? bias, int activation) -> Tensor");
  m.def("new_decoder(Tensor[] tensors, int[] integers, float[] floats) -> int");
  m.def("delete_decoder(int decoder) -> ()");
  m.def("decoder_times(int decoder) -> int[]");
  m.def(
      "decode_step(int decoder, Tensor token_ids, Tensor position_ids, Tensor cache_ids, Tensor active, int kv_policy, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? slot_positions, Tensor(d!) context_lens, Tensor(e!) slot_tables, "
      "Tensor free_slots, Tensor(f!) slot_cursor, Tensor(g!) counts, Tensor? gate_weight, Tensor? gate_bias, "
      "Tensor? gate_asks, bool with_head, Tensor? head_rows, bool is_prompt, bool is_timed, Tensor? begun_rows, "
      "Tensor? begun_states, Tensor[] choices) -> (Tensor, Tensor)");
  m.def(
      "guess_tokens(int decoder, Tensor token_ids, Tensor position_ids, Tensor cache_ids, Tensor active, "
      "Tensor num_guesses, Tensor[] choices, Tensor? num_common, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!)? slot_positions, Tensor(d!) context_lens, Tensor(e!) slot_tables, Tensor free_slots, "
      "Tensor(f!) slot_cursor, Tensor(g!) counts, bool is_timed) -> (Tensor, Tensor)");
  m.def("has_cuda() -> bool");
  m.def("replay(int[] graph_execs, int device_index) -> ()");
  m.def("multiplies_many_rows(int panel_outputs) -> bool");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynskip_native, CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&dynskip::has_cuda));
  m.impl("new_decoder", TORCH_BOX(&dynskip::new_decoder));
  m.impl("delete_decoder", TORCH_BOX(&dynskip::delete_decoder));
  m.impl("decoder_times", TORCH_BOX(&dynskip::decoder_times));
  m.impl("multiplies_many_rows", TORCH_BOX(&dynskip::multiplies_many_rows));
  m.impl("instruction_set", TORCH_BOX(&dynskip::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&dynskip::use_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(dynskip_native, CPU, m) {
  m.impl("gather_layer_norm", TORCH_BOX(&dynskip::gather_layer_norm));
  m.impl("scatter_add", TORCH_BOX(&dynskip::scatter_add));
  m.impl("kv_store", TORCH_BOX(&dynskip::kv_store));
  m.impl("decode_attention", TORCH_BOX(&dynskip::decode_attention));
  m.impl("rotate", TORCH_BOX(&dynskip::rotate));
  m.impl("activate", TORCH_BOX(&dynskip::activate));
  m.impl("most_likely", TORCH_BOX(&dynskip::most_likely));
  m.impl("choose_tokens", TORCH_BOX(&dynskip::choose_tokens));
  m.impl("float_rows", TORCH_BOX(&dynskip::float_rows));
  m.impl("plan_rows", TORCH_BOX(&dynskip::plan_rows));
  m.impl("packed_panel_outputs", TORCH_BOX(&dynskip::packed_panel_outputs));
  m.impl("decode_step", TORCH_BOX(&dynskip::decode_step));
  m.impl("guess_tokens", TORCH_BOX(&dynskip::guess_tokens));
  m.impl("packed_linear", TORCH_BOX(&dynskip::packed_linear));
}

#ifdef DYNSKIP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dynskip_native, CompositeExplicitAutograd, m) {
  m.impl("replay", TORCH_BOX(&dynskip::replay));
}

STABLE_TORCH_LIBRARY_IMPL(dynskip_native, CUDA, m) {
  m.impl("plan_rows", TORCH_BOX(&dynskip::plan_rows));
}
#endif

// Importing dynskip._C registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
