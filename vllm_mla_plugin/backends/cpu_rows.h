// Packed rows of the cache, as vllm_mla_plugin/checkpoint/cache_formats.py lays them out.
//
// Compiled for one format by cpu_kernel.py, which defines ROW (bytes of a row) and PIECES (initialisers of Piece).

#pragma once

#include <algorithm>
#include <utility>

#include "cpu_numbers.h"

namespace {

enum Scaling { SYMMETRIC, ASYMMETRIC, COMPACT };

struct Plane {
  int bits, shift, offset, stride;
};

struct Piece {
  int first, size, bits, group;
  Scaling scaling;
  int scales, zeros;
  int tried, step;  // scales below the one that reaches all of a group: up to `tried`, every `step`
  int planes;
  Plane plane[2];
};

constexpr Piece pieces[] = {PIECES};
constexpr int PIECE_COUNT = sizeof pieces / sizeof pieces[0];
constexpr int MARGIN = LANES;

// A copy of a row that vectors may read beyond.
struct alignas(64) Row {
  uint8_t before[64];
  uint8_t bytes[ROW];
  uint8_t after[MARGIN];
};

constexpr int groups_of(const Piece& piece) { return (piece.size + piece.group - 1) / piece.group; }
constexpr int vectors_of_group(const Piece& piece) { return (std::min(piece.group, piece.size) + LANES - 1) / LANES; }

// Floats without a sign (e5m3, or e4m1 where compact): to float32 by moving their bits.
inline Vec scales_of(const Piece& piece, IntVec codes) {
  IntVec words = piece.scaling == COMPACT ? (codes << 22) + (118 << 23) : (codes << 20) + (107 << 23);
  Vec scales;
  memcpy(&scales, &words, sizeof scales);
  return scales;
}

inline Vec zeros_of(const Piece& piece, IntVec codes) {
  if (piece.scaling == SYMMETRIC) return Vec{} + ((1 << piece.bits) - 1) * 0.5f;
  if (piece.scaling == ASYMMETRIC) return floats_of(codes) * ((1 << piece.bits) / 256.0f);
  return (floats_of(codes) + 0.5f) * ((1 << piece.bits) / 8.0f);
}

// Of all groups of a piece: the scale, and the scale times the zero.
inline void read_scales(const Piece& piece, const uint8_t* row, Vec* scales, Vec* offsets) {
  for (int i = 0; i < groups_of(piece); i += LANES) {
    IntVec codes = lanes_of(row + piece.scales + i), zeros = codes & 7;
    if (piece.scaling == COMPACT) codes >>= 3;
    if (piece.scaling == ASYMMETRIC) zeros = lanes_of(row + piece.zeros + i);
    scales[i / LANES] = scales_of(piece, codes);
    offsets[i / LANES] = scales[i / LANES] * zeros_of(piece, zeros);
  }
}

// A vector, or as much of it as there is room for.
inline void store(const Vec& numbers, float* out, int room) {
  if (room >= LANES) memcpy(out, &numbers, sizeof numbers);
  else memcpy(out, &numbers, sizeof(float) * room);
}

// What a plane knows of the codes of 16 numbers of a piece, from the N-th on.
template <int I, int P, int N>
inline IntVec bits_of(const uint8_t* row) {
  constexpr Plane plane = pieces[I].plane[P];
  constexpr int last = std::min((N + LANES - 1) / plane.stride, 8 / plane.bits - 1);
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IntVec found = {};
  // Most vectors lie in one slice of the plane: numbers that are shifted alike.
  for (int slice = N / plane.stride; slice <= last; slice++) {
    IntVec own = lanes_of(row + plane.offset + N - slice * plane.stride) >> (slice * plane.bits);
    found = slice == N / plane.stride ? own : lane < slice * plane.stride - N ? found : own;
  }
  return (found & ((1 << plane.bits) - 1)) << plane.shift;
}

// The V-th vector of a piece; each group begins a new one.
template <int I, int V>
inline void widen_vector(const uint8_t* row, const Vec* scales, const Vec* offsets, float* out, int room) {
  constexpr Piece piece = pieces[I];
  constexpr int each = vectors_of_group(piece), group = V / each, first = group * piece.group + V % each * LANES;
  if constexpr (first < piece.size) {
    IntVec codes = bits_of<I, 0, first>(row);
    if constexpr (piece.planes == 2) codes |= bits_of<I, 1, first>(row);
    const float scale = scales[group / LANES][group % LANES], offset = offsets[group / LANES][group % LANES];
    // Beyond the group's end, vectors write what is overwritten by what comes next.
    store(floats_of(codes) * scale - offset, out + piece.first + first, room - piece.first - first);
  }
}

template <int I, int... V>
inline void widen_vectors(const uint8_t* row, float* out, int room, std::integer_sequence<int, V...>) {
  constexpr int count = (groups_of(pieces[I]) + LANES - 1) / LANES;
  Vec scales[count], offsets[count];
  read_scales(pieces[I], row, scales, offsets);
  (widen_vector<I, V>(row, scales, offsets, out, room), ...);
}

// Named so, compilers look at the type for the pieces that need it only.
template <int I>
struct Number {
  typedef Half type;
};

// The numbers of a row from the I-th piece on, without the mean. MARGIN bytes before and after the row are read too, and
// `room` floats may be written to.
template <int I = 0>
inline void widen_row(const uint8_t* row, float* out, int room) {
  if constexpr (I < PIECE_COUNT) {
    constexpr Piece piece = pieces[I];
    if constexpr (piece.bits == 16) {
      typename Number<I>::type halves[piece.size];
      memcpy(halves, row + piece.plane[0].offset, sizeof halves);
      widen(halves, out + piece.first, piece.size);
    } else {
      constexpr int vectors = groups_of(piece) * vectors_of_group(piece);
      widen_vectors<I>(row, out, room, std::make_integer_sequence<int, vectors>());
    }
    widen_row<I + 1>(row, out, room);
  }
}

// Where the mean of a layer's numbers is known from; see mean_table in cpu_packed.py.
struct Means {
  static constexpr int STEP = 32;  // positions from one coarse turn to the next
  const float* first;              // [LATENT + ROPE], what the first token's mean is more than the others'
  const float* latent;             // [LATENT]
  const float* fine;               // [STEP, 2, PADDED], the rotary key's mean turned by 0 ... STEP - 1 positions
  const float* coarse;             // [positions / STEP, 2, PADDED], cosines and sines of STEP positions each
  static constexpr int HALF = ROPE / 2;
  static constexpr int PADDED = (HALF + LANES - 1) / LANES * LANES;  // with zeros

