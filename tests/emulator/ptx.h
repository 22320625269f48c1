// What the instructions of PTX do, as far as ptx.py translates them into a kernel for the emulated GPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <limits>

#include "halves.h"

#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wunused-label"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {
using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
template <class T, int N>
struct alignas(N * sizeof(T)) vector_of {
  T at[N];
};
template <class To, class From>
inline To as(From x) {
  return __builtin_bit_cast(To, x);
}
template <class T>
inline T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}
template <class T>
inline T shifted_left(T x, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(x << n);
}
template <class T>
inline T shifted_right(T x, u32 n) {
  if (n >= 8 * sizeof(T)) return x < T(0) ? T(-1) : T(0);
  return T(x >> n);
}
template <class T>
inline T remainder_of(T a, T b) {
  return b == 0 ? T(-1) : T(a % b);
}
template <class T>
inline T least(T a, T b) {  // a number, if one of them is
  return a < b || b != b ? a : b;
}
template <class T>
inline T most(T a, T b) {
  return a > b || b != b ? a : b;
}
inline f32 most_or_nan(f32 a, f32 b) {
  return a != a || b != b ? as<f32>(u32(0x7fffffff)) : most(a, b);
}
inline f32 least_or_nan(f32 a, f32 b) {
  return a != a || b != b ? as<f32>(u32(0x7fffffff)) : least(a, b);
}
template <class To, class From>
inline To truncated(From x) {
  if (x != x) return sizeof(From) == 4 ? To(0) : To(u64(1) << (8 * sizeof(To) - 1));
  const From low = From(std::numeric_limits<To>::min()), high = From(std::numeric_limits<To>::max());
  return x <= low ? std::numeric_limits<To>::min() : x >= high ? std::numeric_limits<To>::max() : To(x);
}
inline b16 bf16_of(f32 x) {  // the device's NaN is another
  return x != x ? b16(0x7fff) : lrk::to_bfloat16(x);
}
inline b16 f16_of(f32 x) {
  return x != x ? b16(0x7fff) : lrk::to_float16(x);
}
inline f64 reciprocal(f64 x) {  // 20 bits of it
  return as<f64>(as<u64>(flushed(1.0 / as<f64>(as<u64>(flushed(x)) >> 32 << 32))) >> 32 << 32);
}
inline u32 permuted(u32 a, u32 b, u32 select) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 byte = u32(bytes >> 8 * (select >> 4 * i & 7)) & 0xff;
    result |= (select >> 4 * i & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}
inline u32 added_by_halves(u32 a, u32 b) {
  return ((a >> 16) + (b >> 16)) << 16 | ((a + b) & 0xffff);
}
// Triton has all threads that hold an element write it to shared memory: with the same value, that is no race.
template <class T>
LRK_UNSEEN inline void write_shared(T* there, T x) {
  if (reinterpret_cast<uintptr_t>(there) % alignof(T)) emulator::fail("a misaligned store to shared memory");
  emulator::write_alike(there, &x, sizeof x);
}

// ldmatrix: rows of eight 16-bit numbers, of which a lane gives one's place and gets two numbers of each matrix.
template <int N>
inline vector_of<b32, N> matrices(const unsigned char* memory, u32 row, LRK_LINE) {
  const int lane = int(threadIdx.x % 32);
  vector_of<b32, N> result;
  for (int i = 0; i < N; ++i) {
    const u32 start = __shfl_sync(0xffffffffu, row, 8 * i + lane / 4, 32, line);
    result.at[i] = *reinterpret_cast<const b32*>(memory + start + lane % 4 * 4);
  }
  return result;
}

}  // namespace
