// The mathematics, once for the CPU and the CUDA kernels: the update rules (per element) and the decisions (per step).
// lrkernels/rules.py says the same in Python, name by name. Every multiply-add that is meant to be fused is written
// fma(); the compilers are told to fuse no other, so the float32 update has the same bits on every backend, and the
// same bits as torch.optim's own loop, whose kernels fuse exactly these.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LRK_RULE __host__ __device__ __forceinline__
#else
#define LRK_RULE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define LRK_ROLLED _Pragma("unroll 1")  // a loop that one thread runs: its code is what it costs
#else
#define LRK_ROLLED
#endif

#if !defined(LRK_POWER)
#define LRK_POWER ::pow
#endif

namespace lrk {

// ---------------------------------------------------------------------------------------------------------------------
// The slots of the small float64 tensors. lrkernels/layout.py lists the same names in the same order.

enum Sum { kGradSq, kGradAbs, kDotDirection, kDirectionSq, kDotPrev, kPrevSq, kDiffSq, kMoveSq, kSums };

enum Stat {
  kStatStep,
  kStatLr,
  kStatGradNorm,
  kStatGradNormL1,
  kStatDirectionCosine,
  kStatAlignment,
  kStatCosine,
  kStatCurvature,
  kStatClip,
  kStatSkipped,
  kStats
};

// What a step leaves for the next one, then this step's statistics and sums, then the signal ring of volsched.
enum Control {
  kStep,         // completed updates: the schedule's position
  kSkipped,      // skipped steps
  kRows,         // rows written to the history
  kFactor,       // the closed loop's factor on the rate, as this step applies it
  kNextFactor,   // and as decided from everything measured so far
  kLogFactor,    // alignment: the running sum of the exponent
  kNumerator,    // gala: the sum of a_s
  kDenominator,  // gala: the sum of b_s
  kSmoothness,   // gala: the last L_s
  kLastGradSq,   // |g|^2 of the last completed step
  kLastMoveSq,   // |x_{t+1} - x_t|^2 of the last completed step
  kClip,         // this step's clip factor
  kLength,       // what this step's direction is divided by: its length, where it is normalised
  kSkip,         // this step changes nothing
  kFirstLr,      // gala, volsched: the first group's rate before the first step, lr_0
  kSignal,       // volsched: the value observed for this step; NaN when there is none
  kSignals,      // volsched: how many values the ring has taken
  kStatsAt,
  kSumsAt = kStatsAt + kStats,
  kRingAt = kSumsAt + kSums,
};

enum Setting {
  kClosedLoop,
  kMaxGradNorm,
  kSkipNonfinite,
  kMinLr,
  kMaxLr,
  kKappa,
  kBias,
  kLag,
  kFreezeAfter,
  kDelta,
  kWindow,
  kSensitivity,
  kWarmupSteps,
  kWarmupStart,
  kCapacity,
  kNormalize,
  kStochasticRounding,
  kSettings
};

enum ClosedLoop { kOpen, kAlignment, kGala, kVolSched };

// One row of hyper-parameters per group, but for its lr. The last five mean what the optimizer's rule says.
enum Hyper {
  kWeightDecay,
  kMaximize,
  kMomentum,
  kDampening,
  kNesterov,
  kDecoupled,
  kZeroInit,
  kBeta1 = kMomentum,
  kBeta2,
  kEps,
  kAmsgrad,
  kHypers = kZeroInit + 1
};

enum Rule { kSgd, kAdamW };

// One row of counts per parameter.
enum Count { kUpdates, kHasPrev, kCounts };

// ---------------------------------------------------------------------------------------------------------------------
// APPLY: one element of one parameter.

LRK_RULE float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
LRK_RULE double fma(double a, double b, double c) {
  return ::fma(a, b, c);
}
LRK_RULE float sqrt(float a) {
  return ::sqrtf(a);
}
LRK_RULE double sqrt(double a) {
  return ::sqrt(a);
}

// m <- momentum m + (1 - dampening) g;  p <- p - lr d,  d = m, or g + momentum m (Nesterov), or g (no momentum);
// normalised: p <- p - lr d / |d|.
template <class T>
struct SgdStep {
  T weight_decay, decay, momentum, undampened, minus_lr;
  bool coupled, has_momentum, nesterov;

