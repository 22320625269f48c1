// The loops over one tile, a piece of one parameter small enough to stay in the first-level cache: load, measure,
// apply, store. Included once per instruction set by kernels.cpp, inside a namespace of its own; so no include guard.

//
// Everything is computed in T: float for parameters of up to 32 bits, double for float64.

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bfloat16(uint16_t x) {
  return bits_to_float(uint32_t(x) << 16);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16;
  const uint32_t magnitude = float_to_bits(bits_to_float(uint32_t(x & 0x7fffu) << 13) * 0x1p112f);
  const uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(sign | magnitude | special);
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return uint16_t(sign | half);
}

template <class T>
T* load(const void* memory, Dtype dtype, int64_t offset, int size, T* scratch) {
  const auto convert = [&](auto* source, auto to_float) {
    source += offset;
    for (int i = 0; i < size; ++i) scratch[i] = T(to_float(source[i]));
    return scratch;
  };
  const auto same = [](auto x) { return x; };
  switch (dtype) {
    case kBFloat16:
      return convert(static_cast<const uint16_t*>(memory), from_bfloat16);
    case kFloat16:
      return convert(static_cast<const uint16_t*>(memory), from_float16);
    case kFloat32:
      if (sizeof(T) == 4) return static_cast<T*>(const_cast<void*>(memory)) + offset;
      return convert(static_cast<const float*>(memory), same);
    default:
      if (sizeof(T) == 8) return static_cast<T*>(const_cast<void*>(memory)) + offset;
      return convert(static_cast<const double*>(memory), same);
  }
}

// `values` written where it came from needs no store.
template <class T>
void store(void* memory, Dtype dtype, int64_t offset, int size, const T* values) {
  const auto convert = [&](auto* target, auto from_float) {
    target += offset;
    if (static_cast<const void*>(target) == values) return;
    for (int i = 0; i < size; ++i) target[i] = from_float(values[i]);
  };
  switch (dtype) {
    case kBFloat16:
      return convert(static_cast<uint16_t*>(memory), to_bfloat16);
    case kFloat16:
      return convert(static_cast<uint16_t*>(memory), to_float16);
    case kFloat32:
      return convert(static_cast<float*>(memory), [](T x) { return float(x); });
    default:
      return convert(static_cast<double*>(memory), [](T x) { return double(x); });
  }
}

// A copy that is not read again soon: past the caches, so that the target is written without being read first.
inline void stream(float* target, const float* source, int size) {
  int i = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(target) % 16 == 0)
    for (; i + 4 <= size; i += 4) _mm_stream_ps(target + i, _mm_loadu_ps(source + i));
#endif
  for (; i < size; ++i) target[i] = source[i];
}

// Sums in float64, in kLanes running sums each, added up in one fixed order: the same bits on every processor.
constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double)), aligned(8)));
typedef int64_t LaneMask __attribute__((vector_size(kLanes * sizeof(double)), aligned(8)));

template <class T>
inline Lanes lanes(const T* values) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T))));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(values), Lanes);
}

inline Lanes absolute(Lanes x) {
  return reinterpret_cast<Lanes>(reinterpret_cast<LaneMask>(x) & INT64_MAX);
}

inline double total(Lanes x) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

// sums[k] += the sum over the tile of terms(...)[k], a whole number of lanes at a time, then the rest padded with
// zeros.
template <int kTerms, class T, int kInputs, class Terms>
void accumulate(double* const (&sums)[kTerms], const T* const (&inputs)[kInputs], int size, Terms terms) {
  Lanes running[kTerms] = {};
  const auto add = [&](const T* const(&at)[kInputs], int i) {
    Lanes values[kInputs], results[kTerms];
    for (int k = 0; k < kInputs; ++k) values[k] = lanes(at[k] + i);
    terms(values, results);
    for (int k = 0; k < kTerms; ++k) running[k] += results[k];
  };
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) add(inputs, i);
  if (i < size) {
    T padded[kInputs][kLanes] = {};
    const T* rest[kInputs];
    for (int k = 0; k < kInputs; ++k) {
      for (int lane = 0; lane < size - i; ++lane) padded[k][lane] = inputs[k][i + lane];
      rest[k] = padded[k];
    }
    add(rest, 0);
  }
  for (int k = 0; k < kTerms; ++k) *sums[k] += total(running[k]);
}

