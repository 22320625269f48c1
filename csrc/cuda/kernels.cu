// CUDA's measure, decide, apply: a whole step in one launch.
//
// Blocks take tickets from a counter, a chunk of some parameter each, until there are none left. In one pass a chunk is
// measured and updated together, and the block that leaves last decides. In two passes the first tickets measure and
// the others apply; the block that measures the last chunk decides, and a block with a ticket to apply waits for that.
// Every ticket to measure is then held by a block that runs already and waits for nobody, so the wait ends whatever the
// size of the grid and whoever else is on the device; the blocks need not all be there at once.
//
// No torch header, and no launch by <<<>>>: with other definitions of cuda_runtime.h, all of this is plain C++.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>

#include "../kernels.h"
#include "chunk.cuh"
#include "memory.cuh"

#define LRK_ALONE __device__ __attribute__((noinline))  // what one thread does for its block: compiled once, called

namespace lrk::cuda {
namespace {

constexpr int kMaxDevices = 64;

// A chunk is 8192 elements, and twice as many as often as it takes for there to be no more than 8192 chunks (and one
// for each row): few enough that one block adds up their sums at once.
constexpr int kChunkBits = 13;
constexpr int64_t kManyChunks = 8192;

// ---------------------------------------------------------------------------------------------------------------------
// What the host tells the kernel

// In device memory, all zero between launches. The last block to leave makes it so: nobody else is there by then, and
// the next launch on the stream starts after this one. So a captured launch can be replayed, and the host never has to.
struct Counters {
  unsigned int tickets;   // taken
  unsigned int measured;  // chunks
  unsigned int left;      // blocks that are done
  alignas(128) unsigned int decided;
};
constexpr int64_t kCounterBytes = 256;
static_assert(sizeof(Counters) <= kCounterBytes);

struct Header : Small, Parts {
  Counters* counters;
  double* partials;       // a row of chunks for each sum
  const uint64_t* there;  // the list, in device memory; null: it is in the argument
  uint32_t measured_chunks, measure_tickets, tickets;
  int32_t chunks, rows, chunk_bits;
  double settings[kSettings];
};

// The list: the first chunk of each row (int32), the rows (Row), the rows of hyper-parameters (double).
constexpr int64_t kRowWords = sizeof(Row) / 8;
static_assert(sizeof(Row) % 8 == 0);
LRK_RULE int64_t rows_at(int64_t rows) {
  return (rows + 1) / 2;
}
LRK_RULE int64_t hypers_at(int64_t rows) {
  return rows_at(rows) + rows * kRowWords;
}

#if CUDART_VERSION >= 12010
constexpr int64_t kArgumentBytes = 32764;
#else
constexpr int64_t kArgumentBytes = 4096;
#endif
constexpr int64_t kListWords = (kArgumentBytes - int64_t(sizeof(Header))) / 8;

struct Arguments : Header {
  uint64_t here[kListWords];
};
static_assert(sizeof(Arguments) <= kArgumentBytes);

LRK_DEVICE uint64_t list_word(const Arguments& args, int64_t i) {
  return args.there ? args.there[i] : args.here[i];
}

LRK_DEVICE int32_t first_chunk(const Arguments& args, int32_t row) {
  return int32_t(uint32_t(list_word(args, row / 2) >> (32 * (row % 2))));
}

LRK_DEVICE uint64_t row_word(const Arguments& args, int32_t row, int64_t i) {
  return list_word(args, rows_at(args.rows) + int64_t(row) * kRowWords + i);
}

LRK_DEVICE void hyper_of(const Arguments& args, int32_t group, double (&hyper)[kHypers]) {
#pragma unroll
  for (int i = 0; i < kHypers; ++i) {
    const uint64_t word = list_word(args, hypers_at(args.rows) + int64_t(group) * kHypers + i);
    memcpy(&hyper[i], &word, sizeof word);
  }
}

// The last row whose first chunk is not after this one; rows without elements have the same first chunk as the next.
LRK_DEVICE int32_t row_with(const Arguments& args, int32_t chunk) {
  int32_t low = 0, high = args.rows;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (first_chunk(args, middle) <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---------------------------------------------------------------------------------------------------------------------
// What one thread does for its block

LRK_ALONE void decide_alone(const Arguments& args, double* control, int rule, bool two_pass) {
  double hyper[kHypers];
  hyper_of(args, 0, hyper);
  decide(control, args.settings, hyper, rule, two_pass);
}

LRK_ALONE void finish_alone(const Arguments& args, double* control) {
  const double multiplier = at(args.table, args.table_size, control[kStep]);
  finish(control, args.settings, args.decay, args.decay_size, args.history, args.history_size, args.lr[0], multiplier);
}

template <class P>
LRK_DEVICE P advanced(P memory, Dtype dtype, int64_t elements) {
  return memory ? P((const char*)(memory) + elements * size_of(dtype)) : memory;
}

template <Rule kRule, class T>
LRK_ALONE void prepare(const Arguments& args, Shared<kRule>& shared, int32_t chunk_in_row, bool measuring,
                       bool applying) {
  Row& row = shared.row;
  double hyper[kHypers];
  hyper_of(args, row.group, hyper);
  const double* control = shared.control;
  const float updates = row.counts[kUpdates];
  const double lr = applying ? rate(args.lr[row.group], shared.multiplier, control, args.settings) : 0.0;
  const double sign = hyper[kMaximize] != 0 ? -1.0 : 1.0;
  const bool momentumless = kRule == kSgd && hyper[kMomentum] == 0;
  const bool half = row.param_dtype == kBFloat16 || row.param_dtype == kFloat16;
  const bool at_random = applying && half && !row.master && args.settings[kStochasticRounding] != 0;
  const int64_t begin = int64_t(chunk_in_row) << args.chunk_bits, rest = row.numel - begin;
  const bool has_prev = measuring && row.prev_read && row.counts[kHasPrev] != 0;
  Piece piece;
  piece.begin = begin;
  piece.size = int32_t(rest < (int64_t(1) << args.chunk_bits) ? rest : int64_t(1) << args.chunk_bits);
  piece.direction_sign = momentumless ? 1.0 : sign;  // a direction points uphill where one climbs; a gradient does not
  piece.key = at_random ? random_key(control[kStep], uint32_t(row.index)) : 0;
  piece.measuring = measuring;
  piece.applying = applying;
  piece.directed =
      measuring && (args.measure & kDirection) && (kRule == kSgd ? !momentumless || has_prev : updates > 0);
  piece.momentumless = momentumless;
  piece.has_prev = has_prev;
  piece.moving = applying && (args.measure & kMove);
  piece.at_random = at_random;
  const StepOf<kRule, T> step(hyper, lr, control[kLength], updates);
  const DirectionOf<kRule, T> moved(hyper, updates);
  new (shared.task) Task<kRule, T>{piece, T(shared.unscale), T(sign * control[kClip]), step, moved};
  // From here on the row is the chunk.
  row.param = advanced(row.param, row.param_dtype, begin);
  row.grad = advanced(row.grad, row.grad_dtype, begin);
  for (int k = 0; k < kStates; ++k) row.states[k] = advanced(row.states[k], row.state_dtype, begin);
  row.master = advanced(row.master, kFloat32, begin);
  row.prev_read = advanced(row.prev_read, row.prev_dtype, begin);
  row.prev_write = advanced(row.prev_write, row.prev_dtype, begin);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks

// How many sums a kernel takes; the others stay out of registers and memory.
template <bool kFull>
constexpr int kTaken = kFull ? kSums : kDotPrev;

// Whether a pass that measures or applies has this sum.
LRK_DEVICE bool belongs(int sum, bool measuring, bool applying) {
  return sum == kMoveSq ? applying : measuring;
}

// The block's sum of each thread's `sums`, in a fixed order, to thread k < kSums for sum k.
template <Rule kRule, bool kFull>
LRK_DEVICE double sum_of_block(Shared<kRule>& shared, double (&sums)[kSums]) {
#pragma unroll
  for (int k = 0; k < kTaken<kFull>; ++k) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums[k] += __shfl_down_sync(0xffffffffu, sums[k], lanes);
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp][k] = sums[k];
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < kTaken<kFull>)
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp][threadIdx.x];
  return sum;
}

// Adds up the chunks' partial sums, in their order, whichever block has made them.
template <Rule kRule, bool kFull>
LRK_DEVICE void sum_of_chunks(const Arguments& args, Shared<kRule>& shared, bool measuring, bool applying) {
  double sums[kSums] = {};
#pragma unroll 2
  for (int32_t chunk = int32_t(threadIdx.x); chunk < args.chunks; chunk += kThreads) {
#pragma unroll
    for (int k = 0; k < kTaken<kFull>; ++k)
      if (belongs(k, measuring, applying)) sums[k] += load_fresh(args.partials + int64_t(k) * args.chunks + chunk);
  }
  const double sum = sum_of_block<kRule, kFull>(shared, sums);
  const auto k = int(threadIdx.x);
  if (k < kSums && belongs(k, measuring, applying)) shared.control[kSumsAt + k] = sum;
  __syncthreads();
}

template <Rule kRule>
LRK_DEVICE void read_control(const Arguments& args, Shared<kRule>& shared) {
  for (int i = int(threadIdx.x); i < kRingAt; i += kThreads) shared.control[i] = load_fresh(args.control + i);
  __syncthreads();
}

template <Rule kRule>
LRK_DEVICE void write_control(const Arguments& args, const Shared<kRule>& shared) {
  for (int i = int(threadIdx.x); i < kRingAt; i += kThreads) args.control[i] = shared.control[i];
  __syncthreads();
}

// A skipped step measures nothing: its statistics are NaN.
template <Rule kRule>
LRK_DEVICE void no_sums(Shared<kRule>& shared) {
  if (threadIdx.x < kSums) shared.control[kSumsAt + threadIdx.x] = NAN;
  __syncthreads();
}

// Runs the chunks of all tickets below `limit`, and returns how many; `ahead`, in the first thread: the next ticket.
template <Rule kRule, Kind kKind, bool kFull>
LRK_DEVICE unsigned int run_tickets(const Arguments& args, Shared<kRule>& shared, unsigned int& ahead,
                                    unsigned int limit, bool measuring, bool applying) {
  const bool backwards = applying && !args.together;  // what was measured last is still in the cache
  const bool summing = kFull || measuring;
  const auto chunk_of = [&](unsigned int ticket) {  // -1: nothing to do
    const bool work = !shared.skip && (backwards || ticket < args.measured_chunks);
    return work ? int32_t(backwards ? limit - 1 - ticket : ticket) : -1;
  };
  unsigned int done = 0;
  for (;; ++done) {
    if (threadIdx.x == 0) {
      const unsigned int ticket = shared.ticket = ahead;
      const int32_t chunk = ticket < limit ? chunk_of(ticket) : -1;
      if (chunk >= 0) {
        const int32_t row = row_with(args, chunk), in_row = chunk - first_chunk(args, row);
#pragma unroll
        for (int i = 0; i < kRowWords; ++i) {
          const uint64_t word = row_word(args, row, i);
          memcpy(reinterpret_cast<char*>(&shared.row) + 8 * i, &word, sizeof word);
        }
        const bool wide = kKind == kAnything && shared.row.param_dtype == kFloat64;
        if constexpr (kKind == kAnything)
          if (wide) prepare<kRule, double>(args, shared, in_row, measuring, applying);
        if (!wide) prepare<kRule, float>(args, shared, in_row, measuring, applying);
      }
      if (ticket < limit) ahead = atomicAdd(&args.counters->tickets, 1u);  // under way while this chunk is worked on
    }
    __syncthreads();
    const unsigned int ticket = shared.ticket;
    if (ticket >= limit) break;
    const int32_t chunk = chunk_of(ticket);
    double sums[kSums] = {};
    if (chunk >= 0) {
      if constexpr (kKind == kAnything) {
        if (shared.row.param_dtype == kFloat64)
          run_chunk<kRule, kKind, kFull, double>(shared, sums);
        else
          run_chunk<kRule, kKind, kFull, float>(shared, sums);
      } else {
        run_chunk<kRule, kKind, kFull, float>(shared, sums);
      }
    }
    if (chunk < 0 || !summing) {
      __syncthreads();
      continue;
    }
    const double sign = reinterpret_cast<const Piece*>(shared.task)->direction_sign;
    const double sum = sum_of_block<kRule, kFull>(shared, sums);
    const auto k = int(threadIdx.x);
    if (k < kTaken<kFull> && belongs(k, measuring, applying))
      args.partials[int64_t(k) * args.chunks + chunk] = k == kDotDirection ? sign * sum : sum;
  }
  __syncthreads();
  return done;
}

// Publishes what this block has written, and adds `done` to a counter; whether that made up the whole.
template <class Count>
LRK_DEVICE bool completes(bool& shared_last, Count* counter, Count done, Count whole) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has written before the barrier is seen first, and the others' after
    shared_last = done > 0 && atomicAdd(counter, done) + done == whole;
    if (shared_last) __threadfence();
  }
  __syncthreads();
  return shared_last;
}