  // The buffer starts at zero; torch starts it at the first gradient, undampened.
  LRK_RULE SgdStep(const double* hyper, double lr, double length, float updates)
      : weight_decay(T(hyper[kWeightDecay])),
        decay(T(hyper[kDecoupled] != 0 ? 1.0 - lr * hyper[kWeightDecay] : 1.0)),
        momentum(T(hyper[kMomentum])),
        undampened(updates == 0 && hyper[kZeroInit] == 0 ? T(1) : T(1.0 - hyper[kDampening])),
        minus_lr(T(-(lr / length))),
        coupled(hyper[kWeightDecay] != 0 && hyper[kDecoupled] == 0),
        has_momentum(hyper[kMomentum] != 0),
        nesterov(hyper[kNesterov] != 0) {}

  LRK_RULE void operator()(T& param, T grad, T& buffer) const {
    param = param * decay;
    grad = coupled ? fma(param, weight_decay, grad) : grad;
    const T mixed = fma(grad, undampened, buffer * momentum);
    buffer = has_momentum ? mixed : buffer;
    const T ahead = nesterov ? fma(mixed, momentum, grad) : mixed;
    param = fma(has_momentum ? ahead : grad, minus_lr, param);
  }
};

// m <- lerp(m, g, 1 - beta1);  v <- beta2 v + (1 - beta2) g^2;  p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps).
template <class T>
struct AdamWStep {
  T decay, weight1, beta2, weight2, unbias2_sqrt, eps, minus_step_size;
  bool near_start, amsgrad;

  // `updates` counts the updates before this one.
  LRK_RULE AdamWStep(const double* hyper, double lr, double length, float updates)
      : decay(T(1.0 - lr * hyper[kWeightDecay])),
        weight1(T(1.0 - hyper[kBeta1])),
        beta2(T(hyper[kBeta2])),
        weight2(T(1.0 - hyper[kBeta2])),
        unbias2_sqrt(T(1.0 / ::sqrt(1.0 - LRK_POWER(hyper[kBeta2], double(updates) + 1.0)))),
        eps(T(hyper[kEps])),
        minus_step_size(T(-(lr / length / (1.0 - LRK_POWER(hyper[kBeta1], double(updates) + 1.0))))),
        near_start(weight1 < T(0.5)),
        amsgrad(hyper[kAmsgrad] != 0) {
    if (!near_start) weight1 -= T(1);  // torch.lerp starts at the nearer end
  }

  LRK_RULE void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) const {
    const T old = exp_avg, largest_so_far = max_exp_avg_sq;  // values, not references: the loop comes out as vectors
    const T mean = fma(weight1, grad - old, near_start ? old : grad);
    const T mean_sq = fma(grad * weight2, grad, exp_avg_sq * beta2);
    const T largest = mean_sq > largest_so_far ? mean_sq : largest_so_far;
    const T denominator = sqrt(amsgrad ? largest : mean_sq) * unbias2_sqrt + eps;
    param = param * decay + (mean * minus_step_size) / denominator;
    exp_avg = mean;
    exp_avg_sq = mean_sq;
    if (amsgrad) max_exp_avg_sq = largest;
  }
};

// The direction of AdamW's last update, from the moments it left behind: m_hat / (sqrt(v_hat) + eps).
template <class T>
struct AdamWDirection {
  T unbias1, unbias2_sqrt, eps;  // factors: only a statistic depends on their last bit

  AdamWDirection() = default;
  LRK_RULE AdamWDirection(const double* hyper, float updates)
      : unbias1(T(1.0 / (1.0 - LRK_POWER(hyper[kBeta1], double(updates))))),
        unbias2_sqrt(T(1.0 / ::sqrt(1.0 - LRK_POWER(hyper[kBeta2], double(updates))))),
        eps(T(hyper[kEps])) {}

