// CUDA for g++, as far as csrc/cuda goes: the words of the language here, what they do in emulator.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
// Blocks take turns on one thread of the system, and each finds its own copy: see Block::shared in emulator.cpp.
#define __shared__ static thread_local

// ---------------------------------------------------------------------------------------------------------------------
// Types. The vectors are as aligned as on the device: the compiler checks each access (-fsanitize=alignment).

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define LRK_VECTORS(T, name)                                   \
  struct alignas(2 * sizeof(T)) name##2 {                      \
    T x, y;                                                    \
  };                                                           \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { \
    T x, y, z, w;                                              \
  };                                                           \
  inline name##2 make_##name##2(T x, T y) {                    \
    return {x, y};                                             \
  }                                                            \
  inline name##4 make_##name##4(T x, T y, T z, T w) {          \
    return {x, y, z, w};                                       \
  }
LRK_VECTORS(float, float)
LRK_VECTORS(double, double)
LRK_VECTORS(int, int)
LRK_VECTORS(unsigned, uint)
LRK_VECTORS(short, short)
LRK_VECTORS(unsigned short, ushort)
LRK_VECTORS(long long, longlong)
LRK_VECTORS(unsigned long long, ulonglong)
#undef LRK_VECTORS

// One dimension is enough for the kernels: y and z are 1 in every launch. Constant to all but the scheduler.
#if !defined(LRK_SCHEDULER)
#define LRK_SCHEDULER const
#endif
extern LRK_SCHEDULER uint3 threadIdx, blockIdx;
extern LRK_SCHEDULER dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------------------------
// What threads do to each other

namespace emulator {

enum Operation { kLoad, kStore, kAdd, kExchange, kCompareAndSwap, kMin, kMax, kAnd, kOr };

int barrier(bool predicate, int line);                                          // how many threads said true
const uint64_t* exchange(uint32_t mask, uint64_t value, bool fence, int line);  // the lanes' values, by lane
uint64_t atomic(Operation, void* address, int size, bool is_signed, uint64_t value, uint64_t compare = 0);
void fence();
void sleep();
void read_only(const void* address, size_t size);
void write_alike(void* address, const void* value, size_t size);
[[noreturn]] void fail(const char* what);
int lane();

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
__forceinline__ T atomic(Operation operation, T* address, T value, T compare = T()) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics are on 32 or 64 bit integers");
  auto* memory = const_cast<std::remove_volatile_t<T>*>(address);
  return T(atomic(operation, memory, sizeof(T), std::is_signed_v<T>, uint64_t(value), uint64_t(compare)));
}

template <class T>
__forceinline__ T shuffle(uint32_t mask, T value, int source, bool inside, int line) {
  const uint64_t* values = exchange(mask, to_bits(value), false, line);
  if (!inside) return value;  // past the end of its part of the warp, a lane keeps its own
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask leaves out");
  return from_bits<T>(values[source]);
}

}  // namespace emulator

#define LRK_LINE int line = __builtin_LINE()

__forceinline__ void __syncthreads(LRK_LINE) {
  emulator::barrier(false, line);
}
__forceinline__ int __syncthreads_count(int predicate, LRK_LINE) {
  return emulator::barrier(predicate != 0, line);
}
__forceinline__ int __syncthreads_or(int predicate, LRK_LINE) {
  return emulator::barrier(predicate != 0, line) != 0;
}
__forceinline__ int __syncthreads_and(int predicate, LRK_LINE) {
  return emulator::barrier(predicate != 0, line) == int(blockDim.x);
}

