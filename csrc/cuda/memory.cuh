// Between memory and registers: vectors of a tensor of any dtype, and what blocks write for each other.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../halves.h"
#include "../kernels.h"

#define LRK_DEVICE __device__ __forceinline__

namespace lrk::cuda {
namespace {

// Which dtypes the rows have: the fewer, the less a kernel has to ask.
enum Kind {
  kFloats,    // float32 alone
  kHalves,    // float32, bfloat16, float16, in any mixture
  kAnything,  // float64 somewhere
  kKinds
};

// How many neighbours make up 16 bytes of the narrowest tensor; where there is float64, of that.
LRK_RULE constexpr int width_of(Kind kind, bool wide) {
  return kind == kFloats ? 4 : (kind == kHalves ? 8 : (wide ? 2 : 1));
}

LRK_RULE int64_t size_of(Dtype dtype) {
  return dtype == kFloat64 ? 8 : (dtype == kFloat32 ? 4 : 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Between blocks

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

// ---------------------------------------------------------------------------------------------------------------------
// Words of one tensor

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

}  // namespace
}  // namespace lrk::cuda