  LRK_RULE T operator()(T exp_avg, T second) const { return (exp_avg * unbias1) / (sqrt(second) * unbias2_sqrt + eps); }
};

// Rounding at random, up with the probability of the part that is cut off, so that small updates are not lost on the
// average. The bits are a hash of the step, the parameter and the element: the same on every backend, in every run.

LRK_RULE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LRK_RULE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A bijection of 32 bits in which every input bit moves every output bit (Wellons' lowbias32).
LRK_RULE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// One for each parameter and step; `row` counts the optimizer's parameters.
LRK_RULE uint32_t random_key(double step, uint32_t row) {
  return mix(mix(uint32_t(uint64_t(step))) + row);
}

LRK_RULE uint32_t random_bits(uint32_t key, uint64_t element) {
  return mix(mix(uint32_t(element)) ^ key ^ uint32_t(element >> 32));
}

LRK_RULE uint16_t to_bfloat16_at_random(float x, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return uint16_t(is_nan ? 0x7fc0u : (finite ? bits + (random & 0xffffu) : bits) >> 16);
}

LRK_RULE uint16_t to_float16_at_random(float x, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t normal = (magnitude - 0x38000000u + (random & 0x1fffu)) >> 13;
  const bool is_normal = magnitude >= 0x38800000u, is_large = magnitude >= 0x47800000u;
  const float steps = bits_to_float(is_normal ? 0u : magnitude) * 0x1p24f;  // below 2^-14 the values are 2^-24 apart
  const uint32_t whole = uint32_t(steps);
  const uint32_t subnormal = whole + ((steps - float(whole)) * 65536.0f > float(random & 0xffffu) ? 1u : 0u);
  return uint16_t(sign | (is_large ? special : (is_normal ? normal : subnormal)));
}

// ---------------------------------------------------------------------------------------------------------------------
// DECIDE: scalars, in float64.

LRK_RULE bool is_finite(double x) {
  return x - x == 0;
}
LRK_RULE double clamp(double x, double low, double high) {
  return x < low ? low : (x > high ? high : x);
}

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)).
LRK_RULE double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

// <a, b> / (|a| |b|); 0 where a norm is zero or anything is not finite.
LRK_RULE double cosine(double dot, double a_sq, double b_sq) {
  const double value = dot / (::sqrt(a_sq) * ::sqrt(b_sq));
  return is_finite(value) ? value : 0.0;
}

// The multiplier of an open-loop schedule, tabulated: its last value stays.
LRK_RULE double at(const double* table, int64_t size, double step) {
  return table[step < double(size - 1) ? int64_t(step) : size - 1];
}

// The rate of a group: its own lr times the closed loop's factor times the open-loop multiplier. alignment bounds the
// rate of each group; gala and volsched bound the first group's, in their factor, and the others keep their proportion.
LRK_RULE double rate(double lr, double multiplier, const double* control, const double* settings) {
  const double looped = lr * control[kFactor];
  if (settings[kClosedLoop] != kAlignment) return looped * multiplier;
  return clamp(looped, settings[kMinLr], settings[kMaxLr]) * multiplier;
}

// Ours: exponentiated gradient on the normalised alignment, log factor += kappa (c + bias).
LRK_RULE double alignment_factor(double* control, const double* settings, double direction_cosine) {
  if (control[kStep] > 0 && control[kStep] < settings[kFreezeAfter])
    control[kLogFactor] += settings[kKappa] * (direction_cosine + settings[kBias]);
  return ::exp(control[kLogFactor] < 80.0 ? control[kLogFactor] : 80.0);  // above that no float32 rate is finite
}

