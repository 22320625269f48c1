// The loops over one tile, a piece of one parameter small enough to stay in the first-level cache: load, measure,
// apply, store. Included once per instruction set by kernels.cpp, inside a namespace of its own; so no include guard.
//
// Everything is computed in T: float for parameters of up to 32 bits, double for float64.

constexpr int kBlock = 16;
constexpr int kRun = 16 * kBlock;  // measured together, then updated together: long enough for memory to stream

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 4 ? kFloat32 : kFloat64;

// `size` elements in T: in place where they are T and whole blocks, otherwise a copy, padded with zeros to a whole
// block.
template <class T>
T* load(const void* memory, Dtype dtype, int64_t offset, int size, T* scratch, T pad = 0) {
  const auto convert = [&](const auto* source, auto to_float) {
    for (int i = 0; i < size; ++i) scratch[i] = T(to_float(source[offset + i]));
    for (int i = size; i % kBlock != 0; ++i) scratch[i] = pad;
    return scratch;
  };
  const auto same = [](auto x) { return x; };
  if (dtype == dtype_of<T> && size % kBlock == 0) return static_cast<T*>(const_cast<void*>(memory)) + offset;
  switch (dtype) {
    case kBFloat16:
      return convert(static_cast<const uint16_t*>(memory), [](uint16_t x) { return from_bfloat16(x); });
    case kFloat16:
      return convert(static_cast<const uint16_t*>(memory), [](uint16_t x) { return from_float16(x); });
    case kFloat32:
      return convert(static_cast<const float*>(memory), same);
    default:
      return convert(static_cast<const double*>(memory), same);
  }
}

// A parameter rounded at random instead; only those of 16 bits are.
template <class T>
void store_at_random(void* memory, Dtype dtype, int64_t offset, int size, const T* values, uint32_t key) {
  const auto convert = [&](auto round) {
    uint16_t* target = static_cast<uint16_t*>(memory) + offset;
    for (int i = 0; i < size; ++i) target[i] = round(float(values[i]), random_bits(key, uint64_t(offset + i)));
  };
  if (dtype == kBFloat16)
    convert([](float x, uint32_t random) { return to_bfloat16_at_random(x, random); });
  else
    convert([](float x, uint32_t random) { return to_float16_at_random(x, random); });
}

// What is already in its place needs no store.
template <class T>
void store(void* memory, Dtype dtype, int64_t offset, int size, const T* values) {
  const auto convert = [&](auto* target, auto from_float) {
    if (static_cast<const void*>(target + offset) == values) return;
    for (int i = 0; i < size; ++i) target[offset + i] = from_float(values[i]);
  };
  switch (dtype) {
    case kBFloat16:
      return convert(static_cast<uint16_t*>(memory), [](T x) { return to_bfloat16(float(x)); });
    case kFloat16:
      return convert(static_cast<uint16_t*>(memory), [](T x) { return to_float16(float(x)); });
    case kFloat32:
      return convert(static_cast<float*>(memory), [](T x) { return float(x); });
    default:
      return convert(static_cast<double*>(memory), [](T x) { return double(x); });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks: kBlock elements, a cache line of floats, are measured and updated together, in registers.

// Sums in float64, in lanes added up in one fixed order: the same bits on every processor.
constexpr int kLanes = 4;  // what a 32-byte register holds; a narrower machine takes two
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double)), aligned(8)));
typedef int64_t LaneMask __attribute__((vector_size(kLanes * sizeof(double)), aligned(8)));

inline Lanes lanes(const double* values) {
  return *reinterpret_cast<const Lanes*>(values);
}

inline Lanes lanes(const float* values) {
#if defined(LRK_AVX2)
  return reinterpret_cast<Lanes>(_mm256_cvtps_pd(_mm_loadu_ps(values)));
#else
  return Lanes{values[0], values[1], values[2], values[3]};
#endif
}

