// Small kernels in the manner of the real ones, for testing the emulator itself: each is also broken on purpose.

#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 96, kWarps = kThreads / 32;
constexpr int kChunk = 4 * kThreads;  // elements that a block takes at a time, four by four

__device__ double block_sum(double value) {
  __shared__ double partials[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = value;
  __syncthreads();  // the warps' sums are there
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += partials[i];
  return sum;
}

// The numbers of one chunk: those in whole vectors, and those after them.
__device__ double chunk_sum(const float* values, int64_t begin, int64_t end) {
  double sum = 0, rest = 0;
  int64_t i = begin + 4 * threadIdx.x;
  for (; i + 4 <= end; i += 4 * kThreads) {
    const float4 x = __ldcs(reinterpret_cast<const float4*>(values + i));
    sum += double(x.x) + double(x.y) + double(x.z) + double(x.w);
  }
  for (; i < end; ++i) rest += double(values[i]);
  const double whole = block_sum(sum);
  return whole + block_sum(rest);
}

// Each block sums one chunk; the block that finishes last adds up the partials, in order.
__global__ void last_block(const float* values, int64_t size, double* partials, unsigned* finished, double* sum) {
  __shared__ bool last;
  const int64_t begin = int64_t(blockIdx.x) * kChunk;
  const double partial = chunk_sum(values, begin, begin + kChunk < size ? begin + kChunk : size);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = partial;
    __threadfence();  // out
    last = atomicAdd(finished, 1u) % gridDim.x == gridDim.x - 1;
    __threadfence();  // in
  }
  __syncthreads();  // last
  if (!last) return;
  double total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) total += partials[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *sum = total;
}

// Two passes: the first tickets sum the chunks, the next ones divide them by the sum, which is there by then. A block
// with a ticket of the second kind waits for blocks that run, whatever the size of the grid.
__global__ void tickets(float* values, int64_t size, double* partials, unsigned* counters, double* sum) {
  __shared__ unsigned ticket;
  const unsigned chunks = unsigned((size + kChunk - 1) / kChunk);
  unsigned *taken = counters, *summed = counters + 1, *left = counters + 2;
  volatile unsigned* ready = counters + 3;
  for (;;) {
    if (threadIdx.x == 0) ticket = atomicAdd(taken, 1u);
    __syncthreads();  // taken
    const unsigned mine = ticket;
    if (mine >= 2 * chunks) break;
    const unsigned chunk = mine % chunks;
    const int64_t begin = int64_t(chunk) * kChunk, end = begin + kChunk < size ? begin + kChunk : size;
    if (mine < chunks) {
      const double partial = chunk_sum(values, begin, end);
      if (threadIdx.x == 0) {
        partials[chunk] = partial;
        __threadfence();  // partial
        if (atomicAdd(summed, 1u) == chunks - 1) {
          __threadfence();  // every partial is there
          double total = 0;
          for (unsigned i = 0; i < chunks; ++i) total += partials[i];
          *sum = total;
          __threadfence();  // publish
          *ready = 1;
        }
      }
    } else {
      if (threadIdx.x == 0) {
        while (*ready == 0) __nanosleep(20);
        __threadfence();  // what was summed is there
      }
      __syncthreads();  // waited
      const float scale = float(1 / *sum);
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) values[i] *= scale;
    }
  }
  if (threadIdx.x == 0 && atomicAdd(left, 1u) == gridDim.x - 1)
    for (int i = 0; i < 4; ++i) atomicExch(counters + i, 0u);
}

// What must not be done: every block waits for every other, which may never start.
__global__ void everybody(unsigned* arrived) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1u);
    while (*static_cast<volatile unsigned*>(arrived) < gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

// Half of the warp goes one way, half the other.
__global__ void votes(const float* values, unsigned* out) {
  const bool positive = values[threadIdx.x] > 0;
  const unsigned ballot = __ballot_sync(0xffffffffu, positive);
  const int any = __any_sync(0xffffffffu, positive), all = __all_sync(0xffffffffu, positive);
  const int count = __syncthreads_count(positive), one = __syncthreads_or(positive), both = __syncthreads_and(positive);
  float x = values[threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  const float first = __shfl_sync(0xffffffffu, values[threadIdx.x], 8, 8);
  const unsigned row[] = {ballot,        unsigned(any),  unsigned(all),      unsigned(count),
                          unsigned(one), unsigned(both), __float_as_uint(x), __float_as_uint(first)};
  for (int i = 0; i < 8; ++i) out[8 * threadIdx.x + i] = row[i];
}

}  // namespace

extern "C" {

int sample_last_block(const float* values, int64_t size, double* partials, unsigned* finished, double* sum) {
  void* arguments[] = {&values, &size, &partials, &finished, &sum};
  return cudaLaunchKernel(last_block, dim3(unsigned((size + kChunk - 1) / kChunk)), dim3(kThreads), arguments, 0,
                          nullptr);
}

int sample_tickets(float* values, int64_t size, double* partials, unsigned* counters, double* sum, unsigned blocks) {
  void* arguments[] = {&values, &size, &partials, &counters, &sum};
  return cudaLaunchKernel(tickets, dim3(blocks), dim3(kThreads), arguments, 0, nullptr);
}

int sample_everybody(unsigned* arrived, unsigned blocks) {
  void* arguments[] = {&arrived};
  return cudaLaunchKernel(everybody, dim3(blocks), dim3(kThreads), arguments, 0, nullptr);
}

int sample_votes(const float* values, unsigned* out) {
  void* arguments[] = {&values, &out};
  return cudaLaunchKernel(votes, dim3(1), dim3(kThreads), arguments, 0, nullptr);
}
}