// Jiang, Kavis, Mokhtari 2025: lr = (delta lr_0 + sum a) / (delta + sum b), a = <g', g>, b = L |g|^2.
LRK_RULE double gala_factor(double* control, const double* settings, const double* sums, int rule) {
  const double delta = settings[kDelta], lr0 = control[kFirstLr];
  if (control[kStep] > 0) {
    const double smoothness = ::sqrt(sums[kDiffSq]) / ::sqrt(control[kLastMoveSq]);
    if (is_finite(smoothness)) control[kSmoothness] = smoothness;
    const bool normalized = settings[kNormalize] != 0, along_gradient = rule == kSgd && !normalized;
    const double unit = normalized ? ::sqrt(sums[kDirectionSq]) : 1.0;
    const double a = along_gradient ? sums[kDotPrev] : sums[kDotDirection] / unit;
    const double length_sq = along_gradient ? control[kLastGradSq] : sums[kDirectionSq] / (unit * unit);
    const double b = control[kSmoothness] * length_sq;
    if (is_finite(a) && is_finite(b)) {
      control[kNumerator] += a;
      control[kDenominator] += b;
    }
  }
  const double lr = (delta * lr0 + control[kNumerator]) / (delta + control[kDenominator]);
  const double factor = clamp(lr, settings[kMinLr], settings[kMaxLr]) / lr0;
  return is_finite(factor) ? factor : control[kNextFactor];
}

// |momentum m + (1 - dampening) g|, the length of SGD's next buffer, from the sums over both; 1 where it is 0 or not
// finite, so that nothing is divided by it. All groups have the same momentum and dampening.
LRK_RULE double direction_length(const double* sums, const double* hyper) {
  const double momentum = hyper[kMomentum], undampened = momentum != 0 ? 1.0 - hyper[kDampening] : 1.0;
  const double along = momentum != 0 ? sums[kDotDirection] : 0.0, buffer_sq = momentum != 0 ? sums[kDirectionSq] : 0.0;
  const double square =
      momentum * momentum * buffer_sq + 2.0 * momentum * undampened * along + undampened * undampened * sums[kGradSq];
  const double length = ::sqrt(square);
  return length > 0 && is_finite(length) ? length : 1.0;
}

// std(r_i, ddof = 1) of the last `count` log-returns r_i = ln(x_{i+1} / x_i) in the ring of signals.
LRK_RULE double volatility(const double* ring, int64_t capacity, int64_t signals, int64_t count) {
  double mean = 0, squares = 0;
  LRK_ROLLED
  for (int pass = 0; pass < 2; ++pass) {
    LRK_ROLLED
    for (int64_t i = signals - count; i < signals; ++i) {
      const double r = ::log(ring[i % capacity] / ring[(i - 1) % capacity]);
      if (pass == 0) mean += r / double(count);
      if (pass == 1) squares += (r - mean) * (r - mean);
    }
  }
  return ::sqrt(squares / double(count - 1));
}

// Ren 2025: M = 1 + sign(rho - 1) ln(1 + w |rho - 1|), rho = std(all) / std(last N).
LRK_RULE double volatility_multiplier(const double* control, const double* settings) {
  const int64_t capacity = int64_t(settings[kCapacity]), window = int64_t(settings[kWindow]);
  const int64_t signals = int64_t(control[kSignals]);
  const int64_t returns = (signals < capacity ? signals : capacity) - 1;
  if (returns < window) return 1.0;
  const double* ring = control + kRingAt;
  const double rho = volatility(ring, capacity, signals, returns) / volatility(ring, capacity, signals, window);
  const double away = rho - 1.0;
  const double multiplier = 1.0 + (away > 0 ? 1.0 : -1.0) * ::log(1.0 + settings[kSensitivity] * ::fabs(away));
  return is_finite(multiplier) ? multiplier : 1.0;
}

// Every N steps lr <- max(lr_min, lr M A), A = s(e) / s(e - N); linear warm-up first. `step` counts this update in.
LRK_RULE double volsched_factor(double* control, const double* settings, const double* decay, int64_t decay_size,
                                double step) {
  const double lr0 = control[kFirstLr];
  const double warmup = settings[kWarmupSteps], window = settings[kWindow];
  const double elapsed = step - warmup;
  if (elapsed < 0) {
    return settings[kWarmupStart] + (1.0 - settings[kWarmupStart]) * (warmup > 1 ? step / (warmup - 1.0) : 1.0);
  }
  if (elapsed == 0) return 1.0;
  if (::fmod(elapsed, window) != 0 || elapsed - window >= double(decay_size - 1)) return control[kNextFactor];
  const double before = at(decay, decay_size, elapsed - window);
  const double fall = before == 0 ? 0.0 : at(decay, decay_size, elapsed) / before;
  const double lr = lr0 * control[kNextFactor] * volatility_multiplier(control, settings) * fall;
  return lr0 != 0 ? clamp(lr, settings[kMinLr], settings[kMaxLr]) / lr0 : control[kNextFactor];
}

