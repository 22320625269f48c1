// CUDA's measure, decide, apply: a whole step in one launch.
//
// Blocks take tickets from a counter, a chunk of some parameter each, until there are none left. In one pass a chunk is
// measured and updated together, and the block that leaves last decides. In two passes the first tickets measure and
// the others apply; the block that measures the last chunk decides, and a block with a ticket to apply waits for that.
// Every ticket to measure is then held by a block that runs already and waits for nobody, so the wait ends whatever the
// size of the grid and whoever else is on the device; the blocks need not all be there at once.
//
// No torch header, and no launch by <<<>>>: with other definitions of cuda_runtime.h, this file is plain C++.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>

#include "../halves.h"
#include "../kernels.h"

#define LRK_DEVICE __device__ __forceinline__
#define LRK_ALONE __device__ __attribute__((noinline))  // what one thread does for its block: compiled once, called

namespace lrk::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kMaxDevices = 64;

// A chunk is 8192 elements, and twice as many as often as it takes for there to be no more than 8192 chunks (and one
// for each row): few enough that one block adds up their sums at once.
constexpr int kChunkBits = 13;
constexpr int64_t kManyChunks = 8192;

// Which dtypes the rows have: the fewer, the less a kernel has to ask.
enum Kind {
  kFloats,    // float32 alone
  kHalves,    // float32, bfloat16, float16, in any mixture
  kAnything,  // float64 somewhere
  kKinds
};

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

// ---------------------------------------------------------------------------------------------------------------------
// Memory

LRK_DEVICE unsigned int load_acquire(const unsigned int* p) {
#if defined(__CUDA_ARCH__)
  unsigned int x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
#else
  const unsigned int x = *static_cast<const volatile unsigned int*>(p);
  __threadfence();
#endif
  return x;
}

LRK_DEVICE void store_release(unsigned int* p, unsigned int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
#else
  __threadfence();
  *static_cast<volatile unsigned int*>(p) = x;
#endif
}

// What other blocks have written in this launch: past this multiprocessor's own cache.
LRK_DEVICE double load_fresh(const double* p) {
#if defined(__CUDA_ARCH__)
  return __ldcg(p);
#else
  return *static_cast<const volatile double*>(p);
#endif
}

// How long what is loaded or stored should stay in the cache.
enum Stay { kUseful, kDone };

#if defined(__CUDA_ARCH__)
template <class W>
LRK_DEVICE W load_word(const char* p, Stay stay) {
  const W* from = reinterpret_cast<const W*>(p);
  return stay == kDone ? __ldcs(from) : __ldcg(from);
}

template <class W>
LRK_DEVICE void store_word(char* p, W word, Stay stay) {
  W* to = reinterpret_cast<W*>(p);
  stay == kDone ? __stcs(to, word) : __stcg(to, word);
}
#else
template <int kBytes>
struct [[gnu::may_alias]] alignas(kBytes) Word {  // as strict about alignment as a GPU, where the compiler looks at it
  unsigned char bytes[kBytes];
};
#endif

// kBytes of one tensor, in registers: as many times 16 bytes as there are, or less than that at once.
template <int kBytes>
LRK_DEVICE void load_bytes(const char* p, uint32_t* to, Stay stay) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 word = load_word<uint4>(p + 16 * i, stay);
      to[4 * i] = word.x;
      to[4 * i + 1] = word.y;
      to[4 * i + 2] = word.z;
      to[4 * i + 3] = word.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 word = load_word<uint2>(p, stay);
    to[0] = word.x;
    to[1] = word.y;
  } else {
    to[0] = load_word<std::conditional_t<kBytes == 4, unsigned int, unsigned short>>(p, stay);
  }
#else
  (void)stay;
  constexpr int kEach = kBytes < 16 ? kBytes : 16;
  if (kEach < 4) to[0] = 0;
  for (int i = 0; i < kBytes; i += kEach) memcpy(to + i / 4, reinterpret_cast<const Word<kEach>*>(p + i)->bytes, kEach);