// How many blocks a multiprocessor should hold: the more, the fewer registers each has; so many that nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kHungry = 1;  // the compiler takes some more registers for these
#else
constexpr int kHungry = 0;
#endif
template <Rule kRule, Kind kKind, bool kFull>
constexpr int kBlocks = kKind == kFloats ? (kRule == kSgd && !kFull ? 5 : 4) : (kRule == kSgd ? 4 : 3) - kHungry;

template <Rule kRule, Kind kKind, bool kFull>
__global__ void __launch_bounds__(kThreads, (kBlocks<kRule, kKind, kFull>))
    run_step(const __grid_constant__ Arguments args) {
  __shared__ Shared<kRule> shared;
  Counters& counters = *args.counters;
  unsigned int ahead = threadIdx.x == 0 ? atomicAdd(&counters.tickets, 1u) : 0u;
  if (threadIdx.x == 0) {
    shared.unscale = args.grad_scale ? 1.0 / double(*args.grad_scale) : 1.0;
    shared.skip = shared.found_inf = args.found_inf && *args.found_inf != 0;
  }

  // First the tickets that measure, if there are any apart, then those that apply: one loop, so that the code for the
  // chunks is there once.
#pragma unroll 1
  for (bool first = args.measure_tickets > 0;; first = false) {
    const bool measuring = first || (args.together && args.measure != 0);
    if (first) {
      if (threadIdx.x == 0) shared.control[kLength] = shared.control[kClip] = 1.0;  // not known yet, nor needed
    } else {
      if (!args.applies) break;
      // A block that came too late to apply anything has not waited, and must not read what may be being decided.
      if (args.measure_tickets > 0 && shared.ticket >= args.tickets) break;
      read_control(args, shared);
      if (threadIdx.x == 0) {
        if (args.together) begin(shared.control, shared.found_inf);
        shared.skip = shared.control[kSkip] != 0;
        shared.multiplier = at(args.table, args.table_size, shared.control[kStep]);
      }
    }
    __syncthreads();
    const unsigned int done = run_tickets<kRule, kKind, kFull>(
        args, shared, ahead, first ? args.measure_tickets : args.tickets, measuring, !first);
    if (!first) break;
    if (completes(shared.last, &counters.measured, done, args.measure_tickets)) {
      read_control(args, shared);
      if (args.measures) {
        if (threadIdx.x == 0) begin(shared.control, shared.found_inf);
        __syncthreads();
        if (shared.found_inf)
          no_sums(shared);
        else
          sum_of_chunks<kRule, kFull>(args, shared, true, false);
      }
      if (threadIdx.x == 0 && args.decides_ahead) decide_alone(args, shared.control, kRule, true);
      __syncthreads();
      write_control(args, shared);
      if (threadIdx.x == 0) store_release(&counters.decided, 1u);
    }
    if (threadIdx.x == 0 && ahead < args.tickets) {
      while (load_acquire(&counters.decided) == 0) __nanosleep(100);
    }
    __syncthreads();
  }

  if (!completes(shared.last, &counters.left, 1u, gridDim.x)) return;

  // The last block: everything is done and seen.
  if (args.applies || args.ends) {
    if (!args.together) read_control(args, shared);
    const bool applied = args.applies && shared.control[kSkip] == 0;
    __syncthreads();  // it may be decided anew
    if (applied)
      sum_of_chunks<kRule, kFull>(args, shared, args.together && args.measure != 0, true);
    else if (args.together)
      no_sums(shared);
    if (threadIdx.x == 0 && args.decides) decide_alone(args, shared.control, kRule, false);
    for (int32_t i = int32_t(threadIdx.x); i < args.rows && applied; i += kThreads) {
      auto* counts = reinterpret_cast<float*>(row_word(args, i, offsetof(Row, counts) / 8));
      counts[kUpdates] += 1;
      counts[kHasPrev] = 1;
    }
    __syncthreads();
    const bool ring = args.settings[kClosedLoop] == kVolSched;  // which is not in shared memory
    if (ring) write_control(args, shared);
    if (threadIdx.x == 0 && args.ends) finish_alone(args, ring ? args.control : shared.control);
    __syncthreads();
    if (!ring) write_control(args, shared);
  }
  if (threadIdx.x == 0) {
    counters.tickets = counters.measured = 0;
    counters.left = counters.decided = 0;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's part

using Kernel = void (*)(Arguments);

// Alone with float32 it pays to leave the sums out that are not taken; the others have the registers anyway.
Kernel kernel_of(int rule, Kind kind, bool full) {
  if (kind == kFloats && full) return rule == kSgd ? run_step<kSgd, kFloats, true> : run_step<kAdamW, kFloats, true>;
  if (kind == kFloats) return rule == kSgd ? run_step<kSgd, kFloats, false> : run_step<kAdamW, kFloats, false>;
  if (kind == kHalves) return rule == kSgd ? run_step<kSgd, kHalves, true> : run_step<kAdamW, kHalves, true>;
  return rule == kSgd ? run_step<kSgd, kAnything, true> : run_step<kAdamW, kAnything, true>;
}
constexpr int kKernels = 2 * kKinds * 2;

Kind kind_of(const std::vector<Row>& rows) {
  bool floats = true, wide = false;
  const auto see = [&](const void* memory, Dtype dtype) {
    if (!memory) return;
    floats = floats && dtype == kFloat32;
    wide = wide || dtype == kFloat64;
  };
  for (const Row& row : rows) {
    if (row.numel == 0) continue;
    see(row.param, row.param_dtype);
    see(row.grad, row.grad_dtype);
    for (const void* state : row.states) see(state, row.state_dtype);
    see(row.prev_read, row.prev_dtype);
    see(row.prev_write, row.prev_dtype);
    floats = floats && !row.master;
  }
  return wide ? kAnything : (floats ? kFloats : kHalves);
}

// Whether the previous gradient or the move has a part in it.
bool is_full(const Job& job) {
  bool full = job.measure & (kPrevious | kMove);
  for (const Row& row : job.rows) full = full || row.prev_read || row.prev_write;
  return full;
}

// How many elements come before the first whose vectors all tensors have aligned; -1 where they never are.
int8_t head_of(const Row& row, int vector) {
  const struct {
    const void* memory;
    Dtype dtype;
  } tensors[] = {{row.param, row.param_dtype},     {row.grad, row.grad_dtype},       {row.states[0], row.state_dtype},
                 {row.states[1], row.state_dtype}, {row.states[2], row.state_dtype}, {row.master, kFloat32},
                 {row.prev_read, row.prev_dtype},  {row.prev_write, row.prev_dtype}};
  for (int head = 0; head < vector; ++head) {
    const auto aligned = [&](const auto& tensor) {
      const int64_t size = size_of(tensor.dtype), width = std::min<int64_t>(16, size * vector);
      return !tensor.memory || (int64_t(reinterpret_cast<uintptr_t>(tensor.memory)) + head * size) % width == 0;
    };
    if (std::all_of(std::begin(tensors), std::end(tensors), aligned)) return int8_t(head);
  }
  return -1;
}

int chunk_bits_of(const std::vector<Row>& rows) {
  int64_t elements = 0;
  int bits = kChunkBits;
  for (const Row& row : rows) elements += row.numel;
  while ((elements >> bits) > kManyChunks && bits < 30) ++bits;
  return bits;
}

int64_t chunks_of(const Row& row, int chunk_bits) {
  return (row.numel + (int64_t(1) << chunk_bits) - 1) >> chunk_bits;
}

void fill(const Job& job, Kind kind, int chunk_bits, uint64_t* list) {
  const auto rows = int64_t(job.rows.size());
  auto* first = reinterpret_cast<int32_t*>(list);
  auto* to = reinterpret_cast<Row*>(list + rows_at(rows));
  int64_t chunks = 0;
  for (const Row& row : job.rows) {
    *first++ = int32_t(chunks);
    chunks += chunks_of(row, chunk_bits);
    *to = row;
    to++->head = head_of(row, width_of(kind, row.param_dtype == kFloat64));
  }
  memcpy(list + hypers_at(rows), job.hyper, size_t(job.groups) * kHypers * sizeof(double));
}

}  // namespace

const char* run(const Job& job, int verbs, int device, void* stream, Workspace& workspace) {
  const Kind kind = kind_of(job.rows);
  const bool full = is_full(job);
  const int index = (job.rule * kKinds + kind) * 2 + full;
  const Kernel kernel = kernel_of(job.rule, kind, full);

  Arguments args;
  static_cast<Small&>(args) = job;
  static_cast<Parts&>(args) = parts_of(job, verbs);
  const int chunk_bits = chunk_bits_of(job.rows);
  const auto rows = int64_t(job.rows.size());
  const int64_t list_words = hypers_at(rows) + job.groups * kHypers;
  int64_t chunks = 0;
  for (const Row& row : job.rows) chunks += chunks_of(row, chunk_bits);
  if (chunks > INT32_MAX / 2) return "more than a thousand million chunks";
  const bool beyond = list_words > kListWords;
  const int64_t memory_bytes = kCounterBytes + kSums * chunks * int64_t(sizeof(double));
  const int64_t list_bytes = beyond ? list_words * 8 : 0;
  if (workspace.memory_bytes < memory_bytes || workspace.list_bytes < list_bytes) {
    workspace.memory_bytes = memory_bytes;
    workspace.list_bytes = list_bytes;
    workspace.memory = nullptr;
    return nullptr;
  }
  fill(job, kind, chunk_bits, beyond ? static_cast<uint64_t*>(workspace.pinned) : args.here);

  auto* memory = static_cast<char*>(workspace.memory);
  args.counters = reinterpret_cast<Counters*>(memory);
  args.partials = reinterpret_cast<double*>(memory + kCounterBytes);
  args.there = beyond ? static_cast<const uint64_t*>(workspace.list) : nullptr;
  const bool ahead = (args.measures && !args.together) || args.decides_ahead;
  args.measured_chunks = args.measures ? uint32_t(chunks) : 0;
  args.measure_tickets = ahead ? std::max(args.measured_chunks, 1u) : 0;
  args.tickets = args.measure_tickets + (args.applies ? uint32_t(chunks) : 0);
  args.chunks = int32_t(chunks);
  args.rows = int32_t(rows);
  args.chunk_bits = chunk_bits;
  std::copy_n(job.settings, int(kSettings), args.settings);

  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  static std::atomic<int> resident[kMaxDevices][kKernels];  // blocks of each kernel that a device runs at once
  int blocks = device < kMaxDevices ? resident[device][index].load() : 0;
  if (error == cudaSuccess && blocks == 0) {
    int each = 0, processors = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    blocks = std::max(1, each * processors);
    if (device < kMaxDevices) resident[device][index] = error == cudaSuccess ? blocks : 0;
  }
  auto* const queue = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess && beyond)
    error = cudaMemcpyAsync(workspace.list, workspace.pinned, size_t(list_bytes), cudaMemcpyHostToDevice, queue);
  if (error == cudaSuccess) {
    const auto grid = (unsigned int)(std::clamp<int64_t>(args.tickets, 1, blocks));
    void* arguments[] = {&args};
    error = cudaLaunchKernel(kernel, dim3(grid), dim3(kThreads), arguments, 0, queue);
  }
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lrk::cuda
