// Vectors of floats, and the dtypes of a model: what all CPU kernels share.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct Bfloat16 {
  uint16_t bits;
};

namespace {

constexpr int LANES = 16;  // floats of a vector; compilers split it where registers are shorter
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

// 16 bytes, each in a lane.
inline IntVec lanes_of(const uint8_t* in) {
#ifdef __AVX512F__  // one instruction, which compilers do not find
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#else
  ByteVec bytes;
  memcpy(&bytes, in, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfVec), IntVec);
#endif
}

inline Vec floats_of(IntVec numbers) { return __builtin_convertvector(numbers, Vec); }

// A sum, and 16 products added to it.
inline Vec dot(Vec sum, Vec a, Vec b) { return sum + a * b; }

#ifdef __AVX512BF16__
// A sum, and the products of 16 pairs of bfloat16 added to it.
inline Vec dot(Vec sum, __m512i a, __m512i b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// All lanes of a vector made one, in steps that halve them: fewer wait for each other than lane after lane.
template <typename Join>
inline float joined(const Vec& vec, Join join) {
  float parts[LANES];
  memcpy(parts, &vec, sizeof vec);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = join(parts[i], parts[i + half]);
  return parts[0];
}

inline void widen(const float* in, float* out, int count) { memcpy(out, in, sizeof(float) * count); }

inline void widen(const Bfloat16* in, float* out, int count) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    HalfVec bits;
    memcpy(&bits, in + i, sizeof bits);
    WordVec word = __builtin_convertvector(bits, WordVec) << 16;
    memcpy(out + i, &word, sizeof word);
  }
  for (; i < count; i++) {
    uint32_t word = uint32_t(in[i].bits) << 16;
    memcpy(out + i, &word, sizeof word);
  }
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, Bfloat16* out) {  // to nearest, ties to even
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  out->bits = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

#ifdef __FLT16_MAX__
typedef _Float16 Half;

inline void widen(const _Float16* in, float* out, int count) {
  for (int i = 0; i < count; i++) out[i] = float(in[i]);
}

inline void narrow(float value, _Float16* out) { *out = _Float16(value); }
#else
struct Half;  // this compiler has none: a format or model that needs it is left to torch
#endif

}  // namespace
