// The seam between Python and the kernels: raw pointers and sizes, no torch types.
#pragma once

#include <cstdint>
#include <vector>

#include "rules.h"

namespace lrk {

enum Dtype : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

// What to take while the step runs; a set of bits.
enum Measure { kNorms = 1, kDirection = 2, kPrevious = 4, kMove = 8 };

constexpr int kStates = 3;  // sgd: momentum_buffer; adamw: exp_avg, exp_avg_sq, max_exp_avg_sq

// One parameter: flat memory, because all of its tensors share one dense layout. A null pointer is a tensor that is
// not there; a row without a gradient is left out of the list.
struct Row {
  void* param;
  const void* grad;
  void* states[kStates];
  void* master;           // float32: what the update works on; `param` then gets it rounded
  const void* prev_read;  // the previous gradient
  void* prev_write;       // where to keep this one; null when nothing is kept or the caller keeps the tensor itself
  float* counts;
  int64_t numel;
  int32_t group;
  int32_t index;  // among all parameters, those without a gradient too
  Dtype param_dtype, grad_dtype, state_dtype, prev_dtype;
  int8_t head;  // CUDA's own: elements before the first whose vectors are aligned in every tensor; -1: there is none
};

// What a step reads and writes beside the rows, on their device; the lists have one entry per group, or per step.
struct Small {
  double* control;
  const double* lr;
  const double* table;  // the open-loop multipliers
  const double* decay;  // volsched's own
  double* history;
  const float* found_inf;
  const float* grad_scale;
  int64_t table_size, decay_size, history_size;
  int measure;
};

// One step over all rows.
struct Job : Small {
  std::vector<Row> rows;
  const double* settings;  // the host's, as the rows of hyper-parameters, one per group
  const double* hyper;
  int64_t groups;
  int rule;
  bool two_pass;
};

// Which of the verbs one call runs; a set of bits. All of them is a whole step.
enum Verb { kMeasureVerb = 1, kDecideVerb = 2, kApplyVerb = 4, kStepVerbs = 7 };

// What one call does of a step: MEASURE begins it, and the last verb of its order ends it, in one call or in several.
struct Parts {
  bool measures, applies, together;   // together: in one pass
  bool decides_ahead, decides, ends;  // before applying; for the next step; the step is over then
};

inline Parts parts_of(const Job& job, int verbs) {
  const bool measures = verbs & kMeasureVerb, applies = verbs & kApplyVerb;
  const bool decides = (verbs & kDecideVerb) && job.measure;
  return {measures,
          applies,
          measures && applies && !job.two_pass,
          decides && job.two_pass,
          decides && !job.two_pass,
          (verbs & (job.two_pass ? kApplyVerb : kDecideVerb)) != 0};
}

namespace cpu {
void run(Job& job, int verbs);
const char* instruction_set();
}  // namespace cpu

namespace cuda {

// What a step needs besides its tensors, from whoever owns it; each optimizer has its own.
struct Workspace {
  void* memory;  // on the device, all zero at first: counters and partial sums
  int64_t memory_bytes;
  void* list;  // on the device, and in pinned memory of the host: the rows, where they do not fit into an argument
  void* pinned;
  int64_t list_bytes;
};

// Puts one launch on the stream. Where the workspace is too small, does nothing but say how many bytes it should have,
// and sets `memory` to null. Returns what went wrong, or null.
const char* run(const Job& job, int verbs, int device, void* stream, Workspace& workspace);

}  // namespace cuda

}  // namespace lrk
