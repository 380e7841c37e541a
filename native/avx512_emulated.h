/* The AVX-512 instructions that the kernels use, in plain C++: for testing those kernels on machines without them, with
 * sanitizers too (CMake option LNS_EMULATE_AVX512). Each function does lane by lane what the instruction set manual
 * says of its namesake. Nothing here is fast. */
#ifndef LNS_AVX512_EMULATED_H
#define LNS_AVX512_EMULATED_H

#include <cmath>
#include <cstdint>
#include <cstring>

/* Vectors wider than the machine's are passed between functions of this file only. */
#pragma GCC diagnostic ignored "-Wpsabi"

typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

namespace lns_emulated {

template <class T>
struct Lanes {
  static constexpr int count = static_cast<int>(64 / sizeof(T));
  T x[count];
  Lanes() = default;
  explicit Lanes(__m512i v) { std::memcpy(x, &v, 64); }
  operator __m512i() const {
    __m512i v;
    std::memcpy(&v, x, 64);
    return v;
  }
};

/* result[i] = f(a[i], b[i]) */
template <class T, class F>
__m512i each(__m512i a, __m512i b, F f) {
  const Lanes<T> x(a), y(b);
  Lanes<T> z;
  for (int i = 0; i < z.count; ++i) z.x[i] = static_cast<T>(f(x.x[i], y.x[i]));
  return z;
}

/* bit i: f(a[i], b[i]) */
template <class T, class F>
uint64_t bits(__m512i a, __m512i b, F f) {
  const Lanes<T> x(a), y(b);
  uint64_t z = 0;
  for (int i = 0; i < x.count; ++i) z |= static_cast<uint64_t>(f(x.x[i], y.x[i]) ? 1 : 0) << i;
  return z;
}

/* a where the bit is set, else b */
template <class T>
__m512i chosen(uint64_t mask, __m512i a, __m512i b) {
  const Lanes<T> x(a), y(b);
  Lanes<T> z;
  for (int i = 0; i < z.count; ++i) z.x[i] = mask >> i & 1 ? x.x[i] : y.x[i];
  return z;
}

template <class T>
__m512i all(T value) {
  Lanes<T> z;
  for (T& x : z.x) x = value;
  return z;
}

template <class T>
int saturated(int x) {
  const int most = sizeof(T) == 1 ? 127 : 32767;
  return x > most ? most : x < -most - 1 ? -most - 1 : x;
}

template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace lns_emulated

#define LNS_EMULATED_EACH(name, T, expression)                                 \
  inline __m512i name(__m512i v, __m512i w) {                                  \
    return lns_emulated::each<T>(v, w, [](T a, T b) { return (expression); }); \
  }
LNS_EMULATED_EACH(_mm512_adds_epi8, int8_t, lns_emulated::saturated<int8_t>(a + b))
LNS_EMULATED_EACH(_mm512_adds_epi16, int16_t, lns_emulated::saturated<int16_t>(a + b))
LNS_EMULATED_EACH(_mm512_add_epi16, uint16_t, a + b)
LNS_EMULATED_EACH(_mm512_sub_epi8, uint8_t, a - b)
LNS_EMULATED_EACH(_mm512_sub_epi16, uint16_t, a - b)
LNS_EMULATED_EACH(_mm512_max_epi8, int8_t, lns_emulated::larger(a, b))
LNS_EMULATED_EACH(_mm512_max_epi16, int16_t, lns_emulated::larger(a, b))
LNS_EMULATED_EACH(_mm512_min_epi8, int8_t, lns_emulated::smaller(a, b))
LNS_EMULATED_EACH(_mm512_min_epi16, int16_t, lns_emulated::smaller(a, b))
LNS_EMULATED_EACH(_mm512_min_epu8, uint8_t, lns_emulated::smaller(a, b))
LNS_EMULATED_EACH(_mm512_min_epu16, uint16_t, lns_emulated::smaller(a, b))
LNS_EMULATED_EACH(_mm512_xor_si512, uint64_t, a ^ b)
LNS_EMULATED_EACH(_mm512_and_si512, uint64_t, a& b)
#undef LNS_EMULATED_EACH

inline __m512i _mm512_set1_epi8(char x) { return lns_emulated::all<int8_t>(static_cast<int8_t>(x)); }
inline __m512i _mm512_set1_epi16(short x) { return lns_emulated::all<int16_t>(x); }
inline __m512i _mm512_set1_epi32(int x) { return lns_emulated::all<int32_t>(x); }
inline __m512i _mm512_loadu_si512(const void* from) {
  __m512i v;
  std::memcpy(&v, from, 64);
  return v;
}
inline __m512i _mm512_load_si512(const void* from) { return *static_cast<const __m512i*>(from); }
inline void _mm512_storeu_si512(void* to, __m512i v) { std::memcpy(to, &v, 64); }

inline __mmask64 _mm512_cmpgt_epi8_mask(__m512i v, __m512i w) {
  return lns_emulated::bits<int8_t>(v, w, [](int8_t a, int8_t b) { return a > b; });
}
inline __mmask32 _mm512_cmpgt_epi16_mask(__m512i v, __m512i w) {
  return static_cast<__mmask32>(lns_emulated::bits<int16_t>(v, w, [](int16_t a, int16_t b) { return a > b; }));
}
inline __mmask16 _mm512_test_epi32_mask(__m512i v, __m512i w) {
  return static_cast<__mmask16>(lns_emulated::bits<int32_t>(v, w, [](int32_t a, int32_t b) { return (a & b) != 0; }));
}
inline __mmask32 _mm512_mask_testn_epi16_mask(__mmask32 mask, __m512i v, __m512i w) {
  return mask &
         static_cast<__mmask32>(lns_emulated::bits<int16_t>(v, w, [](int16_t a, int16_t b) { return (a & b) == 0; }));
}
inline __mmask64 _mm512_mask_testn_epi8_mask(__mmask64 mask, __m512i v, __m512i w) {
  return mask & lns_emulated::bits<int8_t>(v, w, [](int8_t a, int8_t b) { return (a & b) == 0; });
}
inline __mmask64 _mm512_movepi8_mask(__m512i v) {
  return lns_emulated::bits<int8_t>(v, v, [](int8_t a, int8_t) { return a < 0; });
}
inline __mmask32 _mm512_movepi16_mask(__m512i v) {
  return static_cast<__mmask32>(lns_emulated::bits<int16_t>(v, v, [](int16_t a, int16_t) { return a < 0; }));
}

inline __m512i _mm512_mask_mov_epi8(__m512i source, __mmask64 mask, __m512i v) {
  return lns_emulated::chosen<int8_t>(mask, v, source);
}
inline __m512i _mm512_mask_mov_epi16(__m512i source, __mmask32 mask, __m512i v) {
  return lns_emulated::chosen<int16_t>(mask, v, source);
}
inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i v, __m512i w) {
  return lns_emulated::chosen<int16_t>(mask, w, v);
}
inline __m512i _mm512_mask_adds_epi8(__m512i source, __mmask64 mask, __m512i v, __m512i w) {
  return lns_emulated::chosen<int8_t>(mask, _mm512_adds_epi8(v, w), source);
}
inline __m512i _mm512_mask_adds_epi16(__m512i source, __mmask32 mask, __m512i v, __m512i w) {
  return lns_emulated::chosen<int16_t>(mask, _mm512_adds_epi16(v, w), source);
}
inline __m512i _mm512_mask_add_epi16(__m512i source, __mmask32 mask, __m512i v, __m512i w) {
  return lns_emulated::chosen<int16_t>(mask, _mm512_add_epi16(v, w), source);
}

inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i table) {
  const lns_emulated::Lanes<uint8_t> i(index), t(table);
  lns_emulated::Lanes<uint8_t> z;
  for (int k = 0; k < z.count; ++k) z.x[k] = t.x[i.x[k] & 63];
  return z;
}
inline __m512i _mm512_mask_permutexvar_epi8(__m512i source, __mmask64 mask, __m512i index, __m512i table) {
  return lns_emulated::chosen<int8_t>(mask, _mm512_permutexvar_epi8(index, table), source);
}
inline __m512i _mm512_permutex2var_epi16(__m512i low, __m512i index, __m512i high) {
  const lns_emulated::Lanes<uint16_t> a(low), i(index), b(high);
  lns_emulated::Lanes<uint16_t> z;
  for (int k = 0; k < z.count; ++k) z.x[k] = (i.x[k] & 32 ? b : a).x[i.x[k] & 31];
  return z;
}

inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
  const lns_emulated::Lanes<uint16_t> i(index), t(table);
  lns_emulated::Lanes<uint16_t> z;
  for (int k = 0; k < z.count; ++k) z.x[k] = t.x[i.x[k] & 31];
  return z;
}
inline __m512i _mm512_mask_permutexvar_epi16(__m512i source, __mmask32 mask, __m512i index, __m512i table) {
  return lns_emulated::chosen<int16_t>(mask, _mm512_permutexvar_epi16(index, table), source);
}

inline __m512i _mm512_srlv_epi16(__m512i v, __m512i by) {
  return lns_emulated::each<uint16_t>(v, by, [](uint16_t a, uint16_t b) { return b > 15 ? 0 : a >> b; });
}
inline __m512i _mm512_srli_epi32(__m512i v, unsigned shift) {
  return lns_emulated::each<uint32_t>(v, v, [=](uint32_t a, uint32_t) { return a >> shift; });
}

inline __m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  const lns_emulated::Lanes<int32_t> i(index);
  lns_emulated::Lanes<int32_t> z;
  for (int k = 0; k < z.count; ++k) {
    std::memcpy(&z.x[k], static_cast<const char*>(base) + static_cast<int64_t>(i.x[k]) * scale, 4);
  }
  return z;
}

constexpr int _MM_FROUND_TO_ZERO = 3, _MM_FROUND_NO_EXC = 8;
inline __m512 _mm512_roundscale_ps(__m512 v, int) {
  for (int i = 0; i < 16; ++i) v[i] = std::trunc(v[i]);
  return v;
}
inline __m512d _mm512_roundscale_pd(__m512d v, int) {
  for (int i = 0; i < 8; ++i) v[i] = std::trunc(v[i]);
  return v;
}

#endif
