// MLA decode on CPU: multi-query attention on paged latents, all sequences of a batch at once.
//
// Compiled for one model by cpu_kernel.py, which defines HEADS, LATENT, ROPE and SCALAR (the type of query, cache and
// output: float, _Float16, or Bfloat16), and for packed rows what cpu_rows.h asks for. One pass over the cache (online
// softmax, Milakov and Gimelshein 2018), whose rows are keys and, in their first LATENT numbers, values. All sums are
// float32; cpu_tile.h says what is multiplied.

#include <cmath>
#include <iterator>
#include <memory>

#include "cpu_tile.h"
#ifdef PIECES
#include "cpu_rows.h"
#endif

namespace {

constexpr int CHUNK = 1024;  // cached tokens per task: long contexts are shared among threads
constexpr int BATCH = 4;  // packed tokens that are read together: their floats stay in the nearest cache
static_assert(CHUNK % TILE == 0 && TILE % BATCH == 0, "batches fill tiles, and tiles fill chunks");
typedef Tile<SCALAR> Tokens;
constexpr int VALUE_STEPS = Tokens::VALUE_STEPS;

// e ** x for x <= 0, to float32 rounding; below -87, where the true value is no normal number, at most 2e-38.
Vec exp_of(Vec x) {
  Vec lowest = Vec{} - 87.0f;
  x = x > lowest ? x : lowest;
  IntVec whole = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);  // of x / ln 2, rounded to nearest
  Vec n = __builtin_convertvector(whole, Vec);
  Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the difference stays exact
  Vec sum = 1.0f / 720 * f + 1.0f / 120;
  sum = sum * f + 1.0f / 24;
  sum = sum * f + 1.0f / 6;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.0f;
  sum = sum * f + 1.0f;
  IntVec power = (whole + 127) << 23;
  Vec scale;
  memcpy(&scale, &power, sizeof scale);
  return sum * scale;
}

// What one thread works on.
struct alignas(64) Work {
  Tokens tile;
#ifdef PIECES
  Row rows[BATCH];
  float numbers[BATCH][Tokens::ROOM];
  float turned[BATCH][ROPE + LANES];
#endif
  Vec scores[HEADS][TILE / LANES];
  Vec output[HEADS][VALUE_STEPS];
  float top[HEADS];  // largest score so far
  Vec total[HEADS];  // sums of exp(score - top)
};

// Scores to softmax weights relative to the largest score so far; what was summed before is rescaled.
void weigh(Work& work, int count, float scale) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int head = 0; head < HEADS; head++) {
    Vec* scores = work.scores[head];
    Vec largest = Vec{} + work.top[head];
    for (int v = 0; v < TILE / LANES; v++) {
      scores[v] = lane < count - v * LANES ? scores[v] * scale : Vec{} - INFINITY;
      largest = scores[v] > largest ? scores[v] : largest;
    }
    float top = joined(largest, [](float a, float b) { return std::max(a, b); });
    if (top > work.top[head]) {
      float fade = std::exp(work.top[head] - top);
      for (Vec& value : work.output[head]) value *= fade;
      work.total[head] *= fade;
      work.top[head] = top;
    }
    for (int v = 0; v < TILE / LANES; v++)
      work.total[head] += work.tile.set_weights(head, v, exp_of(scores[v] - top));
  }
}

#ifdef PIECES
typedef uint8_t Cached;
constexpr int ROW_LENGTH = ROW;

#else
typedef SCALAR Cached;
constexpr int ROW_LENGTH = WIDTH;
#endif

// The cache of one sequence.
struct Pages {
  const Cached* cache;
  const int32_t* table;
  int64_t block_stride;
  int block_size;

  const Cached* row(int token) const {
    return cache + table[token / block_size] * block_stride + int64_t(token % block_size) * ROW_LENGTH;
  }
};

#ifdef PIECES
// Some tokens' numbers but for the latent's mean: it changes all scores of a query by the same, which is nothing to a
// softmax, and results by itself.
void read_rows(Work& work, const Pages& pages, const float* means, int first, int count) {
  for (int start = 0; start < count; start += BATCH) {
    int token = first + start, batch = std::min(BATCH, count - start);
    // A step for all tokens at a time, because the processor waits for what has just been written by other vectors.
    for (int i = 0; i < batch; i++) memcpy(work.rows[i].bytes, pages.row(token + i), ROW);
    for (int i = 0; means && i < batch; i++) Means(means).turn(token + i, work.turned[i]);
    for (int i = 0; i < batch; i++) widen_row(work.rows[i].bytes, work.numbers[i], Tokens::ROOM);
    for (int i = 0; means && i < batch; i++) Means(means).add_to(work.numbers[i], work.turned[i], token + i);
    for (int i = 0; i < batch; i++) work.tile.set_row(start + i, work.numbers[i]);
  }
}
#else
void read_rows(Work& work, const Pages& pages, const float*, int first, int count) {
  for (int token = 0; token < count; token++) work.tile.set_row(token, pages.row(first + token));
}
#endif