#endif
}

template <int kBytes>
LRK_DEVICE void store_bytes(char* p, const uint32_t* from, Stay stay) {
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      store_word(p + 16 * i, make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]), stay);
  } else if constexpr (kBytes == 8) {
    store_word(p, make_uint2(from[0], from[1]), stay);
  } else {
    store_word(p, std::conditional_t < kBytes == 4, unsigned int, unsigned short > (from[0]), stay);
  }
#else
  (void)stay;
  constexpr int kEach = kBytes < 16 ? kBytes : 16;
  for (int i = 0; i < kBytes; i += kEach) memcpy(reinterpret_cast<Word<kEach>*>(p + i)->bytes, from + i / 4, kEach);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// V neighbours of one tensor, as they are in memory. To load them is one thing and to convert them another, so that the
// loads of all tensors are under way before the first is waited for.

template <Kind kKind, int V>
struct Raw {
  static constexpr int kWords = kKind == kAnything ? 2 * V : V;
  uint32_t word[kWords];

  LRK_DEVICE void load(const void* memory, Dtype dtype, int32_t index, Stay stay) {
    const char* p = static_cast<const char*>(memory);
    if (kKind == kFloats || dtype == kFloat32) return load_bytes<4 * V>(p + 4 * int64_t(index), word, stay);
    if constexpr (kKind == kAnything)
      if (dtype == kFloat64) return load_bytes<8 * V>(p + 8 * int64_t(index), word, stay);
    if constexpr (kKind != kFloats) load_bytes<2 * V>(p + 2 * int64_t(index), word, stay);
  }

  LRK_DEVICE void store(void* memory, Dtype dtype, int32_t index, Stay stay) const {
    char* p = static_cast<char*>(memory);
    if (kKind == kFloats || dtype == kFloat32) return store_bytes<4 * V>(p + 4 * int64_t(index), word, stay);
    if constexpr (kKind == kAnything)
      if (dtype == kFloat64) return store_bytes<8 * V>(p + 8 * int64_t(index), word, stay);
    if constexpr (kKind != kFloats) store_bytes<2 * V>(p + 2 * int64_t(index), word, stay);
  }