// The order of a step: begin; MEASURE and decide, when this step's update needs this step's sums; APPLY; decide, when
// it does not; finish.

LRK_RULE void begin(double* control, bool found_inf) {
  control[kFactor] = control[kNextFactor];
  control[kClip] = control[kLength] = 1.0;
  control[kSkip] = found_inf ? 1.0 : 0.0;
}

// What the sums say: the statistics, the clip, the length, whether to skip, the closed loop's next factor.
LRK_RULE void decide(double* control, const double* settings, const double* hyper, int rule, bool two_pass) {
  const double* sums = control + kSumsAt;
  double* stats = control + kStatsAt;
  const double norm = ::sqrt(sums[kGradSq]);
  stats[kStatGradNorm] = norm;
  stats[kStatGradNormL1] = sums[kGradAbs];
  stats[kStatDirectionCosine] = cosine(sums[kDotDirection], sums[kGradSq], sums[kDirectionSq]);
  stats[kStatAlignment] = sums[kDotPrev];
  stats[kStatCosine] = cosine(sums[kDotPrev], sums[kGradSq], sums[kPrevSq]);
  const double curvature = ::sqrt(sums[kDiffSq]) / ::sqrt(control[kLastMoveSq]);
  stats[kStatCurvature] = is_finite(curvature) ? curvature : 0.0;
  if (settings[kSkipNonfinite] != 0 && !is_finite(sums[kGradSq])) control[kSkip] = 1.0;
  if (control[kSkip] != 0) return;
  if (is_finite(settings[kMaxGradNorm])) control[kClip] = clip_factor(norm, settings[kMaxGradNorm]);
  if (settings[kNormalize] != 0) control[kLength] = direction_length(sums, hyper);
  if (!is_finite(sums[kGradSq])) return;
  if (settings[kClosedLoop] == kAlignment)
    control[kNextFactor] = alignment_factor(control, settings, stats[kStatDirectionCosine]);
  if (settings[kClosedLoop] == kGala) control[kNextFactor] = gala_factor(control, settings, sums, rule);
  if (two_pass && settings[kLag] == 0) control[kFactor] = control[kNextFactor];
}

// Advance the counters, take the observed signal, write the history's row. A skipped step only counts itself.
LRK_RULE void finish(double* control, const double* settings, const double* decay, int64_t decay_size, double* history,
                     int64_t history_size, double lr0, double multiplier) {
  const double* sums = control + kSumsAt;
  double* stats = control + kStatsAt;
  const double signal = control[kSignal];
  control[kSignal] = NAN;
  stats[kStatClip] = control[kClip];
  stats[kStatLr] = rate(lr0, multiplier, control, settings);
  if (control[kSkip] != 0) {
    stats[kStatSkipped] = control[kSkipped] += 1.0;
    return;
  }
  stats[kStatStep] = control[kStep] += 1.0;
  control[kLastGradSq] = sums[kGradSq];
  control[kLastMoveSq] = sums[kMoveSq];
  if (settings[kClosedLoop] == kVolSched) {
    if (is_finite(signal)) {
      control[kRingAt + int64_t(control[kSignals]) % int64_t(settings[kCapacity])] = signal > 1e-8 ? signal : 1e-8;
      control[kSignals] += 1.0;
    }
    control[kNextFactor] = volsched_factor(control, settings, decay, decay_size, control[kStep]);
  }
  double* row = history + (int64_t(control[kRows]) % history_size) * kStats;
  for (int i = 0; i < kStats; ++i) row[i] = stats[i];
  control[kRows] += 1.0;
}

}  // namespace lrk
