// Scores and weighted sums of a few cached tokens, for all heads of one sequence.
//
// Compiled for one model by cpu_kernel.py, which defines HEADS, LATENT and ROPE.

#pragma once

#include <algorithm>

#include "cpu_numbers.h"

namespace {

constexpr int largest_divisor(int of, int limit) {
  while (of % limit) limit--;
  return limit;
}

constexpr int WIDTH = LATENT + ROPE;
constexpr int TILE = 32;  // cached tokens: their copies stay in the nearest caches
static_assert(TILE % LANES == 0, "vectors fill tiles");
// Block sizes whose accumulators fit into 32 vector registers.
constexpr int ROWS = largest_divisor(HEADS, std::min(HEADS, 9));
constexpr int TOKENS = 2;

// Sums of 16 vectors, one in each lane: a tree that halves the vectors and doubles the sums they hold.
inline Vec sums(Vec* v) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int half = LANES / 2; half; half /= 2) {
    // Lanes whose bit `half` is set take from the second operand; `own` keeps such a lane's half, `other` its partner.
    IntVec second = (lane & half) != 0;
    IntVec own = lane + (second & LANES);
    IntVec other = (lane ^ half) + (second & LANES);
    for (int i = 0; i < half; i++) {
      v[i] = __builtin_shuffle(v[i], v[i + half], own) + __builtin_shuffle(v[i], v[i + half], other);
    }
  }
  return v[0];
}

// Heads are rows everywhere. What pads vectors must be zero, so tiles are zeroed when they are made.
template <typename Scalar>
struct alignas(64) Tile {
  static constexpr int STEPS = (WIDTH + LANES - 1) / LANES;
  static constexpr int ROOM = STEPS * LANES;  // floats that `set_row` reads
  static constexpr int VALUE_STEPS = (LATENT + LANES - 1) / LANES;
  static constexpr int COLUMNS = largest_divisor(VALUE_STEPS, std::min(VALUE_STEPS, 18 / ROWS));

  Vec query[HEADS][STEPS];
  Vec keys[TILE][STEPS];
  Vec partial[ROWS][TILE];
  float weights[HEADS][TILE];

  void set_query(int head, const Scalar* in) { widen(in, reinterpret_cast<float*>(query[head]), WIDTH); }

  template <typename Number>
  void set_row(int token, const Number* in) {
    widen(in, reinterpret_cast<float*>(keys[token]), WIDTH);
  }

  void clear_rows(int first) { memset(keys[first], 0, sizeof keys[0] * (TILE - first)); }

  // Set the weights of a vector of tokens; returns what they are after rounding.
  Vec set_weights(int head, int v, Vec weight) {
    memcpy(weights[head] + v * LANES, &weight, sizeof weight);
    return weight;
  }

  // Add the weighted values, which are the first numbers of the keys.
  void add_values(Vec (*output)[VALUE_STEPS]) {
    for (int head = 0; head < HEADS; head += ROWS)
      for (int step = 0; step < VALUE_STEPS; step += COLUMNS) {
        Vec sum[ROWS][COLUMNS];
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < COLUMNS; j++) sum[i][j] = output[head + i][step + j];
        for (int token = 0; token < TILE; token++)
          for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += weights[head + i][token] * keys[token][step + j];
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < COLUMNS; j++) output[head + i][step + j] = sum[i][j];
      }
  }

  // Where `add_values` puts a number of the latent.
  static constexpr int place(int column) { return column; }
};

#ifdef __AVX512BF16__
// The same by the instruction that multiplies pairs of bfloat16 and sums in float32, twice as many in the same time.
// Queries and unpacked rows are bfloat16 already, so their products are exact. Weights are rounded to bfloat16.
template <>
struct alignas(64) Tile<Bfloat16> {
  static constexpr int PAIRED = 2 * LANES;  // numbers in a vector
  static constexpr int STEPS = (WIDTH + PAIRED - 1) / PAIRED;
  static constexpr int ROOM = STEPS * PAIRED;
  static constexpr int BLOCKS = (LATENT + PAIRED - 1) / PAIRED;
  static constexpr int VALUE_STEPS = 2 * BLOCKS;

  __m512i query[HEADS][STEPS];
  __m512i keys[TILE][STEPS];
  Vec partial[ROWS][TILE];
  int32_t weights[HEADS][TILE / 2];  // of two tokens each

  void set_query(int head, const Bfloat16* in) { memcpy(query[head], in, sizeof *in * WIDTH); }

  void set_row(int token, const Bfloat16* in) { memcpy(keys[token], in, sizeof *in * WIDTH); }

  void set_row(int token, const float* in) {
    for (int step = 0; step < STEPS; step++, in += PAIRED)
      keys[token][step] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + LANES), _mm512_loadu_ps(in));
  }

  void clear_rows(int first) { memset(keys[first], 0, sizeof keys[0] * (TILE - first)); }

  Vec set_weights(int head, int v, Vec weight) {
    HalfVec halves = (HalfVec)_mm512_cvtneps_pbh((__m512)weight);
    memcpy(weights[head] + v * LANES / 2, &halves, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, WordVec) << 16);
  }

  void add_values(Vec (*output)[VALUE_STEPS]) {
    for (int head = 0; head < HEADS; head += ROWS)
      for (int block = 0; block < BLOCKS; block++) {
        Vec sum[ROWS][2];
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < 2; j++) sum[i][j] = output[head + i][2 * block + j];
        for (int token = 0; token < TILE; token += 2) {
          // Each number beside that of the next token. The instructions work within quarters of a vector.
          __m512i first = keys[token][block], second = keys[token + 1][block];
          __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
          for (int i = 0; i < ROWS; i++) {
            __m512i weight = _mm512_set1_epi32(weights[head + i][token / 2]);
            sum[i][0] = dot(sum[i][0], weight, low);
            sum[i][1] = dot(sum[i][1], weight, high);
          }
        }
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < 2; j++) output[head + i][2 * block + j] = sum[i][j];
      }
  }

  static constexpr int place(int column) {
    int quarter = column % PAIRED / 8, number = column % 8;
    return column / PAIRED * PAIRED + number / 4 * LANES + quarter * 4 + number % 4;
  }
};
#endif

// Products of all queries and keys of a tile.
template <typename Tokens>
void score(Tokens& tile, Vec (*scores)[TILE / LANES]) {
  for (int head = 0; head < HEADS; head += ROWS) {
    for (int token = 0; token < TILE; token += TOKENS) {
      Vec sum[ROWS][TOKENS] = {};
      for (int step = 0; step < Tokens::STEPS; step++)
        for (int i = 0; i < ROWS; i++)
          for (int j = 0; j < TOKENS; j++)
            sum[i][j] = dot(sum[i][j], tile.query[head + i][step], tile.keys[token + j][step]);
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < TOKENS; j++) tile.partial[i][token + j] = sum[i][j];
    }
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < TILE / LANES; v++) scores[head + i][v] = sums(&tile.partial[i][v * LANES]);
  }
}

}  // namespace