  explicit Means(const float* table)
      : first(table), latent(first + LATENT + ROPE), fine(latent + LATENT), coarse(fine + 2 * STEP * PADDED) {}

  // The rotary key's mean at a position, [ROPE]; `out` has room for LANES floats more.
  void turn(int64_t position, float* out) const {
    const float* mean = fine + position % STEP * 2 * PADDED;
    const float* turn = coarse + position / STEP * 2 * PADDED;
    auto part = [](const float* in) {
      Vec vec;
      memcpy(&vec, in, sizeof vec);
      return vec;
    };
    for (int i = 0; i < HALF; i += LANES)
      store(part(turn + i) * part(mean + i) - part(turn + PADDED + i) * part(mean + PADDED + i), out + i, LANES);
    for (int i = 0; i < HALF; i += LANES)
      store(part(turn + i) * part(mean + PADDED + i) + part(turn + PADDED + i) * part(mean + i), out + HALF + i, LANES);
  }

  // Add the turned mean, and all that the first token has more.
  void add_to(float* numbers, const float* turned, int64_t position) const {
    for (int i = 0; i < ROPE; i++) numbers[LATENT + i] += turned[i];
    if (position == 0)
      for (int i = 0; i < LATENT + ROPE; i++) numbers[i] += first[i];
  }
};

}  // namespace
