// One chunk: every thread of a block loads some of its elements, measures and updates them, and stores them.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "memory.cuh"

namespace lrk::cuda {
namespace {

constexpr int kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;

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
// What a block shares

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

// ---------------------------------------------------------------------------------------------------------------------
// Load, measure, apply, store

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

}  // namespace
}  // namespace lrk::cuda