// MEASURE one tile. `direction` and `prev` may be null.
template <class T>
void measure(const T* grad, const T* direction, const T* prev, int size, double* sums) {
  if (direction) {
    accumulate<4>({&sums[kGradSq], &sums[kGradAbs], &sums[kDotDirection], &sums[kDirectionSq]}, {grad, direction}, size,
                  [](const Lanes* in, Lanes* out) {
                    out[0] = in[0] * in[0], out[1] = absolute(in[0]);
                    out[2] = in[0] * in[1], out[3] = in[1] * in[1];
                  });
  } else {
    accumulate<2>({&sums[kGradSq], &sums[kGradAbs]}, {grad}, size,
                  [](const Lanes* in, Lanes* out) { out[0] = in[0] * in[0], out[1] = absolute(in[0]); });
  }
  if (prev) {
    accumulate<3>({&sums[kDotPrev], &sums[kPrevSq], &sums[kDiffSq]}, {grad, prev}, size,
                  [](const Lanes* in, Lanes* out) {
                    const Lanes difference = in[0] - in[1];
                    out[0] = in[0] * in[1], out[1] = in[1] * in[1], out[2] = difference * difference;
                  });
  }
}

template <class T>
void measure_move(const T* before, const T* after, int size, double* sums) {
  accumulate<1>({&sums[kMoveSq]}, {before, after}, size, [](const Lanes* in, Lanes* out) {
    const Lanes moved = in[1] - in[0];
    out[0] = moved * moved;
  });
}

// APPLY one tile: the rule, element by element.
template <class T>
void apply(const SgdStep<T>& rule, T* __restrict param, const T* __restrict grad, T scale, T* const* states, int size) {
  const SgdStep<T> step = rule;
  if (step.has_momentum) {
    T* __restrict buffer = states[0];
    for (int i = 0; i < size; ++i) step(param[i], grad[i] * scale, buffer[i]);
  } else {
    T none = 0;
    for (int i = 0; i < size; ++i) step(param[i], grad[i] * scale, none);
  }
}

template <class T>
void apply(const AdamWStep<T>& rule, T* __restrict param, const T* __restrict grad, T scale, T* const* states,
           int size) {
  const AdamWStep<T> step = rule;
  T* __restrict exp_avg = states[0];
  T* __restrict exp_avg_sq = states[1];
  if (step.amsgrad) {
    T* __restrict max_exp_avg_sq = states[2];
    for (int i = 0; i < size; ++i) step(param[i], grad[i] * scale, exp_avg[i], exp_avg_sq[i], max_exp_avg_sq[i]);
  } else {
    T none = 0;
    for (int i = 0; i < size; ++i) step(param[i], grad[i] * scale, exp_avg[i], exp_avg_sq[i], none);
  }
}

