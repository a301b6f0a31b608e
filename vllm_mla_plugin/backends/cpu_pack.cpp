// Packing tokens into rows of the cache, and reading them back, on CPU.
//
// Compiled for one format by cpu_kernel.py, which defines LATENT, ROPE, SCALAR (the model's dtype) and what cpu_rows.h
// asks for. Computes what vllm_mla_plugin/latent_packing.py does, which says why. No products and sums are contracted
// (-ffp-contract=off): codes are the same then, unless two scales are equally good.

#include <cmath>

#include "cpu_rows.h"

namespace {

constexpr int WIDTH = LATENT + ROPE;
constexpr int ROOM = (WIDTH + LANES - 1) / LANES * LANES + LANES;
constexpr int LARGEST = 1 << 20, LARGEST_HALF = 65504;

float bounded(float value, float least, float most) { return value > least ? std::min(value, most) : least; }

// Numbers of a group, in whole vectors filled up with the first one; `there` is 1 where a number is its own.
template <int I>
struct Group {
  static constexpr Piece piece = pieces[I];
  static constexpr int VECTORS = vectors_of_group(piece);
  static constexpr int TOP = (1 << piece.bits) - 1;

  Vec numbers[VECTORS];
  Vec there[VECTORS];

  void load(const float* in, int count) {
    for (int i = 0; i < VECTORS * LANES; i++) {
      reinterpret_cast<float*>(numbers)[i] = bounded(in[i < count ? i : 0], -LARGEST, LARGEST);
      reinterpret_cast<float*>(there)[i] = i < count;
    }
  }

  void bounds(float& low, float& high) const {
    Vec least = numbers[0], most = numbers[0];
    for (const Vec& vec : numbers) {
      least = vec < least ? vec : least;
      most = vec > most ? vec : most;
    }
    low = std::min(0.0f, joined(least, [](float a, float b) { return std::min(a, b); }));  // codes reach 0 too
    high = std::max(0.0f, joined(most, [](float a, float b) { return std::max(a, b); }));
    if (piece.scaling == SYMMETRIC) {
      high = std::max(-low, high);
      low = -high;
    }
  }

  Vec codes(int vector, float inverse, float zero) const {
    Vec code = numbers[vector] * inverse + zero;
    Vec none = {}, top = none + float(TOP);
    code = code > none ? code : none;  // and what is no number
    code = code < top ? code : top;
    const float whole = 3 << 22;  // floats of this size have no fraction
    return (code + whole) - whole;
  }