// a * b + c. The product of two floats is exact in double, so fusing changes no bit of it; that of two doubles is not.
template <class T>
inline Lanes add_product(Lanes a, Lanes b, Lanes c) {
#if defined(LRK_AVX2)
  if (sizeof(T) == sizeof(float))
    return reinterpret_cast<Lanes>(
        _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#endif
  return c + a * b;
}

inline Lanes absolute(Lanes x) {
  return reinterpret_cast<Lanes>(reinterpret_cast<LaneMask>(x) & INT64_MAX);
}

// f(flag), with the flag known to the compiler: a loop without its branch comes out as vectors.
template <class F>
inline void fix(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// What MEASURE adds up. Named sums rather than an array of them, so that the compiler keeps each in a register.
template <class T>
struct Sums {
  Lanes grad_sq{}, grad_abs{}, dot_direction{}, direction_sq{}, dot_prev{}, prev_sq{}, diff_sq{}, move_sq{};

  // kLanes elements. `has_direction` and `has_prev` are known to the compiler.
  template <class Direction, class Prev>
  LRK_RULE void add(const T* grad, Direction has_direction, const T* direction, Prev has_prev, const T* prev) {
    const Lanes g = lanes(grad);
    grad_sq = add_product<T>(g, g, grad_sq);
    grad_abs += absolute(g);
    if (has_direction) {
      const Lanes d = lanes(direction);
      dot_direction = add_product<T>(g, d, dot_direction);
      direction_sq = add_product<T>(d, d, direction_sq);
    }
    if (has_prev) {
      const Lanes q = lanes(prev), difference = g - q;
      dot_prev = add_product<T>(g, q, dot_prev);
      prev_sq = add_product<T>(q, q, prev_sq);
      diff_sq += difference * difference;
    }
  }

  LRK_RULE void add_move(const T* before, const T* after) {
    const Lanes moved = lanes(after) - lanes(before);
    move_sq += moved * moved;
  }

  LRK_RULE void add_to(double* sums, const Sums& other) const {
    const auto add_up = [](double& sum, Lanes a, Lanes b) {
      const Lanes both = a + b;
      sum += (both[0] + both[1]) + (both[2] + both[3]);
    };
    add_up(sums[kGradSq], grad_sq, other.grad_sq);
    add_up(sums[kGradAbs], grad_abs, other.grad_abs);
    add_up(sums[kDotDirection], dot_direction, other.dot_direction);
    add_up(sums[kDirectionSq], direction_sq, other.direction_sq);
    add_up(sums[kDotPrev], dot_prev, other.dot_prev);
    add_up(sums[kPrevSq], prev_sq, other.prev_sq);
    add_up(sums[kDiffSq], diff_sq, other.diff_sq);
    add_up(sums[kMoveSq], move_sq, other.move_sq);
  }
};

// A block, past the caches if it is not read again soon: the target is written without being read first.
template <class T>
inline void copy(T* target, const T* source, [[maybe_unused]] bool past_caches) {
#if defined(LRK_AVX2)
  if (past_caches && reinterpret_cast<uintptr_t>(target) % sizeof(__m256i) == 0) {
    for (size_t i = 0; i < kBlock * sizeof(T) / sizeof(__m256i); ++i)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i,
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source) + i));
    return;
  }
#endif
  std::memcpy(target, source, kBlock * sizeof(T));
}

// APPLY one block.
template <class T>
LRK_RULE void apply(const SgdStep<T>& rule, T* param, const T* grad, T scale, T* buffer, T*, T*) {
#pragma GCC ivdep
  for (int i = 0; i < kBlock; ++i) rule(param[i], grad[i] * scale, buffer[i]);
}

template <class T>
LRK_RULE void apply(const AdamWStep<T>& rule, T* param, const T* grad, T scale, T* exp_avg, T* exp_avg_sq,
                    T* max_exp_avg_sq) {
  fix(rule.amsgrad, [&](auto amsgrad) {
    AdamWStep<T> fixed = rule;
    fixed.amsgrad = amsgrad;
#pragma GCC ivdep
    for (int i = 0; i < kBlock; ++i) fixed(param[i], grad[i] * scale, exp_avg[i], exp_avg_sq[i], max_exp_avg_sq[i]);
  });
}