  // N values from the one at `first` on; `first` is known to the compiler, and even where N is.
  template <class T, int N>
  LRK_DEVICE void get(Dtype dtype, int first, T (&values)[N]) const {
    if (kKind == kFloats || dtype == kFloat32) {
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = T(bits_to_float(word[first + i]));
    } else if (kKind == kAnything && dtype == kFloat64) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int low = 2 * (first + i) % kWords;
        const uint64_t bits = word[low] | uint64_t(word[(low + 1) % kWords]) << 32;
        double value;
        memcpy(&value, &bits, sizeof value);
        values[i] = T(value);
      }
    } else {
      const bool brain = dtype == kBFloat16;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto half = uint16_t(word[(first + i) / 2] >> (16 * (i % 2)));
        values[i] = T(brain ? from_bfloat16(half) : from_float16(half));
      }
    }
  }

  // round(value, i) makes 16 bits of values[i].
  template <class T, int N, class F>
  LRK_DEVICE void set_halves(int first, const T (&values)[N], F round) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      word[(first + i) / 2] = round(float(values[i]), i);
      if (i + 1 < N) word[(first + i) / 2] |= uint32_t(round(float(values[(i + 1) % N]), i + 1)) << 16;
    }
  }

  template <class T, int N>
  LRK_DEVICE void set(Dtype dtype, int first, const T (&values)[N]) {
    if (kKind == kFloats || dtype == kFloat32) {
#pragma unroll
      for (int i = 0; i < N; ++i) word[first + i] = float_to_bits(float(values[i]));
    } else if (kKind == kAnything && dtype == kFloat64) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto value = double(values[i]);
        const int low = 2 * (first + i) % kWords;
        uint64_t bits;
        memcpy(&bits, &value, sizeof bits);
        word[low] = uint32_t(bits);
        word[(low + 1) % kWords] = uint32_t(bits >> 32);
      }
    } else if (dtype == kBFloat16) {
      set_halves(first, values, [](float x, int) { return to_bfloat16(x); });
    } else {
      set_halves(first, values, [](float x, int) { return to_float16(x); });
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// MEASURE: sums in float64. Where float64 is quick, every product; elsewhere those of a few neighbours in float32 and
// their sum in float64, unless they might leave float32's range.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
constexpr bool kQuickFloat64 = false;
#elif defined(LRK_SLOW_FLOAT64)
constexpr bool kQuickFloat64 = false;
#else
constexpr bool kQuickFloat64 = true;
#endif

template <bool kFull, class A, class T, int V>
LRK_DEVICE void add_products(A (&sums)[kSums], const T (&grad)[V], bool directed, const T (&direction)[V],
                             bool has_prev, const T (&prev)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A g = A(grad[i]);
    sums[kGradSq] = fma(g, g, sums[kGradSq]);
    sums[kGradAbs] += g < 0 ? -g : g;
  }
  if (directed) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A g = A(grad[i]), d = A(direction[i]);
      sums[kDotDirection] = fma(g, d, sums[kDotDirection]);
      sums[kDirectionSq] = fma(d, d, sums[kDirectionSq]);
    }
  }
  if (kFull && has_prev) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A g = A(grad[i]), q = A(prev[i]), difference = g - q;
      sums[kDotPrev] = fma(g, q, sums[kDotPrev]);
      sums[kPrevSq] = fma(q, q, sums[kPrevSq]);
      sums[kDiffSq] = fma(difference, difference, sums[kDiffSq]);
    }
  }
}