  float error(float scale, float zero) const {
    float inverse = 1 / scale;
    Vec sum = {};
    for (int vector = 0; vector < VECTORS; vector++) {
      Vec difference = (codes(vector, inverse, zero) - zero) * scale - numbers[vector];
      sum += difference * difference * there[vector];
    }
    return joined(sum, [](float a, float b) { return a + b; });
  }
};

template <int I>
float scale_of(int code) {
  return scales_of(pieces[I], IntVec{} + code)[0];
}

template <int I>
float zero_of(int code) {
  return zeros_of(pieces[I], IntVec{} + code)[0];
}

template <int I>
void pack_group(const Group<I>& group, int index, uint8_t* row, uint8_t* codes) {
  constexpr Piece piece = pieces[I];
  constexpr bool compact = piece.scaling == COMPACT, fixed = piece.scaling == SYMMETRIC;
  constexpr int most = compact ? 31 : 255, shift = compact ? 22 : 20;
  constexpr int TOP = Group<I>::TOP;
  float low, high;
  group.bounds(low, high);
  float range = (high - low) * float(1 / double(TOP));
  int32_t bits;
  memcpy(&bits, &range, sizeof bits);
  bits -= (compact ? 118 : 107) << 23;
  int reaching = std::clamp((bits + (1 << shift) - 1) >> shift, 0, most);
  int best_scale = reaching, best_zero = 0;
  float least = INFINITY;
  for (int below = 0; below < piece.tried; below += piece.step) {
    int scale_code = std::max(reaching - below, 0);
    float scale = scale_of<I>(scale_code), inverse = 1 / scale;
    for (float place : {0.5f, 0.0f, 1.0f}) {
      if (fixed && place != 0.5f) continue;
      float wanted = place * (TOP - high * inverse) - (1 - place) * (low * inverse);
      int zero_code = compact ? bounded(std::nearbyint(wanted * (8.0f / (TOP + 1)) - 0.5f), 0, 7)
                              : bounded(std::nearbyint(wanted * (256.0f / (TOP + 1))), 0, 255);
      float error = group.error(scale, zero_of<I>(zero_code));
      if (error < least) {
        least = error;
        best_scale = scale_code;
        best_zero = zero_code;
      }
    }
  }
  row[piece.scales + index] = compact ? best_scale << 3 | best_zero : best_scale;
  if (piece.scaling == ASYMMETRIC) row[piece.zeros + index] = best_zero;
  float inverse = 1 / scale_of<I>(best_scale), zero = zero_of<I>(best_zero);
  for (int vector = 0; vector < Group<I>::VECTORS; vector++) {
    ByteVec bytes = __builtin_convertvector(__builtin_convertvector(group.codes(vector, inverse, zero), IntVec), ByteVec);
    memcpy(codes + vector * LANES, &bytes, sizeof bytes);
  }
}

template <int I>
void pack_pieces(const float* numbers, uint8_t* row) {
  if constexpr (I < PIECE_COUNT) {
    constexpr Piece piece = pieces[I];
    const float* own = numbers + piece.first;
    if constexpr (piece.bits == 16) {
      typename Number<I>::type halves[piece.size];
      for (int i = 0; i < piece.size; i++) narrow(bounded(own[i], -LARGEST_HALF, LARGEST_HALF), halves + i);
      memcpy(row + piece.plane[0].offset, halves, sizeof halves);
    } else {
      uint8_t codes[groups_of(piece) * piece.group + 8 + LANES];
      Group<I> group;
      for (int index = 0; index < groups_of(piece); index++) {
        int first = index * piece.group;
        group.load(own + first, std::min(piece.group, piece.size - first));
        pack_group<I>(group, index, row, codes + first);
      }
      memset(codes + piece.size, 0, 8);
      for (int p = 0; p < piece.planes; p++) {
        const Plane plane = piece.plane[p];
        for (int i = 0; i < plane.stride; i++) {
          int byte = 0;
          for (int bit = 0, number = i; bit < 8; bit += plane.bits, number += plane.stride)
            byte |= ((codes[number] >> plane.shift) & ((1 << plane.bits) - 1)) << bit;
          row[plane.offset + i] = byte;
        }
      }
    }
    pack_pieces<I + 1>(numbers, row);
  }
}

}  // namespace

extern "C" {

// Rows of `tokens` tokens. latent [tokens, LATENT] and rope [tokens, ROPE], of which the strides are given; token i goes
// to `rows + slots[i] * ROW`, or nowhere if its slot is below 0. The mean is taken out of the numbers already.
void pack(const SCALAR* latent, const SCALAR* rope, const int64_t* slots, uint8_t* rows, int64_t tokens,
          int64_t latent_stride, int64_t rope_stride) {
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    if (slots[token] < 0) continue;
    float numbers[WIDTH];
    widen(latent + token * latent_stride, numbers, LATENT);
    widen(rope + token * rope_stride, numbers + LATENT, ROPE);
    uint8_t row[ROW] = {};  // what pads it stays 0
    pack_pieces<0>(numbers, row);
    memcpy(rows + slots[token] * ROW, row, ROW);
  }
}

// What `pack` wrote, with the mean: output [tokens, LATENT + ROPE]; token i lies in `rows + slots[i] * ROW` and has
// positions[i]. `means`: what struct Means reads, or null.
void unpack(const uint8_t* rows, const int64_t* slots, const int64_t* positions, const float* means, SCALAR* output,
            int64_t tokens) {
#pragma omp parallel for schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    float numbers[ROOM];
    Row row = {};
    memcpy(row.bytes, rows + slots[token] * ROW, ROW);
    widen_row(row.bytes, numbers, ROOM);
    if (means) {
      Means table(means);
      float turned[ROPE + LANES];
      table.turn(positions[token], turned);
      table.add_to(numbers, turned, positions[token]);
      for (int i = 0; i < LATENT; i++) numbers[i] += table.latent[i];
    }
    for (int i = 0; i < WIDTH; i++) narrow(numbers[i], output + token * WIDTH + i);
  }
}
}