__forceinline__ void __syncwarp(uint32_t mask = 0xffffffffu, LRK_LINE) {
  emulator::exchange(mask, 0, true, line);
}
template <class T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize, LRK_LINE) {
  return emulator::shuffle(mask, value, (emulator::lane() & -width) + (source & (width - 1)), true, line);
}
template <class T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize, LRK_LINE) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, lane ^ bits, ((lane ^ bits) & -width) <= (lane & -width), line);
}
template <class T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = warpSize, LRK_LINE) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, lane + int(delta), (lane & (width - 1)) + int(delta) < width, line);
}
template <class T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = warpSize, LRK_LINE) {
  const int lane = emulator::lane();
  return emulator::shuffle(mask, value, lane - int(delta), (lane & (width - 1)) >= int(delta), line);
}
__forceinline__ uint32_t __ballot_sync(uint32_t mask, int predicate, LRK_LINE) {
  const uint64_t* values = emulator::exchange(mask, predicate != 0, false, line);
  uint32_t votes = 0;
  for (int i = 0; i < warpSize; ++i) votes |= (mask >> i & 1 && values[i]) ? 1u << i : 0;
  return votes;
}
__forceinline__ int __any_sync(uint32_t mask, int predicate, LRK_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
__forceinline__ int __all_sync(uint32_t mask, int predicate, LRK_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}

__forceinline__ void __threadfence() {
  emulator::fence();
}
__forceinline__ void __threadfence_system() {
  emulator::fence();
}
__forceinline__ void __threadfence_block() {}  // orders nothing between blocks: no fence to the race detector
__forceinline__ void __nanosleep(unsigned) {
  emulator::sleep();
}

// The type of the memory decides, as it does among CUDA's overloads.
template <class T>
using Same = std::common_type_t<T>;
template <class T>
__forceinline__ T atomicAdd(T* address, Same<T> value) {
  return emulator::atomic(emulator::kAdd, address, value);
}
template <class T>
__forceinline__ T atomicSub(T* address, Same<T> value) {
  return emulator::atomic(emulator::kAdd, address, T(T(0) - value));
}
template <class T>
__forceinline__ T atomicExch(T* address, Same<T> value) {
  return emulator::atomic(emulator::kExchange, address, value);
}
template <class T>
__forceinline__ T atomicCAS(T* address, Same<T> compare, Same<T> value) {
  return emulator::atomic(emulator::kCompareAndSwap, address, value, compare);
}
template <class T>
__forceinline__ T atomicMin(T* address, Same<T> value) {
  return emulator::atomic(emulator::kMin, address, value);
}
template <class T>
__forceinline__ T atomicMax(T* address, Same<T> value) {
  return emulator::atomic(emulator::kMax, address, value);
}
template <class T>
__forceinline__ T atomicAnd(T* address, Same<T> value) {
  return emulator::atomic(emulator::kAnd, address, value);
}
template <class T>
__forceinline__ T atomicOr(T* address, Same<T> value) {
  return emulator::atomic(emulator::kOr, address, value);
}

// Loads and stores with a hint to the caches are plain ones; what __ldg reads, nobody may write in the same launch.
#define LRK_LOAD(name)                       \
  template <class T>                         \
  __forceinline__ T name(const T* address) { \
    return *address;                         \
  }
#define LRK_STORE(name)                                  \
  template <class T>                                     \
  __forceinline__ void name(T* address, Same<T> value) { \
    *address = value;                                    \
  }
LRK_LOAD(__ldca)
LRK_LOAD(__ldcg)
LRK_LOAD(__ldcs)
LRK_LOAD(__ldlu)
LRK_LOAD(__ldcv)
LRK_STORE(__stwb)
LRK_STORE(__stcg)
LRK_STORE(__stcs)
LRK_STORE(__stwt)
#undef LRK_LOAD
#undef LRK_STORE
template <class T>
__forceinline__ T __ldg(const T* address) {
  emulator::read_only(address, sizeof(T));
  return *address;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bits and rounding

template <class To, class From>
__forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
__forceinline__ unsigned __float_as_uint(float x) {
  return bit_cast<unsigned>(x);
}
__forceinline__ int __float_as_int(float x) {
  return bit_cast<int>(x);
}
__forceinline__ float __uint_as_float(unsigned x) {
  return bit_cast<float>(x);
}
__forceinline__ float __int_as_float(int x) {
  return bit_cast<float>(x);
}
__forceinline__ long long __double_as_longlong(double x) {
  return bit_cast<long long>(x);
}
__forceinline__ double __longlong_as_double(long long x) {
  return bit_cast<double>(x);
}
__forceinline__ int __popc(unsigned x) {
  return __builtin_popcount(x);
}
__forceinline__ int __clz(int x) {
  return x ? __builtin_clz(unsigned(x)) : 32;
}
__forceinline__ int __ffs(int x) {
  return __builtin_ffs(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// The runtime: the host's memory is the device's, and a launch has ended when it returns.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** memory, size_t size);
cudaError_t cudaMallocAsync(void** memory, size_t size, cudaStream_t stream);
cudaError_t cudaFree(void* memory);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

namespace emulator {
cudaError_t launch(dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(void*), void* context);
}  // namespace emulator

template <class T>
cudaError_t cudaMalloc(T** memory, size_t size) {
  return cudaMalloc(reinterpret_cast<void**>(memory), size);
}
template <class T>
cudaError_t cudaMallocAsync(T** memory, size_t size, cudaStream_t stream) {
  return cudaMallocAsync(reinterpret_cast<void**>(memory), size, stream);
}

#define LRK_UNSEEN __attribute__((no_sanitize("thread")))  // the arguments are copied before the kernel begins

// A kernel is launched by its typed pointer, so that its arguments can be copied for every thread, as on the device.
template <class... P, size_t... I>
cudaError_t launch_with(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t dynamic_shared,
                        std::index_sequence<I...>) {
  static_assert((sizeof(P) + ... + 0) <= 32764, "a kernel takes 32764 bytes of arguments at most");
  auto body = [=]() LRK_UNSEEN { kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...); };
  return emulator::launch(grid, block, dynamic_shared, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t dynamic_shared = 0,
                             cudaStream_t = nullptr) {
  return launch_with(kernel, grid, block, arguments, dynamic_shared, std::index_sequence_for<P...>());
}
template <class... P>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, void (*kernel)(P...), void** arguments) {
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... values) {
  return [&](P... copies) {
    void* arguments[] = {const_cast<void*>(static_cast<const void*>(&copies))...};
    return cudaLaunchKernelExC(config, kernel, arguments);
  }(std::forward<A>(values)...);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
