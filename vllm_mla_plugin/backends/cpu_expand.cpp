// MLA prefill on CPU: keys and values of all heads, expanded from latents.
//
// Compiled for one model by cpu_kernel.py, which defines HEADS, LATENT, ROPE, NOPE and VALUE, for processors that
// multiply pairs of bfloat16. A matrix product would do the same, but its result lies elsewhere than attention wants it:
// keys would have to be put together with their rotary part, which takes almost as long as the product.

#include <algorithm>

#include "cpu_numbers.h"

namespace {

constexpr int WIDTH = LATENT + ROPE;
constexpr int PAIRS = (LATENT + 1) / 2;
constexpr int CHUNK = 96;  // tokens whose latents stay in the nearest cache
// Tokens and vectors of results whose sums fit into 32 vector registers.
constexpr int TOKENS = 6;
constexpr int VECTORS = 4;
static_assert(CHUNK % TOKENS == 0, "blocks of tokens fill chunks");
constexpr int KEY_VECTORS = (NOPE + LANES - 1) / LANES;
constexpr int EACH = KEY_VECTORS + (VALUE + LANES - 1) / LANES;  // vectors of a head

// What attention reads: keys [tokens, HEADS, NOPE + ROPE] and values [tokens, HEADS, VALUE].
struct Results {
  Bfloat16* keys;
  Bfloat16* values;

  void store(int64_t token, int vector, Vec sum) const {
    int head = vector / EACH, own = vector % EACH;
    if (head >= HEADS) return;  // what fills up the last block
    bool is_key = own < KEY_VECTORS;
    int first = (is_key ? own : own - KEY_VECTORS) * LANES, room = (is_key ? NOPE : VALUE) - first;
    Bfloat16* out = is_key ? keys + (token * HEADS + head) * (NOPE + ROPE) : values + (token * HEADS + head) * VALUE;
    __m256bh halves = _mm512_cvtneps_pbh((__m512)sum);
    if (room >= LANES) memcpy(out + first, &halves, sizeof halves);
    else memcpy(out + first, &halves, sizeof(Bfloat16) * room);
  }
};

}  // namespace

extern "C" {

// rows [tokens, LATENT + ROPE], with the rotary key rotated. weight [vectors, PAIRS, LANES, 2]: for each vector of
// results (of a head's key, then of its value, filled up with zeros; filled up to a multiple of VECTORS) and each pair
// of the latent, the pair's factors of 16 results.
void expand(const Bfloat16* rows, const Bfloat16* weight, Bfloat16* keys, Bfloat16* values, int64_t tokens) {
  const __m512i* factors = reinterpret_cast<const __m512i*>(weight);
  const Results results{keys, values};
#pragma omp parallel for schedule(dynamic)
  for (int64_t start = 0; start < tokens; start += CHUNK) {
    int count = std::min<int64_t>(CHUNK, tokens - start);
    int32_t latents[CHUNK][PAIRS];
    memset(latents, 0, sizeof latents);
    for (int token = 0; token < count; token++) {
      const Bfloat16* row = rows + (start + token) * WIDTH;
      memcpy(latents[token], row, sizeof *row * LATENT);
      for (int head = 0; head < HEADS; head++)
        memcpy(keys + ((start + token) * HEADS + head) * (NOPE + ROPE) + NOPE, row + LATENT, sizeof *row * ROPE);
    }
    for (int vector = 0; vector < HEADS * EACH; vector += VECTORS) {
      for (int token = 0; token < count; token += TOKENS) {
        Vec sum[TOKENS][VECTORS] = {};
        for (int pair = 0; pair < PAIRS; pair++)
          for (int i = 0; i < TOKENS; i++)
            for (int j = 0; j < VECTORS; j++)
              sum[i][j] = dot(sum[i][j], _mm512_set1_epi32(latents[token + i][pair]),
                              _mm512_loadu_si512(factors + int64_t(vector + j) * PAIRS + pair));
        for (int i = 0; i < std::min(TOKENS, count - token); i++)
          for (int j = 0; j < VECTORS; j++) results.store(start + token + i, vector + j, sum[i][j]);
      }
    }
  }
}
}