// One chunk of one row: MEASURE and APPLY, either or both.
template <class T, class StepRule>
void run_chunk(const Job& job, const Row& row, int64_t begin, int64_t end, bool measuring, bool applying,
               double* sums) {
  alignas(64) T scratch[4 + kStates][kTile];
  const double* hyper = job.hyper + row.group * kHypers;
  const double* control = job.control;
  const double multiplier = at(job.table, job.table_size, control[kStep]);
  const StepRule rule(hyper, rate(job.lr[row.group], multiplier, control, job.settings), row.counts[kUpdates]);
  const double sign = hyper[kMaximize] != 0 ? -1.0 : 1.0;
  const T unscale = T(job.grad_scale ? 1.0 / double(*job.grad_scale) : 1.0);
  const T scale = T(sign * control[kClip]);
  const T prev_unscale = T(!row.prev_write && control[kLastGradScale] != 0 ? 1.0 / control[kLastGradScale] : 1.0);
  const bool has_prev = row.prev_read && (!row.prev_write || row.counts[kHasPrev] != 0);
  const bool momentumless = job.rule == kSgd && hyper[kMomentum] == 0;

  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int size = int(end - offset < kTile ? end - offset : kTile);
    T* states[kStates] = {};
    for (int k = 0; k < kStates; ++k)
      if (row.states[k]) states[k] = load(row.states[k], row.state_dtype, offset, size, scratch[4 + k]);
    const T* grad = load(row.grad, row.grad_dtype, offset, size, scratch[0]);
    if (unscale != 1) {
      for (int i = 0; i < size; ++i) scratch[0][i] = grad[i] * unscale;
      grad = scratch[0];
    }
    if (measuring) {
      const T* prev = has_prev ? load(row.prev_read, row.prev_dtype, offset, size, scratch[1]) : nullptr;
      if (prev && prev_unscale != 1) {
        for (int i = 0; i < size; ++i) scratch[1][i] = prev[i] * prev_unscale;
        prev = scratch[1];
      }
      const T* direction = nullptr;
      double tile_sums[kSums] = {};
      if (job.measure & kDirection) {
        direction = job.rule == kSgd ? (momentumless ? prev : states[0]) : nullptr;
        if (job.rule == kAdamW && row.counts[kUpdates] > 0) {
          const AdamWDirection<T> moved(hyper, row.counts[kUpdates]);
          const T* second = states[2] ? states[2] : states[1];
          for (int i = 0; i < size; ++i) scratch[2][i] = moved(states[0][i], second[i]);
          direction = scratch[2];
        }
      }
      measure(grad, direction, prev, size, tile_sums);
      // The direction already points uphill where the gradient is maximised; the previous gradient does not.
      if (!momentumless) tile_sums[kDotDirection] *= sign;
      for (int k = 0; k < kMoveSq; ++k) sums[k] += tile_sums[k];
    }
    if (applying) {
      T* param = load(row.param, row.param_dtype, offset, size, scratch[3]);
      if (job.measure & kMove) std::memcpy(scratch[2], param, size * sizeof(T));
      if (row.prev_write) {
        const bool same = row.prev_dtype == kFloat32 && sizeof(T) == 4;
        if (same)
          stream(static_cast<float*>(row.prev_write) + offset, reinterpret_cast<const float*>(grad), size);
        else
          store(row.prev_write, row.prev_dtype, offset, size, grad);
      }
      apply(rule, param, grad, scale, states, size);
      store(row.param, row.param_dtype, offset, size, param);
      for (int k = 0; k < kStates; ++k)
        if (states[k]) store(row.states[k], row.state_dtype, offset, size, states[k]);
      if (job.measure & kMove) {
        const T* moved = load(row.param, row.param_dtype, offset, size, param);
        measure_move(scratch[2], moved, size, sums);
      }
    }
  }
#if defined(__SSE2__)
  if (row.prev_write) _mm_sfence();  // the streamed stores are seen before the chunk counts as done
#endif
}

inline void run_row(const Job& job, const Row& row, int64_t begin, int64_t end, bool measuring, bool applying,
                    double* sums) {
  const bool wide = row.param_dtype == kFloat64;
  if (job.rule == kSgd) {
    if (wide)
      run_chunk<double, SgdStep<double>>(job, row, begin, end, measuring, applying, sums);
    else
      run_chunk<float, SgdStep<float>>(job, row, begin, end, measuring, applying, sums);
  } else {
    if (wide)
      run_chunk<double, AdamWStep<double>>(job, row, begin, end, measuring, applying, sums);
    else
      run_chunk<float, AdamWStep<float>>(job, row, begin, end, measuring, applying, sums);
  }
}
