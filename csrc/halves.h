// bfloat16 and float16, to and from float32; to the nearest, ties to even, as torch rounds.
#pragma once

#include "rules.h"

namespace lrk {

LRK_RULE float from_bfloat16(uint16_t x) {
  return bits_to_float(uint32_t(x) << 16);
}

LRK_RULE uint16_t to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

LRK_RULE float from_float16(uint16_t x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  const uint32_t sign = uint32_t(x & 0x8000u) << 16;
  const uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  // Right for normal numbers; twice it less 2^-14 is right for subnormal ones, and the smaller of the two is right for
  // all. A subnormal float32 on the way would be zero under torch.set_flush_denormal(True).
  const float normal = bits_to_float((uint32_t(x & 0x7fffu) << 13) + 0x38000000u);
  const float subnormal = normal + (normal - 0x1p-14f);
  return bits_to_float(sign | special | float_to_bits(subnormal < normal ? subnormal : normal));
#endif
}

LRK_RULE uint16_t to_float16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return uint16_t(sign | half);
#endif
}

}  // namespace lrk