void attend(Work& work, const Pages& pages, const float* means, int first, int last, float scale) {
  for (; first < last; first += TILE) {
    int count = std::min(TILE, last - first);
    read_rows(work, pages, means, first, count);
    // No weight of zero removes what another sequence may have left here, should it be NaN.
    work.tile.clear_rows(count);
    // Pages lie anywhere in memory, which the processor does not foresee.
    for (int token = first + TILE; token < std::min(first + 2 * TILE, last); token++) {
      const char* next = reinterpret_cast<const char*>(pages.row(token));
      for (size_t byte = 0; byte < ROW_LENGTH * sizeof(Cached); byte += 64) __builtin_prefetch(next + byte);
    }
    score(work.tile, work.scores);
    weigh(work, count, scale);
    work.tile.add_values(work.output);
  }
}

}  // namespace

extern "C" {

// Floats of workspace for each of `sequences * chunks`.
int partial_size() { return HEADS * (VALUE_STEPS * LANES + 2); }

int chunk_size() { return CHUNK; }

// query [sequences, HEADS, WIDTH] and output [sequences, HEADS, LATENT], contiguous; the softmax scale is in `scale`.
// `means`: of packed rows, what struct Means reads, or null.
void decode(const SCALAR* query, const Cached* cache, const int32_t* tables, const int32_t* lengths, SCALAR* output,
            float* workspace, const float* means, int sequences, int chunks, int64_t table_stride,
            int64_t block_stride, int block_size, float scale) {
  constexpr int OUTPUT = VALUE_STEPS * LANES;
#pragma omp parallel
  {
    auto work = std::make_unique<Work>();  // zeroed: what pads vectors stays zero
#pragma omp for collapse(2) schedule(dynamic)
    for (int sequence = 0; sequence < sequences; sequence++) {
      for (int chunk = 0; chunk < chunks; chunk++) {
        int first = chunk * CHUNK, last = std::min(lengths[sequence], first + CHUNK);
        if (first >= last) continue;
        for (int head = 0; head < HEADS; head++) {
          work->tile.set_query(head, query + (int64_t(sequence) * HEADS + head) * WIDTH);
          std::fill(std::begin(work->output[head]), std::end(work->output[head]), Vec{});
          work->top[head] = -INFINITY;
          work->total[head] = Vec{};
        }
        attend(*work, {cache, tables + sequence * table_stride, block_stride, block_size}, means, first, last, scale);
        float* partial = workspace + (int64_t(sequence) * chunks + chunk) * HEADS * (OUTPUT + 2);
        memcpy(partial, work->output, sizeof work->output);
        memcpy(partial + HEADS * OUTPUT, work->top, sizeof work->top);
        for (int head = 0; head < HEADS; head++)
          partial[HEADS * (OUTPUT + 1) + head] = joined(work->total[head], [](float a, float b) { return a + b; });
      }
    }
#pragma omp for collapse(2)
    for (int sequence = 0; sequence < sequences; sequence++) {
      for (int head = 0; head < HEADS; head++) {
        const float* first = workspace + int64_t(sequence) * chunks * HEADS * (OUTPUT + 2);
        int used = (lengths[sequence] + CHUNK - 1) / CHUNK;
        auto partial = [&](int chunk) { return first + int64_t(chunk) * HEADS * (OUTPUT + 2); };
        float top = -INFINITY, total = 0, sum[OUTPUT] = {};
        for (int chunk = 0; chunk < used; chunk++) top = std::max(top, partial(chunk)[HEADS * OUTPUT + head]);
        for (int chunk = 0; chunk < used; chunk++) {
          float fade = std::exp(partial(chunk)[HEADS * OUTPUT + head] - top);
          total += fade * partial(chunk)[HEADS * (OUTPUT + 1) + head];
          for (int i = 0; i < OUTPUT; i++) sum[i] += fade * partial(chunk)[head * OUTPUT + i];
        }
        for (int i = 0; i < LATENT; i++) {
          // Sequences of length 0 pad a batch.
          float result = used ? sum[Tokens::place(i)] / total : 0.0f;
#ifdef PIECES
          if (used && means) result += Means(means).latent[i];
#endif
          narrow(result, output + (int64_t(sequence) * HEADS + head) * LATENT + i);
        }
      }
    }
  }
}
}
