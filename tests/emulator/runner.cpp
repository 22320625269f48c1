// Calls the kernels' entry, lrk::cuda::run, with a Job made of flat arrays, and gives it the workspace that it asks
// for.

#include <cuda_runtime.h>

#include "kernels.h"

// __init__.py has the same fields.
struct FlatJob {
  const lrk::Row* rows;
  int64_t row_count;
  double* control;
  const double *settings, *lr, *hyper;
  int64_t groups;
  const double* table;
  int64_t table_size;
  const double* decay;
  int64_t decay_size;
  double* history;
  int64_t history_size;
  const float *found_inf, *grad_scale;
  int rule, measure, two_pass, verbs;
};

namespace {

lrk::cuda::Workspace workspace;

void* zeros(int64_t size) {
  void* memory = nullptr;
  cudaMalloc(&memory, size_t(size));
  cudaMemsetAsync(memory, 0, size_t(size), nullptr);
  return memory;
}

}  // namespace

extern "C" {

int emulator_sizes(int of_job) {
  return of_job ? sizeof(FlatJob) : sizeof(lrk::Row);
}

// Forgets the workspace, as an optimizer does at its end; false if a launch has not left its counters at zero.
int emulator_finish() {
  bool clean = true;
  const auto* counters = static_cast<const unsigned char*>(workspace.memory);
  for (int i = 0; counters && i < 256; ++i) clean = clean && counters[i] == 0;
  for (void* memory : {workspace.memory, workspace.list, workspace.pinned}) cudaFree(memory);
  workspace = {};
  return clean;
}

const char* emulator_step(const FlatJob* flat, int device) {
  lrk::Job job{};
  job.rows.assign(flat->rows, flat->rows + flat->row_count);
  job.control = flat->control;
  job.settings = flat->settings;
  job.lr = flat->lr;
  job.hyper = flat->hyper;
  job.groups = flat->groups;
  job.table = flat->table;
  job.table_size = flat->table_size;
  job.decay = flat->decay;
  job.decay_size = flat->decay_size;
  job.history = flat->history;
  job.history_size = flat->history_size;
  job.found_inf = flat->found_inf;
  job.grad_scale = flat->grad_scale;
  job.rule = flat->rule;
  job.measure = flat->measure;
  job.two_pass = flat->two_pass != 0;
  lrk::cuda::Workspace asked = workspace;
  const char* error = lrk::cuda::run(job, flat->verbs, device, nullptr, asked);
  if (error || asked.memory) return error;
  emulator_finish();
  workspace = {zeros(asked.memory_bytes), asked.memory_bytes, nullptr, nullptr, asked.list_bytes};
  if (asked.list_bytes) {
    workspace.list = zeros(asked.list_bytes);
    workspace.pinned = zeros(asked.list_bytes);
  }
  return lrk::cuda::run(job, flat->verbs, device, nullptr, workspace);
}
}