template <bool kFull, class T, int V>
LRK_DEVICE void add(double (&sums)[kSums], const T (&grad)[V], bool directed, const T (&direction)[V], bool has_prev,
                    const T (&prev)[V]) {
  if constexpr (kQuickFloat64 || sizeof(T) == sizeof(double)) {
    add_products<kFull>(sums, grad, directed, direction, has_prev, prev);
  } else {
    float few[kSums] = {};
    add_products<kFull>(few, grad, directed, direction, has_prev, prev);
    const auto safe = [&](float square) {
      return (square > 0x1p-80f && square < 0x1p80f) || (square == 0 && few[kGradAbs] == 0);
    };
    bool all = safe(few[kGradSq]) && (!directed || safe(few[kDirectionSq]));
    if (kFull && has_prev) all = all && safe(few[kPrevSq]) && safe(few[kDiffSq]);
    if (all) {
#pragma unroll
      for (int k = 0; k < (kFull ? kMoveSq : kDotPrev); ++k) sums[k] += double(few[k]);
    } else {
      add_products<kFull>(sums, grad, directed, direction, has_prev, prev);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// One chunk

template <class T>
struct NoDirection {
  LRK_DEVICE NoDirection(const double*, float) {}
};

template <Rule kRule, class T>
using StepOf = std::conditional_t<kRule == kSgd, SgdStep<T>, AdamWStep<T>>;
template <Rule kRule, class T>
using DirectionOf = std::conditional_t<kRule == kSgd, NoDirection<T>, AdamWDirection<T>>;

// What one thread finds out about a chunk for the whole block.
struct Piece {
  int64_t begin;
  int32_t size;
  double direction_sign;
  uint32_t key;
  bool measuring, applying, directed, momentumless, has_prev, moving, at_random;
};

template <Rule kRule, class T>
struct Task : Piece {
  T unscale, scale;
  StepOf<kRule, T> step;
  DirectionOf<kRule, T> moved;
};

template <Rule kRule>
struct Shared {
  double control[kRingAt];
  double multiplier, unscale;
  unsigned int ticket;
  bool last, skip, found_inf;
  Row row;
  double sums[kWarps][kSums];
  alignas(16) unsigned char task[sizeof(Task<kRule, double>)];
};

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

LRK_ALONE void decide_alone(const Arguments& args, double* control, int rule, bool two_pass) {
  double hyper[kHypers];
  hyper_of(args, 0, hyper);
  decide(control, args.settings, hyper, rule, two_pass);
}

LRK_ALONE void finish_alone(const Arguments& args, double* control) {
  const double multiplier = at(args.table, args.table_size, control[kStep]);
  finish(control, args.settings, args.decay, args.decay_size, args.history, args.history_size, args.lr[0], multiplier);
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

LRK_RULE int64_t size_of(Dtype dtype) {
  return dtype == kFloat64 ? 8 : (dtype == kFloat32 ? 4 : 2);
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

// U times V neighbours, those that are there: load all of them, then measure and apply a few at a time, and store.
template <Rule kRule, Kind kKind, bool kFull, int V, int U, class T>
LRK_DEVICE void run_elements(const Row& row, const Task<kRule, T>& task, const StepOf<kRule, T>& step,
                             const int32_t (&at)[U], const bool (&there)[U], double (&sums)[kSums]) {
  using Words = Raw<kKind, V>;
  constexpr int kFew = V < 4 ? V : 4, kOurStates = kRule == kSgd ? 1 : kStates;
  const bool applying = task.applying, measuring = task.measuring;
  const auto needs = [&](int k) {  // state k
    if (!row.states[k] || applying) return row.states[k] != nullptr;
    if constexpr (kRule == kSgd)
      return task.directed && !task.momentumless;
    else
      return task.directed && (k == 0 || k == (step.amsgrad ? 2 : 1));
  };
  const bool has_master = kKind != kFloats && row.master;
  void* const updated = has_master ? row.master : row.param;
  const Dtype updated_dtype = has_master ? kFloat32 : row.param_dtype;
  const Stay stay = applying ? kDone : kUseful;

  Words grads[U], params[U], states[U][kOurStates], prevs[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!there[u]) continue;
    grads[u].load(row.grad, row.grad_dtype, at[u], stay);
    if (applying) params[u].load(updated, updated_dtype, at[u], kUseful);
#pragma unroll
    for (int k = 0; k < kOurStates; ++k)
      if (needs(k)) states[u][k].load(row.states[k], row.state_dtype, at[u], stay);
    if (kFull && task.has_prev) prevs[u].load(row.prev_read, row.prev_dtype, at[u], stay);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!there[u]) continue;
    Words rounded;  // of a float32 master
#pragma unroll
    for (int few = 0; few < V; few += kFew) {
      T grad[kFew], state[kOurStates][kFew];
      grads[u].get(row.grad_dtype, few, grad);
#pragma unroll
      for (int i = 0; i < kFew; ++i) grad[i] = grad[i] * task.unscale;
#pragma unroll
      for (int k = 0; k < kOurStates; ++k) {
#pragma unroll
        for (int i = 0; i < kFew; ++i) state[k][i] = T(0);
        if (needs(k)) states[u][k].get(row.state_dtype, few, state[k]);
      }
      if (measuring) {
        T prev[kFew] = {}, direction[kFew] = {};
        if (kFull && task.has_prev) prevs[u].get(row.prev_dtype, few, prev);
        if (task.directed) {
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            if constexpr (kRule == kSgd)
              direction[i] = kFull && task.momentumless ? prev[i] : state[0][i];
            else
              direction[i] = task.moved(state[0][i], step.amsgrad ? state[2][i] : state[1][i]);
          }
        }
        add<kFull>(sums, grad, task.directed, direction, task.has_prev, prev);
      }
      if (!applying) continue;
      if (kFull && row.prev_write) prevs[u].set(row.prev_dtype, few, grad);
      T param[kFew], before[kFew];
      params[u].get(updated_dtype, few, param);
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        before[i] = param[i];
        if constexpr (kRule == kSgd)
          step(param[i], grad[i] * task.scale, state[0][i]);
        else
          step(param[i], grad[i] * task.scale, state[0][i], state[1][i], state[2][i]);
      }
      if (kKind != kFloats && task.at_random) {
        const auto random = [&](int i) { return random_bits(task.key, uint64_t(task.begin + at[u] + few + i)); };
        if (row.param_dtype == kBFloat16)
          params[u].set_halves(few, param, [&](float x, int i) { return to_bfloat16_at_random(x, random(i)); });
        else
          params[u].set_halves(few, param, [&](float x, int i) { return to_float16_at_random(x, random(i)); });
      } else {
        params[u].set(updated_dtype, few, param);
      }
      if (kFull && task.moving) {
        T after[kFew];  // as it will be in memory
        params[u].get(updated_dtype, few, after);
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          const double moved = double(after[i]) - double(before[i]);
          sums[kMoveSq] = fma(moved, moved, sums[kMoveSq]);
        }
      }
      if (has_master) rounded.set(row.param_dtype, few, param);
#pragma unroll
      for (int k = 0; k < kOurStates; ++k)
        if (row.states[k]) states[u][k].set(row.state_dtype, few, state[k]);
    }
    if (!applying) continue;
    params[u].store(updated, updated_dtype, at[u], kUseful);
    if (has_master) rounded.store(row.param, row.param_dtype, at[u], kUseful);
#pragma unroll
    for (int k = 0; k < kOurStates; ++k)
      if (row.states[k]) states[u][k].store(row.states[k], row.state_dtype, at[u], kDone);
    if (kFull && row.prev_write) prevs[u].store(row.prev_write, row.prev_dtype, at[u], kDone);
  }
}