// One tile's tensors in T, a whole number of blocks each.
template <class T>
struct Tile {
  T* param;
  const T* grad;
  T* states[kStates];
  const T* direction;  // where it is there already
  AdamWDirection<T> moved;
  bool directed;     // whether it is measured
  const T* prev;     // null: not measured
  T* prev_write;     // null: nothing is kept, or not here
  bool past_caches;  // how it is kept
  int size;
};

// The direction of the last update at the elements from `at` on: what is there already, or AdamW's, made anew.
template <class T>
LRK_RULE const T* point(const SgdStep<T>&, const Tile<T>& tile, int at, int, T*) {
  return tile.direction + at;
}

template <class T>
LRK_RULE const T* point(const AdamWStep<T>& rule, const Tile<T>& tile, int at, int size, T* direction) {
  const AdamWDirection<T> moved = tile.moved;
  const T* second = tile.states[rule.amsgrad ? 2 : 1] + at;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) direction[i] = moved(tile.states[0][at + i], second[i]);
  return direction;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles and chunks

template <class T, class StepRule>
void run_tile(const Tile<T>& at, const StepRule& step, T scaled, bool measuring, bool applying, bool moving,
              double* sums) {
  fix(at.directed, [&](auto directed) {
    fix(at.prev != nullptr, [&](auto prev) {
      const Tile<T> tile = at;  // copies that nothing else can point to, so that they stay in registers
      const StepRule rule = step;
      const T scale = scaled;
      Sums<T> even, odd;  // side by side, so that no addition waits for the one before it
      for (int i = 0; i < tile.size; i += kRun) {
        const int end = i + kRun < tile.size ? i + kRun : tile.size;
        T made[kRun];
        const T* direction = measuring && directed ? point(rule, tile, i, end - i, made) : nullptr;
        if (measuring && applying)  // which does not read the parameters: they come meanwhile
          for (int j = i; j < end; j += kLine / int(sizeof(T))) __builtin_prefetch(tile.param + j, 1);
        for (int j = i; measuring && j < end; j += 2 * kLanes) {
          even.add(tile.grad + j, directed, direction + (j - i), prev, tile.prev + j);
          const int k = j + kLanes;
          odd.add(tile.grad + k, directed, direction + (k - i), prev, tile.prev + k);
        }
        if (!applying) continue;
        for (int j = i; j < end; j += kBlock) {
          if (tile.prev_write) copy(tile.prev_write + j, tile.grad + j, tile.past_caches);
          T before[kBlock];
          if (moving) std::memcpy(before, tile.param + j, sizeof before);
          apply(rule, tile.param + j, tile.grad + j, scale, tile.states[0] + j, tile.states[1] + j, tile.states[2] + j);
          for (int k = 0; moving && k < kBlock; k += 2 * kLanes) {
            even.add_move(before + k, tile.param + j + k);
            odd.add_move(before + k + kLanes, tile.param + j + k + kLanes);
          }
        }
      }
      if (measuring || moving) even.add_to(sums, odd);
    });
  });
}

