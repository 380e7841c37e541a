/* What CUDA is to a kernel's text, for a C++17 compiler: a thread for every CUDA thread, a barrier for
 * __syncthreads, and shared memory at an address that is aligned to 16 bytes and to nothing more, which is all that CUDA
 * promises. Shared memory and its end are the heap's, so that sanitizers see what a kernel does with it; it is filled
 * with rubbish before each block. */
#ifndef LNS_CUDA_HOST_SHIM_H
#define LNS_CUDA_HOST_SHIM_H

#include <limits.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LNS_SHARED(name) char* const name = lns_host::shared

struct Dimensions {
  unsigned x, y, z;
};
inline thread_local Dimensions threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
inline Dimensions blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace lns_host {

inline char* shared = nullptr;
inline pthread_barrier_t barrier;
inline size_t shared_bytes = 0;
inline void (*kernel)(const void*) = nullptr;
inline const void* parameters = nullptr;
inline unsigned workers = 1;

inline uint64_t blocks() { return uint64_t{gridDim.x} * gridDim.y * gridDim.z; }
inline void place(uint64_t block) {
  blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
              static_cast<unsigned>(block / gridDim.x / gridDim.y)};
}

inline void* thread_of_blocks(void* number) {
  const auto thread = static_cast<unsigned>(reinterpret_cast<uintptr_t>(number));
  for (uint64_t block = 0; block < blocks(); ++block) {
    threadIdx = {thread, 0, 0};
    place(block);
    if (thread == 0) memset(shared, 0xA5, shared_bytes);
    pthread_barrier_wait(&barrier);
    kernel(parameters);
    pthread_barrier_wait(&barrier);
  }
  return nullptr;
}

inline void* worker_of_blocks(void* number) {
  const auto worker = static_cast<unsigned>(reinterpret_cast<uintptr_t>(number));
  for (uint64_t block = worker; block < blocks(); block += workers) {
    place(block);
    for (unsigned t = 0; t < blockDim.x; ++t) {
      threadIdx = {t, 0, 0};
      kernel(parameters);
    }
  }
  return nullptr;
}

inline void in_threads(void* (*body)(void*), unsigned count) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, size_t{1} << 20);
  auto* threads = static_cast<pthread_t*>(malloc(count * sizeof(pthread_t)));
  for (unsigned t = 0; t < count; ++t) {
    if (pthread_create(threads + t, &attributes, body, reinterpret_cast<void*>(uintptr_t{t})) != 0) abort();
  }
  for (unsigned t = 0; t < count; ++t) pthread_join(threads[t], nullptr);
  free(threads);
  pthread_attr_destroy(&attributes);
}

inline void prepare(void (*what)(const void*), const unsigned* grid, unsigned threads, const void* p) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  kernel = what;
  parameters = p;
}

/* A block at a time; its threads all at once. */
inline void run(void (*what)(const void*), const unsigned* grid, unsigned threads, size_t bytes, const void* p) {
  constexpr size_t kOff = 16;
  prepare(what, grid, threads, p);
  /* the end of what was asked for is the end of the allocation; malloc aligns to 16 */
  auto* memory = static_cast<char*>(malloc(bytes + 2 * kOff));
  size_t off = kOff;
  if (reinterpret_cast<uintptr_t>(memory + off) % (2 * kOff) == 0) off = 0;
  memory = static_cast<char*>(realloc(memory, bytes + off));
  shared = memory + off;
  shared_bytes = bytes;
  pthread_barrier_init(&barrier, nullptr, threads);
  in_threads(thread_of_blocks, threads);
  pthread_barrier_destroy(&barrier);
  free(memory);
}

/* Kernels whose threads know nothing of each other: blocks are shared out to a few threads. */
inline void run_apart(void (*what)(const void*), const unsigned* grid, unsigned threads, const void* p) {
  prepare(what, grid, threads, p);
  workers = blocks() < 2 ? 1 : 2;
  if (workers == 1) {
    worker_of_blocks(nullptr);
  } else {
    in_threads(worker_of_blocks, workers);
  }
}

}  // namespace lns_host

inline void __syncthreads() { pthread_barrier_wait(&lns_host::barrier); }

template <class T>
T atomicAdd(T* where, T value) {
  return __atomic_fetch_add(where, value, __ATOMIC_RELAXED);
}

inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fmul_rn(float a, float b) { return a * b; }
/* To zero; beyond the range to its end, NaN to 0, as the instruction does. */
inline int __float2int_rz(float x) {
  if (!(x == x)) return 0;
  if (x >= 2147483648.0f) return INT_MAX;
  if (x < -2147483648.0f) return INT_MIN;
  return static_cast<int>(x);
}
inline int __viaddmin_s32(int a, int b, int c) { return a + b < c ? a + b : c; }
inline int __viaddmax_s32(int a, int b, int c) { return a + b > c ? a + b : c; }

#endif
