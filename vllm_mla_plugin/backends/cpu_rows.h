// Packed rows of the cache, as vllm_mla_plugin/checkpoint/cache_formats.py lays them out.
//
// Compiled for one format by cpu_kernel.py, which defines ROW (bytes of a row) and PIECES (initialisers of Piece).

#pragma once

#include <algorithm>

#include "cpu_numbers.h"

namespace {

enum Scaling { SYMMETRIC, ASYMMETRIC, COMPACT };

struct Plane {
  int bits, shift, offset, stride;
};

struct Piece {
  int first, size, bits, group;
  Scaling scaling;
  int scales, zeros, planes;
  Plane plane[2];
};

constexpr Piece pieces[] = {PIECES};
constexpr int PIECE_COUNT = sizeof pieces / sizeof pieces[0];
constexpr int SPARE = 64;  // bytes beyond a row, and beyond codes, that vectors may touch
typedef uint16_t Words __attribute__((vector_size(64)));

constexpr int groups_of(const Piece& piece) { return (piece.size + piece.group - 1) / piece.group; }

// A float without a sign (e5m3, or e4m1 in the upper bits): to float32 by moving its bits.
inline float scale_of(uint32_t code, bool compact) {
  uint32_t word = compact ? (code << 22) + (118u << 23) : (code << 20) + (107u << 23);
  float scale;
  memcpy(&scale, &word, sizeof scale);
  return scale;
}

inline float zero_of(const Piece& piece, int code) {
  if (piece.scaling == SYMMETRIC) return ((1 << piece.bits) - 1) * 0.5f;
  if (piece.scaling == ASYMMETRIC) return code * ((1 << piece.bits) / 256.0f);
  return (code + 0.5f) * ((1 << piece.bits) / 8.0f);
}

// Scale and zero of a group.
inline void read_scale(const Piece& piece, const uint8_t* row, int group, float& scale, float& zero) {
  int code = row[piece.scales + group];
  scale = scale_of(piece.scaling == COMPACT ? code >> 3 : code, piece.scaling == COMPACT);
  zero = zero_of(piece, piece.scaling == COMPACT ? code & 7 : piece.scaling == ASYMMETRIC ? row[piece.zeros + group] : 0);
}

// The codes of a piece, a byte each; row and codes have SPARE bytes beyond their end.
template <int I>
const uint8_t* take_codes(const uint8_t* row, uint8_t* codes) {
  constexpr Piece piece = pieces[I];
  if (piece.bits == 8) return row + piece.plane[0].offset;
  for (int p = 0; p < piece.planes; p++) {
    const Plane plane = piece.plane[p];
    uint8_t upper[piece.size + 2 * SPARE];
    uint8_t* target = p ? upper : codes;
    const uint16_t mask = ((1 << plane.bits) - 1) * 0x0101;
    // What a vector writes beyond the plane's end, the next one overwrites.
    for (int shift = 0, first = 0; shift < 8; shift += plane.bits, first += plane.stride) {
      for (int i = 0; i < plane.stride && first + i < piece.size; i += SPARE) {
        Words words;
        memcpy(&words, row + plane.offset + i, sizeof words);
        words = (words >> shift) & mask;
        memcpy(target + first + i, &words, sizeof words);
      }
    }
    if (p) {
      for (int i = 0; i < piece.size; i += SPARE) {
        Words low, high;
        memcpy(&low, codes + i, sizeof low);
        memcpy(&high, upper + i, sizeof high);
        low |= high << plane.shift;
        memcpy(codes + i, &low, sizeof low);
      }
    }
  }
  return codes;
}

// The numbers of a piece and of those after it; `room` floats may be written to in all.
template <int I>
void widen_pieces(const uint8_t* row, float* out, int room) {
  if constexpr (I < PIECE_COUNT) {
    constexpr Piece piece = pieces[I];
    if constexpr (piece.bits == 16) {
      _Float16 halves[piece.size];
      memcpy(halves, row + piece.plane[0].offset, sizeof halves);
      for (int i = 0; i < piece.size; i++) out[piece.first + i] = float(halves[i]);
    } else {
      alignas(64) uint8_t buffer[piece.size + 2 * SPARE];
      const uint8_t* codes = take_codes<I>(row, buffer);
      for (int group = 0; group < groups_of(piece); group++) {
        float scale, zero;
        read_scale(piece, row, group, scale, zero);
        const float offset = zero * scale;
        int first = group * piece.group, last = std::min(first + piece.group, piece.size);
        for (int i = first; i < last; i += LANES) {
          Vec numbers = floats_of(codes + i) * scale - offset;
          // Beyond the group's end, vectors write what is overwritten by what comes next.
          int count = std::min(LANES, room - piece.first - i);
          memcpy(out + piece.first + i, &numbers, sizeof(float) * count);
        }
      }
    }
    widen_pieces<I + 1>(row, out, room);
  }
}

// The numbers of a row, without the mean; `room` floats may be written to.
inline void widen_row(const uint8_t* packed, float* out, int room) {
  alignas(64) uint8_t row[ROW + SPARE];
  memcpy(row, packed, ROW);
  memset(row + ROW, 0, SPARE);
  widen_pieces<0>(row, out, room);
}

// Where the mean of a layer's numbers is known from; see MeanTable in cpu_packed.py.
struct Means {
  static constexpr int STEP = 32;  // positions from one coarse turn to the next
  const float* first;              // [LATENT + ROPE], what the first token's mean is more than the others'
  const float* latent;             // [LATENT]
  const float* fine;               // [STEP, ROPE], the rotary key's mean turned by 0 ... STEP - 1 positions
  const float* coarse;             // [positions / STEP, ROPE], cosines and sines of STEP positions each

  explicit Means(const float* table)
      : first(table), latent(first + LATENT + ROPE), fine(latent + LATENT), coarse(fine + STEP * ROPE) {}

  // Add the rotary key's mean at a position, and all that the first token has more.
  void add_to(float* numbers, int64_t position) const {
    constexpr int HALF = ROPE / 2;
    const float* __restrict mean = fine + position % STEP * ROPE;
    const float* __restrict cosines = coarse + position / STEP * ROPE;
    const float* __restrict sines = cosines + HALF;
    float* __restrict rotary = numbers + LATENT;
    for (int i = 0; i < HALF; i++) rotary[i] += cosines[i] * mean[i] - sines[i] * mean[HALF + i];
    for (int i = 0; i < HALF; i++) rotary[HALF + i] += cosines[i] * mean[HALF + i] + sines[i] * mean[i];
    if (position == 0)
      for (int i = 0; i < LATENT + ROPE; i++) numbers[i] += first[i];
  }
};

}  // namespace