// One chunk of one row: MEASURE and APPLY, either or both.
template <class T, class StepRule>
void run_chunk(const Job& job, const Row& row, int64_t begin, int64_t end, bool measuring, bool applying,
               double* sums) {
  alignas(64) T scratch[3 + kStates][kTile];
  alignas(64) static thread_local T unused[kTile];  // what a rule reads and writes where it has no state
  const double* hyper = job.hyper + row.group * kHypers;
  const double* control = job.control;
  const double multiplier = at(job.table, job.table_size, control[kStep]);
  const double lr = rate(job.lr[row.group], multiplier, control, job.settings);
  const StepRule rule(hyper, lr, control[kLength], row.counts[kUpdates]);
  AdamWDirection<T> moved{};
  if (job.rule == kAdamW && (job.measure & kDirection)) moved = AdamWDirection<T>(hyper, row.counts[kUpdates]);
  const double sign = hyper[kMaximize] != 0 ? -1.0 : 1.0;
  const T unscale = T(job.grad_scale ? 1.0 / double(*job.grad_scale) : 1.0);
  const T scale = T(sign * control[kClip]);
  const bool has_prev = measuring && row.prev_read && row.counts[kHasPrev] != 0;
  const bool momentumless = job.rule == kSgd && hyper[kMomentum] == 0;
  const bool directed = measuring && (job.measure & kDirection);
  const bool moving = job.measure & kMove;
  void* const updated = row.master ? row.master : row.param;  // what the update works on
  const Dtype updated_dtype = row.master ? kFloat32 : row.param_dtype;
  const bool native = updated_dtype == dtype_of<T>;
  const bool half = row.param_dtype == kBFloat16 || row.param_dtype == kFloat16;
  const bool at_random = half && !row.master && job.settings[kStochasticRounding] != 0;
  const uint32_t key = at_random ? random_key(control[kStep], uint32_t(row.index)) : 0;
  const bool past_caches = row.numel >= kTile;  // to wait for such stores takes longer than a small row
  double chunk_sums[kSums] = {};

  int size = 0;
  for (int64_t offset = begin; offset < end; offset += size) {
    const int rest = int(end - offset < kTile ? end - offset : kTile);
    size = rest >= kBlock ? rest / kBlock * kBlock : rest;
    Tile<T> tile{};
    tile.moved = moved;
    tile.past_caches = past_caches;
    tile.size = (size + kBlock - 1) / kBlock * kBlock;
    for (int k = 0; k < kStates; ++k) {
      const T pad = T(k != 0);  // second moments divide
      tile.states[k] = row.states[k] ? load(row.states[k], row.state_dtype, offset, size, scratch[3 + k], pad) : unused;
    }
    T* grad = load(row.grad, row.grad_dtype, offset, size, scratch[0]);
    if (unscale != 1) {
      for (int i = 0; i < tile.size; ++i) scratch[0][i] = grad[i] * unscale;
      grad = scratch[0];
    }
    tile.grad = grad;
    if (has_prev) tile.prev = load(row.prev_read, row.prev_dtype, offset, size, scratch[1]);
    tile.direction = momentumless ? tile.prev : tile.states[0];
    tile.directed = directed && (job.rule == kSgd ? tile.direction != nullptr : row.counts[kUpdates] > 0);
    if (!applying) {
      run_tile(tile, rule, scale, true, false, false, chunk_sums);
      continue;
    }
    tile.param = load(updated, updated_dtype, offset, size, scratch[2]);
    if (row.prev_write) {
      // Kept past the caches by the tile itself where it is of one dtype, and has been read by then.
      const bool direct = row.prev_dtype == dtype_of<T> && size % kBlock == 0;
      if (direct)
        tile.prev_write = static_cast<T*>(row.prev_write) + offset;
      else
        store(row.prev_write, row.prev_dtype, offset, size, tile.grad);
    }
    alignas(64) T before[kTile];
    const bool rounded = moving && !native;  // the real move is between what was and what will be in memory
    if (rounded) std::memcpy(before, tile.param, tile.size * sizeof(T));
    run_tile(tile, rule, scale, measuring, true, moving && native, chunk_sums);
    if (at_random)
      store_at_random(row.param, row.param_dtype, offset, size, tile.param, key);
    else
      store(row.param, row.param_dtype, offset, size, tile.param);
    if (row.master) store(row.master, kFloat32, offset, size, tile.param);
    for (int k = 0; k < kStates; ++k)
      if (row.states[k]) store(row.states[k], row.state_dtype, offset, size, tile.states[k]);
    if (rounded) {
      const T* after = load(updated, updated_dtype, offset, size, scratch[2]);
      Sums<T> moves;
      for (int i = 0; i < tile.size; i += kLanes) moves.add_move(before + i, after + i);
      moves.add_to(chunk_sums, {});
    }
  }
  for (int k = 0; k < kSums; ++k) sums[k] = chunk_sums[k];
  // The direction already points uphill where the gradient is maximised; a previous gradient does not.
  if (!momentumless) sums[kDotDirection] *= sign;
#if defined(__SSE2__)
  if (row.prev_write && past_caches) _mm_sfence();  // the streamed stores are seen before the chunk counts as done
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
