// The CPU's measure, decide, apply: chunks handed out to torch's own threads, sums added up in the order of the chunks.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// pow(base, exponent), which takes longer than a small row; but most rows ask for what the row before them did.
static double remembered_power(double base, double exponent) {
  struct Answer {
    double base, exponent, power;
  };
  static thread_local Answer answers[4] = {{0, 0, 1}, {0, 0, 1}, {0, 0, 1}, {0, 0, 1}};
  static thread_local unsigned oldest = 0;
  for (const Answer& known : answers)
    if (known.base == base && known.exponent == exponent) return known.power;
  Answer& answer = answers[oldest++ % 4];
  answer = {base, exponent, std::pow(base, exponent)};
  return answer.power;
}
#define LRK_POWER ::remembered_power

#include "../halves.h"
#include "../kernels.h"

// torch's C shim, stable since 2.10: at::parallel_for and at::get_num_threads.
extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                           void (*function)(int64_t begin, int64_t end, void* context), void* context);
int32_t torch_get_num_threads(uint32_t* count);
}

namespace lrk::cpu {
namespace {

constexpr int kTile = 1024;             // elements: seven tiles of float stay in a first-level cache of 32 KiB
constexpr int64_t kChunk = 64 * kTile;  // elements: the unit of summation, so that sums do not depend on the threads
constexpr int64_t kBatch = 4;           // chunks: what one thread takes at a time, where there are enough for all
constexpr int64_t kGrain = 1 << 15;     // elements: under this, one thread does it all
constexpr int64_t kAhead = 4;           // chunks
constexpr int kLine = 64, kFetched = 4 * kLine;  // bytes of each tensor

namespace baseline {
#include "tiles.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LRK_BASELINE_ONLY)
#define LRK_X86_64_V3
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LRK_AVX2  // g++ 12 reads the file, #ifs and all, before it heeds the pragma: its own macros come too late
namespace x86_64_v3 {
#include "tiles.h"
}
#undef LRK_AVX2
#pragma GCC pop_options
#endif

using RunRow = void (*)(const Job&, const Row&, int64_t, int64_t, bool, bool, double*);

bool has_x86_64_v3() {
#if defined(LRK_X86_64_V3)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

RunRow run_row() {
#if defined(LRK_X86_64_V3)
  static const bool wide = has_x86_64_v3();
  return wide ? x86_64_v3::run_row : baseline::run_row;
#else
  return baseline::run_row;
#endif
}

struct Chunk {
  const Row* row;
  int64_t begin, end;
};

// Prefetches the beginning of a row, which is all of a small one: small rows are scattered over memory.
void fetch(const Row& row, bool applying) {
  const void* const tensors[] = {row.grad, row.states[0], applying ? row.param : nullptr};
  for (const void* memory : tensors)
    for (int at = 0; memory && at < kFetched; at += kLine) __builtin_prefetch(static_cast<const char*>(memory) + at);
}

std::vector<Chunk> chunks_of(const std::vector<Row>& rows) {
  std::vector<Chunk> chunks;
  chunks.reserve(rows.size());
  for (const Row& row : rows)
    for (int64_t begin = 0; begin < row.numel; begin += kChunk)
      chunks.push_back({&row, begin, std::min(begin + kChunk, row.numel)});
  return chunks;
}

// Runs f(0) ... f(count - 1), each once, on torch's threads; the threads take the next few as they come free.
template <class F>
void parallel(int64_t count, int64_t elements, const F& f) {
  uint32_t threads = 1;
  if (elements > kGrain) torch_get_num_threads(&threads);
  const int64_t batch = std::clamp(count / (8 * threads), int64_t(1), kBatch);
  std::atomic<int64_t> ticket{0};
  auto worker = [&] {
    for (int64_t begin = ticket.fetch_add(batch); begin < count; begin = ticket.fetch_add(batch))
      for (int64_t i = begin; i < std::min(begin + batch, count); ++i) f(i);
  };
  if (threads <= 1) return worker();
  const auto call = [](int64_t, int64_t, void* context) { (*static_cast<decltype(worker)*>(context))(); };
  torch_parallel_for(0, threads, 1, call, &worker);
}

// A skipped step measures nothing: its statistics are NaN.
void skip(const Job& job) {
  std::fill_n(job.control + kSumsAt, int(kSums), NAN);
}

// One pass over all chunks. Backwards, the gradients that a pass before this one read last are still in the cache.
void pass(const Job& job, const std::vector<Chunk>& chunks, bool measuring, bool applying, bool backwards) {
  static thread_local std::vector<double> partials;
  partials.resize(chunks.size() * kSums);  // each chunk writes all of its own
  double* const partial = partials.data();
  int64_t elements = 0;
  for (const Row& row : job.rows) elements += row.numel;
  const int64_t count = int64_t(chunks.size());
  const RunRow run = run_row();
  parallel(count, elements, [&](int64_t i) {
    const int64_t k = backwards ? count - 1 - i : i, next = backwards ? k - kAhead : k + kAhead;
    if (next >= 0 && next < count && chunks[next].begin == 0) fetch(*chunks[next].row, applying);
    run(job, *chunks[k].row, chunks[k].begin, chunks[k].end, measuring, applying, partial + k * kSums);
  });
  double sums[kSums] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < kSums; ++k) sums[k] += partial[i * kSums + k];
  for (int k = 0; k < kSums; ++k)
    if (k == kMoveSq ? applying : measuring) job.control[kSumsAt + k] = sums[k];
}

void count(const Job& job) {
  for (const Row& row : job.rows) {
    row.counts[kUpdates] += 1;
    row.counts[kHasPrev] = 1;
  }
}

void finish(const Job& job) {
  const double multiplier = at(job.table, job.table_size, job.control[kStep]);
  lrk::finish(job.control, job.settings, job.decay, job.decay_size, job.history, job.history_size, job.lr[0],
              multiplier);
}

}  // namespace

const char* instruction_set() {
  return has_x86_64_v3() ? "x86-64-v3 (AVX2, FMA)" : "baseline";
}

void run(Job& job, int verbs) {
  const std::vector<Chunk> chunks = chunks_of(job.rows);
  const Parts parts = parts_of(job, verbs);
  if (parts.measures) {
    begin(job.control, job.found_inf && *job.found_inf != 0);
    if (job.control[kSkip] != 0)
      skip(job);
    else if (!parts.together)
      pass(job, chunks, true, false, false);
  }
  if (parts.decides_ahead) decide(job.control, job.settings, job.hyper, job.rule, true);
  if (parts.applies && job.control[kSkip] == 0) {
    pass(job, chunks, parts.together && job.measure, true, !parts.together);
    count(job);
  }
  if (parts.decides) decide(job.control, job.settings, job.hyper, job.rule, false);
  if (parts.ends) finish(job);
}

}  // namespace lrk::cpu