// How many neighbours make up 16 bytes of the narrowest tensor; where there is float64, of that.
LRK_RULE constexpr int width_of(Kind kind, bool wide) {
  return kind == kFloats ? 4 : (kind == kHalves ? 8 : (wide ? 2 : 1));
}

template <Rule kRule, Kind kKind, bool kFull, class T>
LRK_DEVICE void run_chunk(const Shared<kRule>& shared, double (&sums)[kSums]) {
  const Row& row = shared.row;  // read again for each element: registers are dearer than shared memory
  const Task<kRule, T>& task = *reinterpret_cast<const Task<kRule, T>*>(shared.task);
  const StepOf<kRule, T> step = task.step;
  constexpr int V = width_of(kKind, sizeof(T) == sizeof(double));
  constexpr int U = kRule == kSgd && kKind == kFloats ? 2 : 1;    // so many vectors are under way at once
  constexpr int S = kRule == kSgd && kKind != kAnything ? 2 : 1;  // and single elements
  const int32_t size = task.size, head = row.head;
  const int32_t vectors = head < 0 || size < head ? 0 : (size - head) / V;
  for (int32_t j = int32_t(threadIdx.x); j < vectors; j += U * kThreads) {
    int32_t at[U];
    bool there[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      at[u] = head + (j + u * kThreads) * V;
      there[u] = u == 0 || j + u * kThreads < vectors;
    }
    run_elements<kRule, kKind, kFull, V, U>(row, task, step, at, there, sums);
  }
  // The elements before and after the vectors; all of them where the tensors are not aligned alike.
  const int32_t before = vectors > 0 ? head : 0, scalars = size - vectors * V;
  for (int32_t j = int32_t(threadIdx.x); j < scalars; j += S * kThreads) {
    int32_t at[S];
    bool there[S];
#pragma unroll
    for (int u = 0; u < S; ++u) {
      const int32_t i = j + u * kThreads;
      at[u] = i < before ? i : i + vectors * V;
      there[u] = u == 0 || i < scalars;
    }
    run_elements<kRule, kKind, kFull, 1, S>(row, task, step, at, there, sums);
  }
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
